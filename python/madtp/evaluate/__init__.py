"""Measuring a model on the public benchmarks: `annotations` reads their files and writes result files,
`metrics` and `caption_metrics` compute the numbers. Nothing here loads an image or runs a model."""
