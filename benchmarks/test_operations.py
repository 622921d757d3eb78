"""The four operations, and scoring + compaction together, against eager PyTorch, fused attention without scores, and copies.

On a GPU also the linear layers of a buffer that is not full, against PyTorch's over the whole buffer and over the tokens alone.
"""

from __future__ import annotations

import functools

import baselines
import inputs
import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, DTYPES, ON_GPU, Comparison, Goal, WrongAnswer, environment_kernels, relative_error, require

from madtp_kernels import (
    attention,
    attention_importance,
    attention_with_importance,
    compact,
    linear,
    prune,
    score_tokens,
)

# The first is the one that goals are stated for.
BATCHES = inputs.choose(
    ["64 x 577", "64 uneven", "8 x 577", "1 x 577"], ["8 x 577", "8 uneven", "1 x 577"], ["2 x 37", "8 uneven"]
)
MAIN = BATCHES[0]

# What float32 arithmetic of these sizes loses, whatever the order of its sums.
ROUNDING = 1e-5

each_case = pytest.mark.parametrize(
    "dtype, batch", [(dtype, batch) for batch in BATCHES for dtype in DTYPES], ids=lambda value: value.replace(" ", "-")
)


class Attended:
    """Queries, keys and values of one batch, packed and padded, with the reference's results in float32."""

    def __init__(self, dtype: str, batch: str) -> None:
        self.lengths = inputs.lengths_of(batch)
        self.most = max(self.lengths)
        self.uneven = min(self.lengths) < self.most
        values = inputs.tokens(self.lengths, 3, inputs.HEADS, inputs.HEAD_DIM, dtype=DTYPES[dtype], seed=1)
        values[:, :2] *= 1.6**0.5  # as peaked as in the random real-size model
        self.qkv = inputs.packed(values, self.lengths)
        self.cu = self.qkv.cu_seqlens
        padded, self.mask = self.qkv.to_padded()
        self.padded = [t.contiguous() for t in padded.permute(2, 0, 3, 1, 4)]  # q, k, v: [B, H, L, d]
        self.squares = sum(length**2 for length in self.lengths)
        self.facts = {"dtype": dtype, "batch": batch}

    def attend(self, backend: str | None = None, qkv: torch.Tensor | None = None):
        q, k, v = (self.qkv.values if qkv is None else qkv).unbind(1)
        return attention(q, k, v, self.cu, self.cu, self.most, self.most, backend=backend)

    def importance(self, out, lse, backend: str | None = None, qkv: torch.Tensor | None = None):
        q, k, _ = (self.qkv.values if qkv is None else qkv).unbind(1)
        return attention_importance(q, k, out, lse, self.cu, self.most, backend=backend)

    def attend_with_importance(self):
        q, k, v = self.qkv.values.unbind(1)
        return attention_with_importance(q, k, v, self.cu, self.most)

    @functools.cached_property
    def exact(self):
        """(out, lse, received, cls) of the reference in float32, on the same numbers."""
        wide = self.qkv.values.float()
        out, lse = self.attend("reference", wide)
        return out, lse, *self.importance(out, lse, "reference", wide)

    def fused(self):
        """PyTorch's fused attention on the padded batch: the baseline that computes no scores."""
        return F.scaled_dot_product_attention(*self.padded, attn_mask=self.mask[:, None, None] if self.uneven else None)

    def fused_one_by_one(self):
        return [
            F.scaled_dot_product_attention(*(t[b : b + 1, :, :length] for t in self.padded))
            for b, length in enumerate(self.lengths)
        ]

    def eager(self):
        return baselines.eager_attention(*self.padded, self.mask if self.uneven else None)

    def eager_with_scores(self):
        mask = self.mask if self.uneven else None
        out, probabilities = baselines.eager_attention(*self.padded, mask)
        return out, *baselines.eager_importance(out, probabilities, mask)

    def pack(self, padded_heads: torch.Tensor) -> torch.Tensor:
        """``[B, H, L, d]`` to ``[T, H, d]``."""
        return padded_heads.transpose(1, 2)[self.mask]

    def check_attention(self) -> None:
        out, lse = self.attend()
        fused, (eager, _) = self.pack(self.fused()), self.eager()
        exact, exact_lse = self.exact[:2]
        require(self.pack(eager), exact, 0.02, "eager attention")
        torchs = relative_error(fused, exact)
        require(fused, exact, 0.02, "scaled_dot_product_attention")
        require(out, exact, 2 * torchs + ROUNDING, "attention out")
        require(lse, exact_lse, 1e-4, "attention lse")

    def check_importance(self) -> None:
        self.check_attention()
        together = self.attend_with_importance()
        require(
            together[0], self.exact[0], 2 * relative_error(self.pack(self.fused()), self.exact[0]) + ROUNDING, "out"
        )
        alone = self.importance(*self.attend())
        eager = self.eager_with_scores()[1:]
        for number, name in enumerate(("received", "cls")):
            exact = self.exact[2 + number]
            kept = torch.ones_like(exact, dtype=torch.bool)
            kept[self.cu[:-1].long()] = False
            exact, theirs = exact[kept], eager[number][self.mask[:, 1:]]
            require(theirs, exact, 0.05, f"eager {name}")
            for ours in (together[2 + number], alone[number]):
                require(ours[kept], exact, 2 * relative_error(theirs, exact) + ROUNDING, name)


