"""Dynamic sparsity: training in which the structure changes too, at a constant budget.

`train_dynamic` and its result are in `trained`; nothing is imported here, so that recipes may read the options alone.
"""
