"""Trees laid into rows under a token budget, and rows into batches of equal cost.

`split` cuts a tree that is larger than a row, `fill` has the bin packing, `rows` the row that a
model sees, `fitting` a dataset in which nothing exceeds the budget, `epoch` the steps of an epoch,
`sampler` what a data loader asks, `collator` what it hands to the model.
"""
