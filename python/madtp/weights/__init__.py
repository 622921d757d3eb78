"""Weights in and out: files of several formats and layouts become models, and models become files.

`loading` locates (`sources`), builds and fills; `key_maps` has one table of names per layout; `files` reads what is trusted
least; `made_up` draws what no file has; `saving` writes.
"""

from .files import CheckpointError
from .key_maps.blip import from_ours as to_official
from .key_maps.blip import to_ours as from_official
from .loading import load
from .made_up import initial_weight, randomize
from .saving import save_pretrained

__all__ = [
    "CheckpointError",
    "from_official",
    "initial_weight",
    "load",
    "randomize",
    "save_pretrained",
    "to_official",
]
