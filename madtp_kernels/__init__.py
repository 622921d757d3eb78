"""Kernels that score the tokens of a vision-language transformer and run it on the ones that matter.

Operations on ragged batches, each with a plain PyTorch reference, a C++ CPU kernel and a Triton kernel (the four of MADTP with
a CUDA kernel too), and the linear layers between them, which take time for the tokens that are there only.
Needs torch only; ``python -m madtp_kernels.info`` shows what is available here.
"""

from .attention import attention
from .attention_with_importance import attention_with_importance
from .backends import BackendError
from .checks import set_debug
from .compaction import Compacted, compact
from .importance import attention_importance
from .linear import linear, linear_pair
from .merge_redundant import MergedRedundant, merge_redundant
from .merging import Merged, lowest_tokens, merge_tokens, top_tokens
from .normalization import layer_norm
from .pair_attention import pair_attention
from .prune import Pruned, prune
from .ragged import RaggedBatch
from .received import attention_received
from .scoring import score_tokens
from .similarity import MergeScores, match_tokens, merge_scores, nearest_kept, novelty
from .unmerging import unmerge

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Compacted",
    "MergeScores",
    "Merged",
    "MergedRedundant",
    "Pruned",
    "RaggedBatch",
    "attention",
    "attention_importance",
    "attention_received",
    "attention_with_importance",
    "compact",
    "layer_norm",
    "linear",
    "linear_pair",
    "lowest_tokens",
    "match_tokens",
    "merge_redundant",
    "merge_scores",
    "merge_tokens",
    "nearest_kept",
    "novelty",
    "pair_attention",
    "prune",
    "score_tokens",
    "set_debug",
    "top_tokens",
    "unmerge",
]
