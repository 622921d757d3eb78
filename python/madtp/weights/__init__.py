"""Weights in and out: files of several formats and layouts become models, and models become files.

`loading` locates, builds and fills; `key_maps` has one table of names per layout; `files` reads what is trusted least.
"""

from .files import CheckpointError
from .loading import load, save_pretrained

__all__ = ["CheckpointError", "load", "save_pretrained"]
