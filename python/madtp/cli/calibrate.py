"""`madtp calibrate`: make a model cost less without training it."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, replace
from pathlib import Path

import numpy as np

import madtp

from ..compress.calibrate import calibrate_rule, freeze_all_but_dictionary, read_pairs
from ..compress.loaders import steps_per_epoch
from ..compress.settings import Settings
from ..compress.train import train
from ..files import write_json
from ..options import UsageError, above_zero, given, option, positive, same, share
from ..processes import joined
from ..pruning import METHODS, MergingPruning, rule_named
from ..tasks import TASKS
from .options import Command, only_with
from .training import TrainingOptions, begin, load_source, origin, report

MERGING = [name for name, rule in METHODS.items() if issubclass(rule, MergingPruning)]
"""Rules that have limits to calibrate."""
_RECORD = "calibration.json"
_LEARNING = ("steps", "lr", "dictionary", "distill", "precision", "workers", "save_every", "log_every")
_EXAMPLES = """\
examples:
  madtp calibrate --model model_base_retrieval_coco.pth --pairs pairs.jsonl --reduction 0.3 --output retrieval-0.3
  madtp calibrate --model DIR --pairs pairs.jsonl --reduction 0.5 --use-sizes --output DIR-0.5 --device cuda
  madtp calibrate --model DIR --pairs pairs.jsonl --reduction 0.4 --method ranked_novelty --output DIR-0.4

a row of pairs.jsonl (paths are relative to the file; "sentence", "question", "caption" may stand for "text"):
  {"image": "dog.jpg", "text": "a dog on a beach"}
  {"images": ["left.jpg", "right.jpg"], "text": "Both images show a dog."}    (nlvr)

Only the dictionary learns, by the alignment of pictures with texts; the model's own weights stay, so that no labels
are needed, and little time. The temperature is then set so that the target is met on up to 256 of the pairs. It costs
more accuracy than `madtp compress`. More learning is not better: entries that grow alike see the same few tokens, which
puts low reductions out of reach; where the target was missed, the exit code is 1. Captioning has no text to align. The
same command goes on after an interruption.

With --method nothing learns: the rule's limit for each layer is set so that the target is met, in seconds to minutes.
20 to 40 pairs choose how the tokens that go are spread over the layers, by what is left of the image features; all
pairs meet the target. Inputs save more or less than their mean (the spread is printed): 200 tell it to within 1 %.