@each_case
def test_attention(run, dtype, batch):
    data = Attended(dtype, batch)
    candidates = {"attention": data.attend, "sdpa": data.fused}
    if data.uneven:
        candidates["sdpa one by one"] = data.fused_one_by_one
    candidates["eager"] = data.eager
    run(
        Comparison(
            "attention",
            candidates,
            data.check_attention,
            data.facts,
            gflop=4 * data.squares * inputs.WIDTH / 1e9,
            gbytes=4 * data.qkv.values.nbytes / 3 / 1e9,
        )
    )


@each_case
def test_attention_with_importance(run, dtype, batch):
    data = Attended(dtype, batch)
    attended = data.attend()
    candidates = {
        "attention + importance": data.attend_with_importance,
        "attention": data.attend,
        "importance": lambda: data.importance(*attended),
        "sdpa": data.fused,
    }
    if data.uneven:
        candidates["sdpa one by one"] = data.fused_one_by_one
    candidates["eager with scores"] = data.eager_with_scores
    goals = ()
    if batch == MAIN and ON_GPU:
        goals = (Goal("importance", "attention", 0.6),)
    elif batch == MAIN:
        # PyTorch's fused attention uses AMX where the processor has it, for bfloat16.
        sdpa, eager = (0.9, 1 / 3) if dtype == "float32" else (0.8 if environment_kernels() == "amx" else 0.5, 0.2)
        goals = (
            Goal("attention + importance", "sdpa", sdpa),
            Goal("attention + importance", "eager with scores", eager),
        )
    run(
        Comparison(
            "attention + importance",
            candidates,
            data.check_importance,
            data.facts,
            gflop=4 * data.squares * inputs.WIDTH / 1e9,
            gbytes=4 * data.qkv.values.nbytes / 3 / 1e9,
            goals=goals,
        )
    )


