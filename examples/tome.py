"""ToMe (arXiv 2210.09461): merge the r most similar pairs of tokens; attention then counts a token as often as its size."""

import torch

from madtp_kernels import Merged, RaggedBatch, attention, match_tokens, merge_tokens


def tome(x: RaggedBatch, k, sizes, r: int, protected: int = 1) -> Merged:
    """x ``[T, D]`` after attention's residual sum, k ``[T, H, d]`` of that attention, sizes ``[T]`` float32."""
    into, _ = match_tokens(k.mean(1), x.cu_seqlens, x.max_seqlen, count=r, protected=protected)
    return merge_tokens(x, into, sizes=sizes)


def proportional_attention(x: RaggedBatch, qkv, sizes):
    """Attention over merged tokens: the log of a token's size is added to the logits of its key."""
    q, k, v = qkv.unbind(1)
    most = x.max_seqlen
    return attention(q, k, v, x.cu_seqlens, x.cu_seqlens, most, most, key_bias=sizes.log())[0], k


if __name__ == "__main__":
    x = RaggedBatch.from_list([torch.randn(197, 768), torch.randn(120, 768)])
    sizes, project = torch.ones(317), torch.nn.Linear(768, 3 * 768)
    with torch.inference_mode():
        for _ in range(4):
            out, k = proportional_attention(x, project(x.values).unflatten(1, (3, 12, 64)), sizes)
            merged = tome(x.with_values(x.values + out.flatten(1)), k, sizes, r=16)
            x, sizes = merged.tokens, merged.sizes
            print("tokens:", x.lengths.tolist(), "largest size:", int(sizes.max()))
