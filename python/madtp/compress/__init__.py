"""Training: of a dense model, and of a model that is pruned while it learns.

Only models, data and numbers are dealt with here; commands and reports live elsewhere.
"""