class Scored:
    """Tokens of one batch with a dictionary and a temperature that keeps about seven tenths of them."""

    def __init__(self, dtype: str, batch: str) -> None:
        self.lengths = inputs.lengths_of(batch)
        self.most, kind = max(self.lengths), DTYPES[dtype]
        self.uneven = min(self.lengths) < self.most
        self.x = inputs.packed(inputs.tokens(self.lengths, inputs.WIDTH, dtype=kind, seed=2), self.lengths)
        self.entering = inputs.tokens(self.lengths, inputs.WIDTH, dtype=kind, seed=3)
        rng = inputs.generator(4)
        self.dictionary = torch.randn(inputs.ENTRIES, inputs.WIDTH, generator=rng).to(DEVICE, kind)
        total = sum(self.lengths)
        self.received = (torch.randn(total, generator=rng).exp() / self.most).to(DEVICE)
        self.cls = (torch.randn(total, generator=rng).exp() / self.most).to(DEVICE)
        self.norm = tuple(inputs.tokens([1], inputs.WIDTH, dtype=kind, seed=s)[0] for s in (5, 6)) + (1e-6,)
        self.facts = {"dtype": dtype, "batch": batch}
        self.padded, self.mask = self.x.with_values(self.entering).to_padded()
        first = torch.ones(total, dtype=torch.bool, device=DEVICE)
        first[self.x.cu_seqlens[:-1].long()] = False
        self.prunable = first
        self.padded_received, self.padded_cls = (
            self.x.with_values(t).to_padded()[0][:, 1:] for t in (self.received, self.cls)
        )
        self.temperature = self._calibrate(0.7)

    def score(self, temperature: float | None = None, backend: str | None = None):
        return score_tokens(
            self.entering, self.dictionary, self.received, self.cls, self.x.cu_seqlens, self.most,
            temperature or self.temperature, backend=backend,
        )  # fmt: skip

    def _calibrate(self, share: float) -> float:
        low, high = 0.1, 1e4
        for _ in range(16):
            middle = (low * high) ** 0.5
            importance, threshold = self.score(middle)
            kept = importance > torch.repeat_interleave(threshold, self.x.lengths)
            low, high = (middle, high) if kept[self.prunable].float().mean() > share else (low, middle)
        return low

    def eager_score(self):
        mask = self.mask[:, 1:] if self.uneven else None
        return baselines.eager_scores(
            self.padded[:, 1:], self.dictionary, self.padded_received, self.padded_cls, self.temperature, mask
        )

    def check_score(self) -> None:
        importance, threshold = self.score()
        exact, exact_threshold = score_tokens(
            self.entering.float(), self.dictionary.float(), self.received, self.cls, self.x.cu_seqlens, self.most,
            self.temperature, backend="reference",
        )  # fmt: skip
        eager, eager_threshold = self.eager_score()
        require(eager[self.mask[:, 1:]], exact[self.prunable], 0.01, "eager importance")
        require(eager_threshold, exact_threshold, 0.01, "eager threshold")
        require(importance[self.prunable], exact[self.prunable], ROUNDING, "importance")
        require(threshold, exact_threshold, ROUNDING, "threshold")

    def compacted(self, norm: bool = False, backend: str | None = None):
        return compact(self.x, *self.scores, norm=self.norm if norm else None, backend=backend)

    @functools.cached_property
    def scores(self):
        return self.score()

    @functools.cached_property
    def rows_out(self) -> int:
        return self.compacted().tokens.num_tokens

    def pruned(self, norm: bool = False):
        return prune(
            self.x, self.entering, self.dictionary, self.received, self.cls, self.temperature,
            norm=self.norm if norm else None,
        )  # fmt: skip

    def eager_compact(self):
        return baselines.eager_compact(self.x.values, *self.scores, self.x.cu_seqlens)

    def eager_prune(self):
        importance, threshold = self.eager_score()
        padded = F.pad(importance, (1, 0))
        return baselines.eager_compact(self.x.values, padded[self.mask], threshold, self.x.cu_seqlens)

    def check_compaction(self) -> None:
        ours, exact = self.compacted(norm=True), self.compacted(norm=True, backend="reference")
        rows = exact.tokens.num_tokens
        if ours.tokens.cu_seqlens.tolist() != exact.tokens.cu_seqlens.tolist():
            raise WrongAnswer("compact: other counts than the reference")
        if not torch.equal(ours.ids[:rows], exact.ids[:rows]):
            raise WrongAnswer("compact: other tokens than the reference")
        rounding = ROUNDING + torch.finfo(self.x.dtype).eps
        require(ours.tokens.values[:rows], exact.tokens.values[:rows], rounding, "compact")
        require(ours.normed[:rows], exact.normed[:rows], rounding, "compact's LayerNorm")
        eager, eager_cu = self.eager_compact()
        if eager_cu.tolist() != exact.tokens.cu_seqlens.tolist():
            raise WrongAnswer("eager compaction: other counts than the reference")
        require(eager, exact.tokens.values[:rows], rounding, "eager compaction")

    def copy_of(self, rows_read: int, rows_written: int):
        """A copy that reads and writes as many bytes together as these rows have."""
        rows = (rows_read + rows_written) // 2
        source = torch.randn(rows, inputs.WIDTH, generator=inputs.generator(7)).to(DEVICE, self.x.dtype)
        target = torch.empty_like(source)
        return (lambda: target.copy_(source)), 2 * source.nbytes / 1e9