A model that was never pruned begins with a dictionary of its own tokens, drawn from up to 64 pairs: with random
entries even the lowest temperature drops about half of the tokens.
"""


@dataclass(kw_only=True)
class Calibrate(Command, TrainingOptions):
    """The command."""

    name = "calibrate"
    help = "prune a model without training it, from pairs without labels"
    description = "Learn only the dictionary and the temperature for a target, from image-text pairs without labels."
    examples = _EXAMPLES

    pairs: str = option("pictures and texts, one JSON object per line", MISSING, metavar="JSONL")
    image_root: str | None = option("where paths start (default: the folder of the pairs)", metavar="DIR")
    reduction: float | None = option("share of the GFLOPs to save, as 0.3", type=share, exclusive="target")
    keep_ratio: float | None = option(
        "share of the GFLOPs to keep, as 0.7", type=share, metavar="R", exclusive="target"
    )
    target_gflops: float | None = option(
        "GFLOPs of an instance (with --method)", type=above_zero, metavar="G", exclusive="target"
    )
    method: str | None = option("set the limits of this rule (default: learn the dictionary of MADTP)", choices=MERGING)
    inputs: int | None = option(
        "with --method: pairs that choose a schedule (default: 40)", None, type=positive, metavar="N"
    )
    steps: int = same(
        Settings, "steps", 100, help="steps of the optimiser, rounded up to whole epochs", group="learning"
    )
    batch_size: int = same(Settings, "batch_size", 16, help="pairs per process and step", group="learning")
    lr: float = same(Settings, "lr", 1e-3, group="learning")
    dictionary: str | None = same(Settings, "dictionary")
    distill: float = same(Settings, "distill")
    precision: str = same(Settings, "precision")
    seed: int = same(Settings, "seed")

    def run(self) -> int:
        """Learn the dictionary, or go on, and save the model."""
        if (self.reduction, self.keep_ratio, self.target_gflops) == (None, None, None):
            raise UsageError("one of --reduction, --keep-ratio, --target-gflops is required")
        if self.method is not None:
            self._refuse_learning()
        only_with(self, self.method is not None, "without --method", "inputs", "target_gflops")
        limits = {} if self.method is None else {"record": _RECORD}
        begin(self, self.pairs, **limits)
        if self.keep_ratio is not None:
            self.reduction = 1 - self.keep_ratio
        if self.method is not None:
            return self._set_limits()
        with joined(self.device) as device:
            model = load_source(self, self.task, device)
            name = model.config.task
            if not TASKS[name].aligned:
                raise ValueError(
                    f"{self.model}: holds a model for task {name!r}, which has no text to align pictures with"
                )
            source = origin(self, model, self.pairs)
            freeze_all_but_dictionary(model)
            pairs = read_pairs(self.pairs, name, self.image_root)
            per_epoch = steps_per_epoch(len(pairs), self.batch_size, 1)
            if per_epoch > self.steps:  # no more pairs than the steps take, from all over the file
                order = np.random.default_rng(self.seed).permutation(len(pairs))
                pairs = [pairs[number] for number in order[: len(pairs) * self.steps // per_epoch]]
                per_epoch = self.steps
            settings = Settings(
                reduction=self.reduction, epochs=-(-self.steps // per_epoch), batch_size=self.batch_size, lr=self.lr,
                weight_decay=0.0, alignment=1.0, distill=self.distill, dictionary=self.dictionary, schedule="step",
                precision=self.precision, labels=False, seed=self.seed,
            )  # fmt: skip
            result = train(
                model, TASKS[name](model), pairs, pairs, settings, self.output, origin=source, workers=self.workers,
                save_every=self.save_every, log_every=self.log_every, progress=False if self.quiet else None,
            )  # fmt: skip
            return report(result, self)

    def _refuse_learning(self) -> None:
        """Options of learning, which would be without effect."""
        fields = type(self).__dataclass_fields__
        names = [name for name in _LEARNING if getattr(self, name) != fields[name].default]
        if names:
            raise UsageError(f"{given(self, names)}: with --method nothing learns")

    def _set_limits(self) -> int:
        """Set the limits of a rule, save the model and what is known of the calibration."""
        model = load_source(self, self.task, self.device)
        rule = rule_named(self.method)
        if self.use_sizes:
            rule = replace(rule, proportional_attention=True)
        pairs = read_pairs(self.pairs, model.config.task, self.image_root)
        found = calibrate_rule(
            model, pairs, rule, self.reduction, target_gflops=self.target_gflops, inputs=self.inputs or 40,
            batch_size=self.batch_size,
        )  # fmt: skip
        model.pruning = found.rule
        record = {"model": self.model, "pairs": self.pairs, **found.to_dict()}
        write_json(Path(self.output) / _RECORD, record)  # first: it tells whose model is in the folder
        madtp.save_pretrained(model, self.output)
        print(f"{self.method}, schedule {found.schedule}: {found.gflops:.4g} GFLOPs of {found.dense_gflops:.4g}")
        print(
            f"saved on {found.inputs} inputs: {found.saving:.1%} (expected on others: within {found.uncertainty:.1%})"
        )
        if found.uncertainty > 0.01:
            print(f"to meet a target to within 1% on others, give about {found.inputs_for(0.01)} inputs")
        print(f"saved by one input: {found.least:.1%} to {found.most:.1%}, standard deviation {found.deviation:.1%}")
        print(f"cosine to dense features: {found.cosine:.5f}, tenth percentile {found.cosine_p10:.5f}")
        print(self.output)
        return 0
