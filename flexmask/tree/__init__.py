"""The idea: samples merge into a prefix tree, and one integer per token is its whole mask.

`sample` and `tree` hold the sequences, `build` merges them, `layout` has their order in a packed
row, `intervals` what a token sees, `mask` the value with all that follows from it: `tiles`,
`block_mask` and `chains`. `oracle` finds the same mask another way, up the parent links. Nothing
here knows of models or text.
"""
