"""`madtp compress`: fine-tune a dense model so that it costs less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace

from ..compress.examples import DRAWN, read_examples
from ..compress.settings import Settings
from ..compress.train import train
from ..fingerprint import fingerprint
from ..options import UsageError, option, positive, same, unset
from ..processes import joined
from ..tasks import TASKS
from .options import Command, only_with
from .training import TrainingOptions, begin, chosen_rule, load_source, origin, report

_EXAMPLES = """\
examples:
  madtp compress --task nlvr --model model_base_nlvr.pth --image-root NLVR2/ --annotations nlvr_train.json \\
      --dev nlvr_dev.json --reduction 0.8 --output nlvr-0.8 --device cuda --precision bfloat16
  torchrun --nproc-per-node 8 -m madtp compress --task vqa --model DIR --image-root COCO/ \\
      --annotations vqa_train.json --dev vqa_val.json --reduction 0.5 --output vqa-0.5 --device cuda
  madtp compress --model demo-dense --annotations shapes:train --dev shapes:dev --texts 8 --steps 1000 --warmup 50 \\
      --lr 5e-4 --distill 1 --method ranked_novelty --shares 0.3 0.3 0.1 --reduction 0.7 --output shapes-0.7
  madtp nlvr --model nlvr-0.8 --images left.jpg right.jpg --text "Both images show a dog."

Annotations are in the formats that BLIP ships: nlvr_*.json, vqa_*.json, coco_karpathy_*.json, flickr30k_*.json
(docs/annotations.md shows a record of each), or the pairs.jsonl that `madtp demo` writes.
The loss is the task's plus 0.1 times the alignment of both modalities (captioning has no text to align). The best
epoch is chosen on the dev split, and the temperature is set there so that the target is met. The same command
goes on after an interruption and gives the same model (to the bit on a CPU). With torchrun a step takes
--batch-size x --accumulate instances of each process; several machines have to share the output folder.

--method names the rule that prunes: madtp (default), madtp_nearest, ranked_novelty, tome, atm, pitome, evit, topk or random. For
rules with a limit per layer --shares says what share of the tokens each vision layer drops, and thresholds follow the
batch; at the end they are taken anew from the dev split, without its labels.
--texts 8 trains on up to eight statements about a pair of pictures at a time (nlvr), whose pictures are then encoded
once. "shapes:train" and "shapes:dev" instead of files are pairs of shapes, drawn as they are needed (docs/compress.md).

A model that was never pruned begins with a dictionary of its own tokens, drawn from up to 64 training examples: with
random entries even the lowest temperature drops about half of the tokens. --distill 1 also pulls the tokens that
survive towards what they are without pruning; that takes one more forward per batch, without gradient, and a second
copy of the weights. On the small model of experiments/shapes it helped much. A model that is pruned already can go
on to a lower cost with --teacher, the dense one.

Retrieval and clip train with the negatives of the batch, without MADTP's momentum encoders and queue.
The exit code is 1 where the target was missed. Training has no dropout and no stochastic depth.
"""


@dataclass(kw_only=True)
class Compress(Command, TrainingOptions, unset(Settings)):
    """The command. Of the settings, what is not given is the task's, or the default."""

    name = "compress"
    help = "fine-tune a dense model to a share of its GFLOPs"
    description = "Fine-tune a dense model with pruning, to a target reduction of its GFLOPs."
    examples = _EXAMPLES

    reduction: float = same(Settings, "reduction")
    annotations: str = option("of the training split, or shapes:train", MISSING, metavar="JSON")
    dev: str = option("of the split for choices, or shapes:dev", MISSING, metavar="JSON")
    image_root: str | None = option("where paths in the annotations start", metavar="DIR")
    image_size: int | None = option(
        "train at another size; positions are interpolated", type=positive, metavar="PIXELS"
    )
    teacher: str | None = option(
        "with --distill: another model without pruning, whose tokens those that survive are pulled to (default: the model "
        "as the run begins)", metavar="SOURCE", group="pruning",
    )  # fmt: skip
    method: str | None = option(
        "the rule that prunes (default: the model's, or madtp)", metavar="NAME", group="pruning"
    )
    rule: Sequence[str] | None = option(
        "a setting of the rule; may be given again", action="append", metavar="NAME=VALUE", group="pruning"
    )
    streams: Sequence[str] | None = option(
        "which tokens are pruned (default: as the rule has it)", nargs="+", choices=["vision", "text"], group="pruning"
    )

    def run(self) -> int:
        """Train, or go on, and save the model."""
        only_with(self, self.controller != "official", "with --controller official", "ramp")
        only_with(self, self.epochs is None, "with --epochs", "steps")
        only_with(self, bool(self.distill), "without --distill", "teacher")
        if self.image_root is None and not all(path.startswith(DRAWN) for path in (self.annotations, self.dev)):
            raise UsageError("--image-root: needed where annotations are files")
        begin(self, self.annotations, self.dev)
        with joined(self.device) as device:
            model = load_source(self, self.task, device)
            source = origin(self, model, self.annotations, self.dev)
            teacher = None
            if self.teacher is not None:
                teacher = load_source(replace(self, model=self.teacher), model.config.task, device)
                source["teacher"] = fingerprint(teacher)
            task = TASKS[model.config.task](model)
            only_with(self, task.aligned, f"for {task.name}, which has no text to align pictures with", "alignment")
            keeps = "keep" if model.guided else "tokens"  # before another rule takes the place of the model's
            model.pruning = chosen_rule(model.pruning, self)
            chosen = {name: getattr(self, name, None) for name in Settings.names()}
            chosen = {name: value for name, value in chosen.items() if value is not None}
            if self.steps is not None:
                chosen.setdefault("schedule", "step")
            recipe = dict(zip(("epochs", "batch_size", "lr", "weight_decay"), task.recipe))
            settings = Settings(**{**recipe, "dictionary": keeps, **chosen})
            examples = read_examples(task, self.annotations, self.image_root, settings.texts, training=True)
            dev = read_examples(task, self.dev, self.image_root, settings.texts, training=False)
            result = train(
                model, task, examples, dev, settings, self.output, teacher=teacher, origin=source, workers=self.workers,
                save_every=self.save_every, log_every=self.log_every, progress=False if self.quiet else None,
            )  # fmt: skip
            return report(result, self)
