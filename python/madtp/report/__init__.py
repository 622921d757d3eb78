"""Pictures and tables of what a model did; nothing here computes anything a model needs."""
