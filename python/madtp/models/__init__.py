"""The task models, one file each, on shared ragged layers."""
