"""The task of shapes as the trainer takes it: batches drawn in memory, and for the dense model what makes it learn at
all.

Plain classification stays at chance for a very long time. What makes it learn: first the image encoder alone tells,
for each patch, which shape and colour lies there; then the statements come, simple templates first, and the text
encoder also tells the two counts that a statement is about, and has one head of its cross-attention shown where to
look. The heads for that are dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp.data.synthetic import COLOURS, MAX_COUNT, SHAPES, TEMPLATES, Batch, Shapes
from madtp.pruning import Pruning
from madtp.tasks.nlvr import NLVRTask
from madtp.tasks.nlvr.model import NLVR, NLVROutput
from madtp_kernels import RaggedBatch

STATEMENTS = 8
"""About each pair, wherever statements are answered."""


def as_batch(drawn: Batch) -> dict:
    """A drawn batch as the task of the package has it; what was drawn along is under "drawn"."""
    ids, lengths = drawn.input_ids.flatten(0, 1), drawn.lengths.flatten().tolist()
    return {
        "pixels": drawn.pixels,
        "texts": [row[:length] for row, length in zip(ids, lengths, strict=True)],
        "labels": drawn.labels.flatten(),
        "statements": [drawn.input_ids.shape[1]] * len(drawn.input_ids),
        "drawn": drawn,
    }


class Stage(NamedTuple):
    """A part of the dense model's training."""

    until: int
    """Step at which it ends."""
    templates: tuple[str, ...]
    """Of its statements. Without any, the image encoder learns alone."""
    pairs: int
    """Per step."""
    statements: int
    """Per pair."""
    images: bool
    """Whether the image encoder learns. Where it does not, a step costs less than half, and the text encoder, which
    takes longest to find out what it is there for, sees as many statements."""
    guided: bool
    """Whether a head of the cross-attention is shown where to look. Without it answers stay at chance."""


SIMPLE = ("exist", "both", "neither", "only")
STAGES = (
    Stage(500, (), 16, 0, True, False),
    Stage(850, SIMPLE, 16, 8, True, False),
    Stage(1150, SIMPLE, 8, 16, False, True),
    Stage(1750, (*SIMPLE, "count", "at least", "more"), 8, 16, False, True),
    Stage(2000, TEMPLATES, 8, 16, False, True),
    Stage(2900, TEMPLATES, 16, 8, True, True),
)


class Drawn(Sequence):
    """Batches of pairs, each of them one example, which the task draws when it is needed."""

    def __init__(self, shapes: Shapes, stages: Sequence[Stage], pairs: int = 16) -> None:
        self.shapes, self.stages, self.pairs = shapes, stages, pairs

    def __len__(self) -> int:
        return self.stages[-1].until

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        stage = next(stage for stage in self.stages if number < stage.until)
        return self.shapes, range(number * self.pairs, number * self.pairs + stage.pairs), stage


class Heads(nn.Module):
    """What is learnt beside the answers; not part of the model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, 1 + len(SHAPES) + 1 + len(COLOURS) + 2)
        self.count = nn.Linear(width, 2 * (1 + MAX_COUNT))


class DenseTask(NLVRTask):
    """The answers, and in training what the heads and the looks of the cross-attention should be."""

    def __init__(self, model: NLVR) -> None:
        super().__init__(model)
        self.auxiliary = Heads(model.config.vision.embed_dim)

    def instance(self, example, random=None):
        shapes, indices, stage = example
        drawn = shapes.batch(indices, stage.statements, stage.templates or TEMPLATES)
        return as_batch(drawn) | {"stage": stage}

    def collate(self, instances):
        (batch,) = instances
        return batch

    def places(self, batch, numbers):
        return [(*numbers, statement) for statement in range(len(batch["texts"]))]

    def forward(self, model, batch, pruning, alignment_features=False):
        stage = batch["stage"]
        if not torch.is_grad_enabled() or (stage.images and not stage.guided and stage.statements):
            return super().forward(model, batch, pruning, alignment_features)
        with torch.set_grad_enabled(stage.images):
            images = model.visual_encoder(batch["pixels"], None, Pruning())
        if not stage.statements:
            return NLVROutput(None, images.trace, [], images.tokens, None)
        batch["looks"] = looks = []
        hooks = [
            layer.crossattention.register_forward_pre_hook(lambda module, args: looks.append(look(module, *args[:2])))
            for layer in model.text_encoder.encoder.layer
        ]
        try:
            texts = RaggedBatch.from_list(batch["texts"]).to(model.device)
            return model.read(images, texts, batch["statements"], Pruning())
        finally:
            for hook in hooks:
                hook.remove()

    def streams(self, output, batch=None):
        return super().streams(output, batch) if output.text else ([], [], [])  # no statement costs anything

    def loss(self, model, batch, output, pruning, seed):
        stage, drawn, terms = batch["stage"], batch["drawn"], {}
        images = output.image_embeds.values.unflatten(0, (len(batch["pixels"]), -1))  # nothing is pruned
        if stage.images:
            terms["patch"] = (0.7 if stage.templates else 1.0) * patch_loss(self.auxiliary, images, drawn)
        if stage.statements:
            terms |= super().loss(model, batch, output, pruning, seed)
            first = output.last_hidden_state.values[output.last_hidden_state.cu_seqlens[:-1].long()]
            counts = self.auxiliary.count(first).float().unflatten(-1, (-1, 1 + MAX_COUNT))
            terms["count"] = 0.8 * F.cross_entropy(counts.flatten(0, 1), drawn.counts.flatten())
        if stage.guided:
            terms["look"] = 0.5 * look_loss(torch.stack(batch.pop("looks")), drawn)
        return terms


def patch_loss(heads: Heads, images: Tensor, drawn: Batch) -> Tensor:
    """Shape, colour, and whether an object begins, for each patch. Empty patches are many, and weigh less.

    ``images [2P, N + 1, D]`` are the final image tokens.
    """
    logits = heads.patch(images[:, 1:]).float().flatten(0, 1)
    total = logits.new_zeros(())
    targets = (drawn.patch_shapes, drawn.patch_colours, drawn.patch_anchors)
    for part, target in zip(logits.split((1 + len(SHAPES), 1 + len(COLOURS), 2), -1), targets, strict=True):
        weight = torch.tensor([0.3] + [1.0] * (part.shape[-1] - 1))
        total = total + F.cross_entropy(part, target.flatten(), weight)
    return total


def look(cross: nn.Module, x, images) -> Tensor:
    """Where the first head of a cross-attention looks from the first word of each statement: logits
    ``[2P, K, N + 1]``."""
    first, sides = x.values[x.cu_seqlens[:-1].long()], []
    for attention, image in zip((cross.self0, cross.self1), images, strict=True):
        width, pairs = attention.query.out_features // attention.num_heads, image.batch_size
        q = F.linear(first, attention.query.weight[:width], attention.query.bias[:width]).unflatten(0, (pairs, -1))
        k = F.linear(image.values, attention.kv.weight[:width], attention.kv.bias[:width]).unflatten(0, (pairs, -1))
        sides.append(q * width**-0.5 @ k.mT)
    return torch.cat(sides)


def look_loss(looks: Tensor, drawn: Batch) -> Tensor:
    """One cross-attention head of each layer but the first, ``looks [layers, 2P, K, N + 1]``: equally at CLS and at
    each object in question. The more objects there are the less is left for CLS, which is a way to count them.
    """
    target = F.pad(drawn.relevant.float(), (1, 0), value=1.0)
    target = target / target.sum(-1, keepdim=True)
    return -(target * looks[1:].float().log_softmax(-1)).sum(-1).mean()
