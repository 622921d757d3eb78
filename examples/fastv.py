"""FastV (arXiv 2403.06764): in a decoder's prefill, drop the image tokens that the last token of the prompt hardly looks at.

Text stays, images may stand anywhere in a prompt, every prompt has its own number of them, and position ids go with their tokens.
"""

import torch
import torch.nn.functional as F

from madtp_kernels import Merged, RaggedBatch, attention, attention_received, merge_tokens, top_tokens


def fastv(x: RaggedBatch, q, k, lse, is_image, position_ids, drop_ratio: float = 0.5) -> Merged:
    """x ``[T, D]`` that enter a layer; q ``[T, H, d]``, k ``[T, Hk, d]``, lse of the layer before; is_image ``[T]`` bool."""
    scores = attention_received(q, k, lse, x.cu_seqlens, x.max_seqlen, queries=slice(-1, None), causal=True)
    bounds = x.cu_seqlens.long()
    images = F.pad(is_image.cumsum(0), (1, 0))[bounds].diff()
    count = (images.double() * (1 - drop_ratio)).round().int()
    keep = top_tokens(scores, count, x.cu_seqlens, protected=~is_image)
    return merge_tokens(x, keep, carry=(position_ids,))


if __name__ == "__main__":
    x = RaggedBatch.from_list([torch.randn(640, 896), torch.randn(300, 896)])
    q, k, v = torch.randn(940, 14, 64), torch.randn(940, 2, 64), torch.randn(940, 2, 64)
    _, lse = attention(q, k, v, x.cu_seqlens, x.cu_seqlens, 640, 640, causal=True)
    position_ids = torch.cat([torch.arange(640), torch.arange(300)])
    is_image = (position_ids >= 35) & (position_ids < 290)
    kept = fastv(x, q, k, lse, is_image, position_ids)
    print(
        "tokens:", x.lengths.tolist(), "->", kept.tokens.lengths.tolist(), "positions:", kept.carried[0][:40].tolist()
    )
