"""Measuring a model on the public benchmarks: `run` asks it about every sample once, `figures` sums up what it said."""