@each_case
def test_score_tokens(run, dtype, batch):
    data = Scored(dtype, batch)
    tokens = sum(data.lengths)
    run(
        Comparison(
            "score_tokens",
            {"score": data.score, "eager": data.eager_score},
            data.check_score,
            data.facts,
            gflop=2 * tokens * inputs.ENTRIES * inputs.WIDTH / 1e9,
            gbytes=data.entering.nbytes / 1e9,
        )
    )


@each_case
def test_compact(run, dtype, batch):
    data = Scored(dtype, batch)
    tokens = sum(data.lengths)
    copy, gbytes = data.copy_of(tokens, data.rows_out)
    candidates = {
        "compact": data.compacted,
        "compact + LayerNorm": lambda: data.compacted(norm=True),
        "copy": copy,
        "eager": data.eager_compact,
    }
    synchronising = ["eager"]
    if not data.uneven:
        padded_x, _ = data.x.to_padded()
        padded_importance, _ = data.x.with_values(data.scores[0]).to_padded()
        candidates["batch maximum"] = lambda: baselines.batch_maximum_compact(
            padded_x, padded_importance, data.scores[1]
        )
        synchronising.append("batch maximum")
    goals = (Goal("compact", "copy", 1.25),) if ON_GPU and batch == MAIN and dtype == "bfloat16" else ()
    facts = {**data.facts, "rows_in": tokens, "rows_out": data.rows_out}
    run(
        Comparison(
            "compact", candidates, data.check_compaction, facts,
            gbytes=gbytes, goals=goals, synchronising=tuple(synchronising),
        )
    )  # fmt: skip


@each_case
def test_prune(run, dense_layer, dtype, batch):
    data = Scored(dtype, batch)
    tokens = sum(data.lengths)
    copy, gbytes = data.copy_of(2 * tokens, data.rows_out)
    copy_with_norm, _ = data.copy_of(2 * tokens, 2 * data.rows_out)

    def check():
        data.check_score()
        data.check_compaction()
        ours, exact = data.pruned(), data.compacted(backend="reference")
        if not torch.equal(ours.compacted.ids[: data.rows_out], exact.ids[: data.rows_out]):
            raise WrongAnswer("prune: other tokens than the reference with the same scores")

    candidates = {
        "prune": data.pruned,
        "prune + LayerNorm": lambda: data.pruned(norm=True),
        "score": data.score,
        "compact": data.compacted,
        "alignment product": lambda: F.linear(data.entering, data.dictionary),
        "copy": copy,
        "copy incl. LayerNorm's rows": copy_with_norm,
        "dense layer": dense_layer(dtype, data.lengths),
        "eager": data.eager_prune,
    }
    goals = (Goal("prune", "copy", 1.5), Goal("prune", "dense layer", 0.04)) if batch == MAIN and not ON_GPU else ()
    if goals and dtype == "bfloat16" and environment_kernels() == "amx":
        goals += (Goal("prune", "alignment product", 3 / 0.9),)  # 3 ms where the product takes 0.9
    facts = {**data.facts, "rows_in": tokens, "rows_out": data.rows_out}
    run(
        Comparison(
            "prune", candidates, check, facts,
            gflop=2 * tokens * inputs.ENTRIES * inputs.WIDTH / 1e9, gbytes=gbytes, goals=goals,
            synchronising=("eager",),
        )
    )  # fmt: skip


