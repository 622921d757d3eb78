"""VisionZip (arXiv 2412.04467): the tokens the class token attends to, and a few that gather the rest by similar keys."""

import torch
import torch.nn.functional as F

from madtp_kernels import RaggedBatch, attention, attention_received, merge_tokens, nearest_kept, top_tokens


def visionzip(x: RaggedBatch, q, k, lse, dominant: int = 53, contextual: int = 10) -> RaggedBatch:
    """x ``[T, D]``: features of a layer; q, k and lse of its attention. Rows keep their order."""
    scores = attention_received(q, k, lse, x.cu_seqlens, x.max_seqlen, queries=slice(0, 1))
    row, starts = torch.arange(len(scores), device=x.device), x.cu_seqlens.long()
    keep = top_tokens(scores, dominant, x.cu_seqlens, protected=1)

    # Of the other tokens of a sample every step-th is a target; the rest goes to the target with the most similar key.
    before = F.pad((~keep).cumsum(0), (1, 0))
    sample = torch.repeat_interleave(torch.arange(x.batch_size, device=x.device), x.lengths)
    place = before[:-1] - before[starts[:-1]][sample]
    step = (before[starts].diff() // contextual).clamp(min=1)[sample]
    target = ~keep & (place % step == 0) & (place // step < contextual)
    into = nearest_kept(k.mean(1), target, x.cu_seqlens, x.max_seqlen)
    members = (~keep & ~target).to(scores.dtype)
    merged = merge_tokens(x, torch.where(keep, row.int(), into), weights=members)
    # A target plus the mean of its members, as the paper's code adds them.
    own = x.values[merged.source.long()].where((merged.sizes > 1)[:, None], 0)
    return merged.tokens.with_values(merged.tokens.values + own)


if __name__ == "__main__":
    x = RaggedBatch.from_list([torch.randn(577, 1024), torch.randn(300, 1024)])
    q, k, v = torch.randn(877, 3, 16, 64).unbind(1)
    _, lse = attention(q, k, v, x.cu_seqlens, x.cu_seqlens, 577, 577)
    print("tokens:", x.lengths.tolist(), "->", visionzip(x, q, k, lse).lengths.tolist())
