"""`madtp demo`: answers, accuracy, cost and time of a dense and a pruned model, on pairs new to both."""

from __future__ import annotations

import copy
import dataclasses
import json
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from ..data.synthetic import TEMPLATES, Shapes
from ..files import check_output, replacing
from ..options import option, positive
from ..pruning import Pruning
from ..report.overlay import overlays
from ..tasks import task_of
from .options import Command, RunOptions, grouping, load_model

_BATCH = 32  # pairs that are answered at once
_TIMED_BATCHES = (1, 64)
_ANSWER_SECONDS = 20.0
_LONGEST_CALL = 8.0  # seconds; batches that would take longer are not timed
_TIMING_SECONDS, _FEWEST_ROUNDS, _MOST_ROUNDS = 4.0, 3, 30
_LABEL, _COLUMN = 36, 12  # widths in the tables of figures

_BUNDLED = """\
A small BLIP-NLVR model that has learnt to tell whether a statement about two pictures of shapes is true
(dense), and the same model fine-tuned to carry on only the tokens that matter (pruned). Neither has seen
these pictures. Numbers are the probability of True."""
_RANDOM = """\
NOTE: the weights of this model are random, its answers mean nothing. What it shows is the pruning: what is
kept, what that costs, how long it takes."""
_REAL_SIZE = """
A model this small spends much of its time on what pruning does not save. The real size, with random weights
(a minute or two on a CPU): madtp demo --model random:base --temperature 8"""
_OTHER = "{model} without pruning and with {rule} of strength {strength:g}. Numbers are the probability of True."


@dataclass
class _Question:
    """A statement about a pair of pictures, whether it is true, and what the model is given of both."""

    images: list
    sentence: str
    truth: bool
    instance: tuple


@dataclass(kw_only=True)
class _DemoOptions:
    model: str = option(
        "another NLVR model, dense and pruned on the same weights, such as random:base", "demo", metavar="SOURCE"
    )
    temperature: float | None = option(
        "pruning temperature, higher prunes more (default: the model's)", type=float, metavar="T"
    )
    pairs: int = option(
        "held-out pairs to measure accuracy and cost on, fewer if those take too long", 256, type=positive, metavar="N"
    )
    output_dir: str = option("where pictures and statements go, and the overlay", "demo-output", metavar="DIR")


