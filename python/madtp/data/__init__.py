"""Data: a synthetic task that needs no download, small models trained on it, and a vocabulary of letters."""
