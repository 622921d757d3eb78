"""EViT (arXiv 2202.07800): keep the tokens the class token attends to most, fuse the others into one.

Between attention and MLP of a block. The fused row is the weighted sum as the paper's code makes it: not divided by its weights.
"""

import torch

from madtp_kernels import Merged, RaggedBatch, attention, attention_received, merge_tokens, top_tokens


def evit(x: RaggedBatch, q, k, lse, keep_rate: float = 0.7) -> Merged:
    """x ``[T, D]`` after attention's residual sum, q, k and lse of that attention; token 0 of a sample is its class token."""
    scores = attention_received(q, k, lse, x.cu_seqlens, x.max_seqlen, heads="mean", queries=slice(0, 1))
    count = ((x.lengths - 1).clamp(min=0).double() * keep_rate).ceil().int()
    keep = top_tokens(scores, count, x.cu_seqlens, protected=1)
    return merge_tokens(x, keep, weights=scores, append="sum")


if __name__ == "__main__":
    x = RaggedBatch.from_list([torch.randn(197, 768), torch.randn(120, 768)])
    q, k, v = torch.randn(317, 3, 12, 64).unbind(1)
    _, lse = attention(q, k, v, x.cu_seqlens, x.cu_seqlens, 197, 197)
    print("tokens:", x.lengths.tolist(), "->", evit(x, q, k, lse).tokens.lengths.tolist())
