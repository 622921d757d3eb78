"""`madtp demo`: answers, accuracy, cost and time of a dense and a pruned model, on pairs new to both."""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import time
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from ..files import check_output, replacing
from .options import add_model_options, load_model, positive

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
_OTHER = "{model} without pruning and at temperature {temperature:g}. Numbers are the probability of True."


@dataclass
class _Question:
    """A statement about a pair of pictures, whether it is true, and what the model is given of both."""

    images: list
    sentence: str
    truth: bool
    instance: tuple


@dataclass
class _Tally:
    """Answers of one model, with their costs."""

    right: int = 0
    gflops: list[float] = field(default_factory=list)
    image_tokens: list[list[int]] = field(default_factory=list)
    text_tokens: list[list[int]] = field(default_factory=list)

    def add(self, questions, answers) -> None:
        for question, answer in zip(questions, answers, strict=True):
            self.right += answer.answer == question.truth
            self.gflops.append(answer.flops.official)
            self.image_tokens += [answer.left_tokens, answer.right_tokens]
            self.text_tokens.append(answer.text_tokens)


def add_parser(commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "demo",
        help="small trained models, dense and pruned, on pictures of shapes",
        description="Answers statements about pictures of shapes, dense and pruned; compares accuracy, cost "
        "and time. Less than a minute, nothing to download.",
    )
    parser.add_argument(
        "--model",
        default="demo",
        metavar="SOURCE",
        help="another NLVR model, dense and pruned on the same weights, such as random:base",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="pruning temperature, higher prunes more (default: the model's)",
    )
    parser.add_argument(
        "--pairs",
        type=positive,
        default=256,
        metavar="N",
        help="held-out pairs to measure accuracy and cost on (default: 256; fewer if those take too long)",
    )
    parser.add_argument(
        "--output-dir",
        default="demo-output",
        metavar="DIR",
        help="where pictures and statements go, and the overlay (default: demo-output)",
    )
    add_model_options(parser, groupings=("instance", "pair", "batch"), temperature=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer statements, dense and pruned, and print what that took."""
    from ..data.synthetic import TEMPLATES, Shapes
    from ..predict import nlvr_batch
    from ..report.overlay import nlvr_overlay

    directory = Path(args.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    check_output(directory / "pairs.jsonl", option="--output-dir")
    trained = args.model != "random:base"
    pruned = load_model(args, ["nlvr"])
    if not pruned.temperature:
        raise ValueError(
            f"{args.model} comes without a pruning temperature: give one, for example --temperature 5"
        )
    if args.model == "demo":
        settings = {**vars(args), "model": "demo-dense", "temperature": 0.0}
        dense = load_model(argparse.Namespace(**settings), ["nlvr"])
        print(_BUNDLED)
    else:
        dense = copy.copy(pruned)  # on the same weights
        dense.temperature = 0.0
        print(_OTHER.format(model=args.model, temperature=pruned.temperature) if trained else _RANDOM)
    models = (dense, pruned)

    split = Shapes("test")
    samples = [_question(pruned, split, index, [template]) for index, template in enumerate(TEMPLATES)]
    answers, outputs = zip(*(nlvr_batch(m, [s.instance for s in samples]) for m in models), strict=True)
    _print_answers(samples, answers)
    if trained:
        questions, tallies = _answer(models, split, args.pairs, args.quiet)
    else:
        questions, tallies = samples, [_Tally() for _ in models]
        for tally, mine in zip(tallies, answers, strict=True):
            tally.add(samples, mine)
    _print_costs(tallies, len(questions), accuracy=trained)
    _print_times(models, [question.instance for question in questions], args.dtype)
    if args.model == "demo":
        print(_REAL_SIZE)

    _write(directory, samples)
    picture = directory / "overlay.png"
    title = f"{samples[0].sentence}  The model says: {answers[1][0].answer}"
    nlvr_overlay(*samples[0].images, outputs[1], pruned.config, height=240, title=title).save(picture)
    print(f"\n{picture}: the patches of the first pair that survive each layer")
    print(f"{directory / 'pairs.jsonl'}: pairs and statements, to ask again:")
    images = shlex.join(str(directory / name) for name in _names(0))
    options = shlex.join(["--model", args.model, *_given(args)])
    print(f"  madtp nlvr {options} --images {images} \\")
    print(f"      --text {shlex.quote(samples[0].sentence)}")
    print(f"  madtp evaluate {options} --annotations {shlex.quote(str(directory / 'pairs.jsonl'))}")
    return 0


def _given(args: argparse.Namespace) -> list[str]:
    """The options that answers depend on, where they are not the default."""
    defaults = {"device": "cpu", "dtype": "float32", "grouping": "instance"}
    names = ("temperature", "device", "dtype", "backend", "grouping", "tokenizer", "threads")
    given = {name: getattr(args, name) for name in names if getattr(args, name) != defaults.get(name)}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def _question(model, split, index: int, templates) -> _Question:
    from PIL import Image

    pair = split.pair(index, 1, templates)
    (statement,) = pair.statements
    images = [Image.fromarray(image) for image in pair.images]
    return _Question(
        images, statement.sentence, statement.label, model.processor(*images, statement.sentence)
    )


def _answer(models, split, pairs: int, quiet: bool) -> tuple[list[_Question], list[_Tally]]:
    """What the models answer to one statement about each of so many pairs, or fewer if it takes too long."""
    from tqdm import tqdm

    from ..data.synthetic import TEMPLATES
    from ..predict import nlvr_batch

    questions, tallies = [], [_Tally() for _ in models]
    begin = time.perf_counter()
    with tqdm(total=pairs, desc="held-out pairs", unit=" pairs", leave=False, disable=quiet or None) as bar:
        while len(questions) < pairs and time.perf_counter() - begin < _ANSWER_SECONDS:
            indices = range(len(questions), min(len(questions) + _BATCH, pairs))
            batch = [_question(models[0], split, index, TEMPLATES) for index in indices]
            for model, tally in zip(models, tallies, strict=True):
                tally.add(batch, nlvr_batch(model, [question.instance for question in batch])[0])
            questions += batch
            bar.update(len(batch))
    return questions, tallies


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


def _row(label: str, dense: str, pruned: str, remark: str = "") -> None:
    print(f"{label:{_LABEL}}{dense:{_COLUMN}}{pruned:{_COLUMN}}{remark}".rstrip(), flush=True)


def _print_costs(tallies: list[_Tally], pairs: int, *, accuracy: bool) -> None:
    """Accuracy, if the models know anything, GFLOPs, and tokens before the first layer and after each."""
    _row(f"{pairs} held-out pairs", "dense", "pruned")
    if accuracy:
        shares = [tally.right / pairs for tally in tallies]
        error = max((share * (1 - share) / pairs) ** 0.5 for share in shares)
        _row("right answers", *(f"{share:.1%}" for share in shares), f"give or take {100 * error:.1f} points")
    before, after = (statistics.mean(tally.gflops) for tally in tallies)
    remark = f"{1 - after / before:.0%} fewer: {before / after:.2f}x"
    _row("GFLOPs per pair", f"{before:.4g}", f"{after:.4g}", remark)
    streams = {"tokens of an image, layer by layer": "image_tokens", "tokens of a statement": "text_tokens"}
    for label, name in streams.items():
        first, *layers = (statistics.mean(layer) for layer in zip(*getattr(tallies[1], name), strict=True))
        _row(label, f"{first:.1f}", " ".join(f"{count:.1f}" for count in layers))
    print(flush=True)


def _print_times(models, instances: list[tuple], dtype: str) -> None:
    import torch

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
    import torch

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


def _write(directory: Path, samples: list[_Question]) -> None:
    """Pictures and statements, as `madtp nlvr --input` and `madtp evaluate --annotations` read them."""
    rows = []
    for number, sample in enumerate(samples):
        for name, image in zip(_names(number), sample.images, strict=True):
            image.save(directory / name)
        rows.append({"images": _names(number), "text": sample.sentence, "label": str(sample.truth)})
    with replacing(directory / "pairs.jsonl") as file:
        file.writelines((json.dumps(row) + "\n").encode() for row in rows)
