"""Which tokens a layer keeps: the vessel they travel in, the interface of a rule, and the rules, one file each.

`base` holds what every rule and every model shares, `official` what only reproduces quirks of MADTP's own code.
"""

from .base import METHODS, PER_TOKEN, LayerTrace, Pruning, ScoredPruning, Tokens, register
from .madtp import MADTP
from .topk import Random, TopK

__all__ = [
    "MADTP",
    "METHODS",
    "PER_TOKEN",
    "LayerTrace",
    "Pruning",
    "Random",
    "ScoredPruning",
    "Tokens",
    "TopK",
    "register",
]
