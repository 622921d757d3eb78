"""Data: the bundled demonstration files, and a synthetic task that needs no download."""
