"""Which tokens a layer keeps: the vessel they travel in, the interface of a rule, and the rules, one file each.

`base` holds what every rule and every model shares, `merging` what rules share that merge tokens into others,
`calibration` finds their limits, and `official` has what only reproduces quirks of MADTP's own code.
"""

from .base import METHODS, PER_TOKEN, LayerTrace, Pruning, ScoredPruning, Tokens, original_tokens, register, rule_named
from .calibration import SCHEDULES, Calibration, calibrate
from .evit import EViT
from .madtp import MADTP
from .merging import MergingPruning
from .nearest import MADTPNearest
from .pitome import PiToMe
from .ranked_novelty import RankedNovelty
from .tome import ATM, ToMe
from .topk import Random, TopK

__all__ = [
    "ATM",
    "MADTP",
    "METHODS",
    "PER_TOKEN",
    "SCHEDULES",
    "Calibration",
    "EViT",
    "LayerTrace",
    "MADTPNearest",
    "MergingPruning",
    "PiToMe",
    "Pruning",
    "Random",
    "RankedNovelty",
    "ScoredPruning",
    "ToMe",
    "Tokens",
    "TopK",
    "calibrate",
    "original_tokens",
    "register",
    "rule_named",
]
