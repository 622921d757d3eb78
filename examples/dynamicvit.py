"""DynamicViT (arXiv 2106.02034) at inference: a small network scores the tokens, the worst leave, nothing is merged."""

import torch

from madtp_kernels import Merged, RaggedBatch, merge_tokens, top_tokens


def dynamicvit(x: RaggedBatch, predictor: torch.nn.Module, keep_rate: float = 0.7) -> Merged:
    """x ``[T, D]``; predictor: ``[T, D] -> [T]``. Token 0 of a sample stays; of the others ``int(keep_rate * N)`` do."""
    count = ((x.lengths - 1).clamp(min=0).double() * keep_rate).int()
    keep = top_tokens(predictor(x.values), count, x.cu_seqlens, protected=1)
    return merge_tokens(x, keep)


if __name__ == "__main__":
    x = RaggedBatch.from_list([torch.randn(197, 384), torch.randn(120, 384)])
    predictor = torch.nn.Sequential(
        torch.nn.Linear(384, 96), torch.nn.GELU(), torch.nn.Linear(96, 1), torch.nn.Flatten(0)
    )
    with torch.inference_mode():
        print("tokens:", x.lengths.tolist(), "->", dynamicvit(x, predictor).tokens.lengths.tolist())