@dataclass(kw_only=True)
class Demo(Command, RunOptions, _DemoOptions):
    """Dense and pruned models, side by side."""

    name = "demo"
    help = "small trained models, dense and pruned, on pictures of shapes"
    description = (
        "Answers statements about pictures of shapes, dense and pruned; compares accuracy, cost and time. Less than a "
        "minute, nothing to download."
    )

    grouping: str = grouping(("instance", "pair", "batch"))

    def run(self) -> int:
        directory = Path(self.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        check_output(directory / "pairs.jsonl", option="--output-dir")
        split = Shapes("test")
        asked = [split.pair(index, 1, [template]).statements[0] for index, template in enumerate(TEMPLATES)]
        _refuse_others(directory, [(statement.sentence, statement.label) for statement in asked])
        trained = self.model != "random:base"
        models = _, pruned = self._models(trained)
        samples = [_question(pruned, split, index, [template]) for index, template in enumerate(TEMPLATES)]
        answers, outputs = zip(*(_ask(model, samples) for model in models), strict=True)
        _print_answers(samples, answers)
        first = answers[1][0]
        questions = samples
        if trained:
            questions, answers = _answer(models, split, self.pairs, self.quiet)
        _print_costs(questions, answers, accuracy=trained)
        _print_times(models, [question.instance for question in questions], self.dtype)
        if self.model == "demo":
            print(_REAL_SIZE)
        self._write(directory, samples, pruned, outputs[1], first)
        return 0

    def _models(self, trained: bool) -> tuple:
        """The dense model and the pruned one."""
        pruned = load_model(self, ["nlvr"])
        if not pruned.pruning.active:
            raise ValueError(f"{self.model} comes without pruning: give a temperature, for example --temperature 5")
        if self.model == "demo":
            dense = load_model(dataclasses.replace(self, model="demo-dense", temperature=0.0), ["nlvr"])
            print(_BUNDLED)
        else:
            dense = copy.copy(pruned)  # on the same weights
            dense.pruning = Pruning()
            rule = pruned.pruning
            print(_OTHER.format(model=self.model, rule=rule.name, strength=rule.strength) if trained else _RANDOM)
        return dense, pruned

    def _write(self, directory: Path, samples: list[_Question], model, output, answer) -> None:
        """Statements and pictures, as `madtp nlvr --input` and `madtp evaluate --annotations` read them, and the overlay of
        the first pair; says how to ask again."""
        # First the statements: they tell the folder of a demo, also of one that was stopped.
        with replacing(directory / "pairs.jsonl") as file:
            file.write(_lines([(sample.sentence, sample.truth) for sample in samples]))
        for number, sample in enumerate(samples):
            for name, image in zip(_names(number), sample.images, strict=True):
                image.save(directory / name)
        picture, pairs = directory / "overlay.png", directory / "pairs.jsonl"
        title = f"{samples[0].sentence}  The model says: {answer.answer}"
        places = 0, len(samples)
        overlays(samples[0].images, output.vision, model.config, places, height=240, title=title).save(picture)
        print(f"\n{picture}: the patches of the first pair that survive each layer")
        print(f"{pairs}: pairs and statements, to ask again:")
        images = shlex.join(str(directory / name) for name in _names(0))
        options = shlex.join(["--model", self.model, *self._given()])
        print(f"  madtp nlvr {options} --images {images} \\")
        print(f"      --text {shlex.quote(samples[0].sentence)}")
        print(f"  madtp evaluate {options} --annotations {shlex.quote(str(pairs))}")

    def _given(self) -> list[str]:
        """The options that answers depend on, where they are not the default."""
        names = ("temperature", "device", "dtype", "backend", "grouping", "tokenizer", "threads")
        given = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(Demo, name)}
        return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def _ask(model, questions: list[_Question]) -> tuple:
    """Answers, and the model's output."""
    return task_of(model).answer(model, [question.instance for question in questions])


def _question(model, split, index: int, templates) -> _Question:
    pair = split.pair(index, 1, templates)
    (statement,) = pair.statements
    images = [Image.fromarray(image) for image in pair.images]
    return _Question(images, statement.sentence, statement.label, model.processor(*images, statement.sentence))


def _answer(models, split, pairs: int, quiet: bool) -> tuple[list[_Question], list[list]]:
    """What the models answer to one statement about each of so many pairs, or fewer if it takes too long."""
    questions, answers = [], [[] for _ in models]
    begin = time.perf_counter()
    with tqdm(total=pairs, desc="held-out pairs", unit=" pairs", leave=False, disable=quiet or None) as bar:
        while len(questions) < pairs and time.perf_counter() - begin < _ANSWER_SECONDS:
            indices = range(len(questions), min(len(questions) + _BATCH, pairs))
            batch = [_question(models[0], split, index, TEMPLATES) for index in indices]
            for model, mine in zip(models, answers, strict=True):
                mine += _ask(model, batch)[0]
            questions += batch
            bar.update(len(batch))
    return questions, answers


def _print_answers(questions: list[_Question], answers) -> None:
    width = max(len(question.sentence) for question in questions)
    print(f"\n{'':{width}}  truth  dense             pruned")
    for question, *both in zip(questions, *answers, strict=True):
        dense, pruned = (
            f"{answer.answer!s:5} {answer.probability_true:.2f}{' wrong' * (answer.answer != question.truth)}"
            for answer in both
        )
        print(f"{question.sentence:{width}}  {question.truth!s:5}  {dense:16}  {pruned}")
    print(flush=True)


def _row(label: str, *columns: str) -> None:
    """A label, what is dense and what is pruned, and a remark that may be left out."""
    dense, pruned, remark = (*columns, "")[:3]
    print(f"{label:{_LABEL}}{dense:{_COLUMN}}{pruned:{_COLUMN}}{remark}".rstrip(), flush=True)