class Multiplied:
    """A linear layer of an MLP on a buffer of which a share of the rows holds tokens; the number is on the device."""

    def __init__(self, dtype: str, batch: str, share: float, first: bool) -> None:
        kind, capacity = DTYPES[dtype], sum(inputs.lengths_of(batch))
        columns, width = (4 * inputs.WIDTH, inputs.WIDTH) if first else (inputs.WIDTH, 4 * inputs.WIDTH)
        self.rows = round(capacity * share)
        self.x = inputs.tokens([capacity], width, dtype=kind, seed=9)
        self.weight = inputs.tokens([columns], width, dtype=kind, seed=10) / width**0.5
        self.bias = inputs.tokens([columns], dtype=kind, seed=11)
        self.activation = "gelu" if first else None
        self.residual = None if first else inputs.tokens([capacity], columns, dtype=kind, seed=12)
        self.cu = torch.tensor([0, self.rows], dtype=torch.int32, device=DEVICE)
        self.gflop = 2 * self.rows * columns * width / 1e9

    def ours(self, rows: slice = slice(None), backend: str | None = None):
        residual = None if self.residual is None else self.residual[rows]
        return linear(
            self.x[rows],
            self.weight,
            self.bias,
            self.cu,
            activation=self.activation,
            residual=residual,
            backend=backend,
        )

    def grouped(self):
        """PyTorch's product with row counts on the device, as one group; the rest in passes of their own."""
        out = F.grouped_mm(self.x, self.weight.mT[None], offs=self.cu[-1:]).add_(self.bias)
        return F.gelu(out) if self.activation else out.add_(self.residual)

    def candidates(self) -> dict:
        name = "linear + GELU" if self.activation else "linear + residual"
        candidates = {
            name: self.ours,
            "F.linear over the buffer": lambda: self.ours(backend="reference"),
            "F.linear over the tokens": lambda: self.ours(slice(self.rows), backend="reference"),
        }
        if self.x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
            candidates["grouped_mm"] = self.grouped
        return candidates

    def check(self) -> None:
        wide = {n: None if t is None else t.float() for n, t in vars(self).items() if n in ("x", "residual")}
        exact = F.linear(wide["x"][: self.rows], self.weight.float(), self.bias.float())
        exact = F.gelu(exact) if self.activation else exact + wide["residual"][: self.rows]
        ours, *others = (call()[: self.rows] for call in self.candidates().values())
        for theirs in others:
            require(theirs, exact, 0.02, "PyTorch's linear layer")
        require(ours, exact, 2 * relative_error(others[0], exact) + ROUNDING, "linear")


@pytest.mark.skipif(not ON_GPU, reason="on a CPU the number of tokens is known, and buffers are as large as that")
@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("dtype, first", [("bfloat16", True), ("bfloat16", False), ("float32", True)])
def test_linear(run, dtype, first, share):
    data = Multiplied(dtype, MAIN, share, first)
    candidates = data.candidates()
    subject, goals = next(iter(candidates)), ()
    if dtype == "bfloat16":
        at_most = {1.0: 1.1, 0.5: 0.6, 0.2: 0.3}[share]
        goals = (Goal(subject, "F.linear over the buffer", at_most),)
    facts = {"dtype": dtype, "batch": f"{MAIN}, {share:.0%} in use"}
    run(Comparison("linear", candidates, data.check, facts, gflop=data.gflop, goals=goals))


@pytest.fixture
def dense_layer():
    """A ViT-B block without pruning on tokens of these lengths, as a call."""
    from blocks import dense_call, vision_transformer

    def make(dtype: str, lengths: list[int]):
        x = inputs.tokens(lengths, inputs.WIDTH, dtype=DTYPES[dtype], seed=8)
        return dense_call(vision_transformer(dtype, depth=1).blocks[0], inputs.packed(x, lengths))

    return make
