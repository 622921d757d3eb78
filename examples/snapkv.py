"""SnapKV (arXiv 2404.14469): which entries of the key-value cache the end of a prompt looks at, one set for each key head."""

import torch
import torch.nn.functional as F

from madtp_kernels import RaggedBatch, attention, attention_received, top_tokens


def snapkv(q, k, lse, cu_seqlens, max_seqlen: int, capacity: int, window: int = 32, kernel: int = 5):
    """``[Hk, T]`` bool: the entries to keep, ``capacity`` in each sample and key head (all of a shorter one), window included.

    q ``[T, H, d]`` and k ``[T, Hk, d]`` after rotation, lse of the causal attention over them.
    """
    votes = attention_received(
        q, k, lse, cu_seqlens, max_seqlen, heads="mean", queries=slice(-window, None), per_key_head=True, causal=True
    )
    lengths = cu_seqlens.diff()
    end = torch.repeat_interleave(cu_seqlens[1:], lengths)
    in_window = torch.arange(len(end), device=q.device) >= end - window
    # Neighbours vote for each other, within a sample: samples are padded with zeros for it, as their ends are.
    ragged = RaggedBatch(votes.where(~in_window, 0).mT, cu_seqlens, max_seqlen)
    padded, mask = ragged.to_padded()
    pooled = F.avg_pool1d(padded.mT, kernel, stride=1, padding=kernel // 2).mT[mask]
    heads = pooled.mT.unbind(0)
    return torch.stack([top_tokens(s, capacity - window, cu_seqlens, protected=in_window) for s in heads])


if __name__ == "__main__":
    lengths = torch.tensor([700, 90])
    cu_seqlens = torch.tensor([0, 700, 790], dtype=torch.int32)
    q, k, v = torch.randn(790, 8, 64), torch.randn(790, 2, 64), torch.randn(790, 2, 64)
    _, lse = attention(q, k, v, cu_seqlens, cu_seqlens, 700, 700, causal=True)
    kept = snapkv(q, k, lse, cu_seqlens, 700, capacity=128)
    print("entries:", lengths.tolist(), "->", [[int(m.sum()) for m in head.split([700, 90])] for head in kept])