def _print_costs(questions: list[_Question], answers, *, accuracy: bool) -> None:
    """Accuracy, if the models know anything, GFLOPs, and tokens before the first layer and after each."""
    pairs = len(questions)
    _row(f"{pairs} held-out pairs", "dense", "pruned")
    if accuracy:
        right = [sum(a.answer == q.truth for a, q in zip(mine, questions, strict=True)) for mine in answers]
        shares = [count / pairs for count in right]
        error = max((share * (1 - share) / pairs) ** 0.5 for share in shares)
        _row("right answers", *(f"{share:.1%}" for share in shares), f"give or take {100 * error:.1f} points")
    before, after = (statistics.mean(answer.flops.official for answer in mine) for mine in answers)
    remark = f"{1 - after / before:.0%} fewer: {before / after:.2f}x"
    _row("GFLOPs per pair", f"{before:.4g}", f"{after:.4g}", remark)
    images = [tokens for answer in answers[1] for tokens in (answer.left_tokens, answer.right_tokens)]
    texts = [answer.text_tokens for answer in answers[1]]
    for label, counts in (("tokens of an image, layer by layer", images), ("tokens of a statement", texts)):
        first, *layers = (statistics.mean(layer) for layer in zip(*counts, strict=True))
        _row(label, f"{first:.1f}", " ".join(f"{count:.1f}" for count in layers))
    print(flush=True)


def _print_times(models, instances: list[tuple], dtype: str) -> None:
    device, threads = models[0].device, torch.get_num_threads()
    where = f"{threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else str(device)
    _row(f"ms per pair ({dtype}, {where})", "dense", "pruned")
    most = len(instances)
    for batch in _TIMED_BATCHES:
        size = min(batch, most)
        if size < min(batch, 2):
            break
        seconds = _time(models, instances, size)
        most = min(most, int(_LONGEST_CALL / max(seconds)))
        ratio = seconds[0] / seconds[1]
        remark = f"{ratio:.2f}x{'' if ratio >= 1 else ', slower'}"
        _row(f"batch of {size}", *(f"{1000 * second:.1f}" for second in seconds), remark)


def _time(models, instances: list[tuple], size: int) -> list[float]:
    """Median seconds per pair of each model, in alternation so that all see the same machine."""

    def seconds(model, batch) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            model(*batch)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - begin

    starts = range(0, len(instances) - size + 1, size)
    batches = cycle([models[0].processor.collate(instances[start : start + size]) for start in starts])
    for model in models:  # warm up
        seconds(model, next(batches))
    times: list[list[float]] = [[] for _ in models]
    end = time.perf_counter() + _TIMING_SECONDS
    while len(times[0]) < _FEWEST_ROUNDS or (len(times[0]) < _MOST_ROUNDS and time.perf_counter() < end):
        batch = next(batches)
        for model, mine in zip(models, times, strict=True):
            mine.append(seconds(model, batch))
    return [statistics.median(mine) / size for mine in times]


def _names(number: int) -> list[str]:
    return [f"{number}-{side}.png" for side in ("left", "right")]


def _lines(statements: Sequence[tuple[str, bool]]) -> bytes:
    """What `pairs.jsonl` holds of statements and whether they are true."""
    rows = ({"images": _names(n), "text": text, "label": str(truth)} for n, (text, truth) in enumerate(statements))
    return b"".join((json.dumps(row) + "\n").encode() for row in rows)


def _refuse_others(directory: Path, statements: Sequence[tuple[str, bool]]) -> None:
    """Raise ValueError if files in the folder would be replaced that are not those of an earlier demo."""
    pairs = directory / "pairs.jsonl"
    if pairs.exists() and pairs.read_bytes() == _lines(statements):
        return
    names = ["pairs.jsonl", "overlay.png", *(name for n in range(len(statements)) for name in _names(n))]
    there = next((name for name in names if (directory / name).exists()), None)
    if there is not None:
        raise ValueError(f"--output-dir: {directory / there} is not from this demo; remove it, or name another folder")
