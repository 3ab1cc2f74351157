"""Trees laid into rows under a token budget, and rows into batches of equal cost.

`filling` has the bin packing, `packing` the row that a model sees, `fitting` a dataset in which
nothing exceeds the budget, `epoch_plan` the steps of an epoch, `sampler` what a data loader asks.
"""
