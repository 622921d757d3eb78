"""`madtp evaluate`: how good a model is on a test split, dense and pruned, and what it costs."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .batch import add_batch, refuse_inputs, settings_of
from .options import add_model, add_model_options, load_model, positive

TASKS = ("nlvr", "vqa", "caption", "retrieval", "clip")

_EXAMPLES = """\
examples:
  madtp evaluate --model model_base_nlvr_0.5.pth --annotations nlvr_test.json \\
      --image-root NLVR2/images --output nlvr.json --plots plots
  madtp evaluate --model DIR --annotations nlvr_test.json --temperature 0 1 2 4 --records records.jsonl
  madtp evaluate --model DIR --annotations vqa_val.json --image-root coco --answers answer_list.json
  madtp evaluate --model DIR --annotations v2_OpenEnded_mscoco_val2014_questions.json --image-root coco \\
      --vqa-annotations v2_mscoco_val2014_annotations.json
  madtp evaluate --model DIR --annotations coco_karpathy_test.json --image-root coco --limit 500
  torchrun --nproc-per-node 8 -m madtp evaluate --model DIR --annotations flickr30k_test.json \\
      --image-root flickr30k --rerank 128 --device cuda --output flickr.json

What is measured follows from the model: accuracy for nlvr and vqa, captioning metrics, recall at 1, 5 and 10
in both directions for retrieval (BLIP's ranks the best again in pairs) and clip. Annotations are the original
files of NLVR2 and VQA v2, or those that BLIP ships, of which captions and retrieval take Karpathy's splits.

Each sample is pruned on its own (unless --grouping says otherwise) and counted once, however large the
batches and however many processes there are. With --records, a run that was interrupted goes on where it
stopped when the same command is given again. docs/annotations.md shows a record of each format; `madtp demo` writes
pairs.jsonl, which can be evaluated at once.
"""


def add_parser(commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "evaluate",
        help="quality, cost and speed on a test split",
        description="Evaluates a model on a test split, dense and pruned: quality, cost, time, tokens.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser, demo=True)
    parser.add_argument("--task", choices=TASKS, help="of random:base; other models know theirs")
    parser.add_argument("--annotations", required=True, metavar="FILE", help="samples with labels")
    parser.add_argument(
        "--image-root", metavar="DIR", help="what image paths start from (default: the annotations' folder)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N of the annotations")
    parser.add_argument(
        "--temperature",
        dest="temperatures",
        type=float,
        nargs="+",
        metavar="T",
        help="pruning temperatures, 0 is dense (default: 0 and the checkpoint's)",
    )
    add_batch(parser, "samples")
    results = parser.add_argument_group("where results go, beside the table on the terminal")
    results.add_argument("--output", metavar="JSON", help="all figures, with settings and versions")
    results.add_argument(
        "--records", metavar="JSONL", help="what the model said to each sample; lets a run go on"
    )
    results.add_argument("--plots", metavar="DIR", help="quality.png and tokens.png (needs matplotlib)")
    vqa = parser.add_argument_group("vqa")
    vqa.add_argument(
        "--vqa-annotations", metavar="FILE", help="where --annotations are original questions: their answers"
    )
    vqa.add_argument(
        "--answers",
        metavar="FILE",
        help="choose among these, a JSON list or one per line; by default answers are written",
    )
    vqa.add_argument(
        "--top-k",
        type=positive,
        metavar="K",
        help="of the list, score in full those that begin most likely (default: 128)",
    )
    words = parser.add_argument_group("caption, and vqa where answers are written")
    words.add_argument("--num-beams", type=positive, metavar="N", help="of the beam search (default: 3)")
    words.add_argument(
        "--max-length", type=positive, metavar="N", help="in tokens, prompt included (default: 20; vqa: 10)"
    )
    words.add_argument(
        "--min-length", type=positive, metavar="N", help="in tokens, prompt included (default: 5; vqa: 1)"
    )
    parser.add_argument_group("retrieval").add_argument(
        "--rerank",
        type=int,
        metavar="K",
        help="match the best K of each image and of each text in pairs (default: 256, as for COCO)",
    )
    add_model_options(parser, groupings=("instance", "pair", "batch"), text_modes=True, temperature=False)
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Evaluate a model and write what was found."""
    import torch

    from ..evaluate.run import Processes, evaluate
    from ..evaluate.tasks import missing_images, read_examples

    parts = _begin(args)
    processes = Processes.started()
    try:
        device = args.device
        if device == "cuda" and processes.count > 1:
            args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        model = load_model(args, [args.task] if args.task else TASKS)
        task = model.config.task
        options = _task_options(args, task)
        root = args.image_root or Path(args.annotations).parent
        examples = read_examples(task, args.annotations, root, args.vqa_annotations)[: args.limit]
        missing, images = missing_images(examples)
        if missing:
            names = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise ValueError(f"{args.annotations}: {len(missing)} of {images} images are not there: {names}")
        settings = _settings(args, model, device, options, len(examples))
        try:
            results, records = evaluate(
                model,
                examples,
                args.temperatures,
                batch_size=args.batch_size,
                folder=parts,
                settings=settings,
                processes=processes,
                overwrite=args.overwrite,
                progress=False if args.quiet else None,
                **options,
            )
        except KeyboardInterrupt:
            if parts:
                print("madtp: interrupted; the same command goes on from here", file=sys.stderr)
            else:
                print("madtp: interrupted; without --records nothing is kept", file=sys.stderr)
            return 130
        if processes.rank == 0:
            settings |= {
                "batch_size": args.batch_size,
                "processes": processes.count,
                "threads": torch.get_num_threads(),
            }
            written = _write(args, task, settings, results, records)
            if parts:
                shutil.rmtree(parts)
            # Last, since whoever reads it may have gone.
            print("\n".join([*_table(results, task, settings), *([] if args.quiet else written)]))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def _begin(args: argparse.Namespace) -> Path | None:
    """Where answers are kept until all are there, if at all. What cannot be read or written, or would replace something
    unasked, is found out here, before the model is loaded."""
    from ..files import check_output, open_regular

    for path in (args.annotations, args.vqa_annotations):
        if path:
            open_regular(path).close()
    if args.image_root and not Path(args.image_root).is_dir():
        raise ValueError(f"--image-root: {args.image_root} is no folder")
    if args.model == "random:base" and args.task is None:
        args.usage_error("--task: random:base is for any task, so it has to be named")
    parts = None if args.records is None else Path(args.records + ".parts")
    for name in ("output", "records"):
        path = getattr(args, name)
        if path is None:
            continue
        check_output(path, option=f"--{name}")
        refuse_inputs(args, path)
        if Path(path).exists() and not args.overwrite and not (parts and parts.exists()):
            raise ValueError(f"{path} exists already; remove it, or give --overwrite")
    if args.plots:
        from ..report.plots import require_matplotlib

        require_matplotlib()
        Path(args.plots).mkdir(parents=True, exist_ok=True)
        check_output(Path(args.plots) / "quality.png", option="--plots")
    return parts


def _task_options(args: argparse.Namespace, task: str) -> dict:
    """Options of the task that were given; others make no sense for it."""
    from ..inputs import read_texts

    words = ("num_beams", "max_length", "min_length")
    useful = {
        "vqa": ("vqa_annotations", "answers", *(("top_k",) if args.answers else words)),
        "caption": words,
        "retrieval": ("rerank",),
    }.get(task, ())
    every = ("vqa_annotations", "answers", "top_k", *words, "rerank")
    given = {name: getattr(args, name) for name in every if getattr(args, name) is not None}
    useless = [f"--{name.replace('_', '-')}" for name in given if name not in useful]
    if useless:
        where = " with --answers" if args.answers else " without --answers"
        raise ValueError(f"{', '.join(useless)}: of no use for {task}{where if task == 'vqa' else ''}")
    given.pop("vqa_annotations", None)
    if given.get("rerank", 0) < 0:
        raise ValueError(f"--rerank: expected at least 0, got {args.rerank}")
    if "answers" in given:
        given["candidates"] = read_texts(given.pop("answers"))
    if "top_k" in given:
        given["k"] = given.pop("top_k")
    return given


def _settings(args: argparse.Namespace, model, device: str, options: dict, samples: int) -> dict:
    """What determines the answers."""
    shown = dict(options)
    if "candidates" in shown:
        shown["candidates"] = _digest(json.dumps(shown["candidates"]).encode())
    files = [path for path in (args.annotations, args.vqa_annotations) if path]
    settings = settings_of(
        args,
        model,
        device=device,
        text_mode=getattr(model.config, "text_mode", None),
        annotations={Path(path).name: _digest(Path(path).read_bytes()) for path in files},
        image_root=args.image_root,
        examples=samples,
        options=shown,
    )
    del settings["temperature"]  # there are several
    return settings


def _digest(content: bytes) -> str:
    return f"sha256 {hashlib.sha256(content).hexdigest()[:16]}"


# ---- results ----------------------------------------------------------------------------------------------


def _write(
    args: argparse.Namespace, task: str, settings: dict, results: list[dict], records: dict
) -> list[str]:
    """Records, figures and plots, if asked for; says what is where."""
    from ..evaluate.figures import UNITS
    from ..evaluate.run import TIMING
    from ..files import replacing
    from ..jsonl import to_line

    written = []
    if args.records:
        with replacing(args.records) as file:
            for temperature, steps in records.items():
                for step, rows in steps.items():
                    for row in rows:
                        kept = {key: value for key, value in row.items() if key != "row"}  # of a process
                        file.write(to_line({"temperature": temperature, "step": step, **kept}))
        written.append(f"records: {args.records}")
    if args.output:
        document = {
            "task": task,
            "instance": UNITS[task],
            "settings": settings,
            "versions": _versions(settings["device"]),
            "timing": TIMING,
            "results": results,
        }
        with replacing(args.output) as file:
            file.write((json.dumps(document, indent=1) + "\n").encode())
        written.append(f"figures: {args.output}")
    if args.plots:
        written += _plot(Path(args.plots), task, results)
    return written


def _versions(device: str) -> dict[str, str]:
    import platform

    import torch
    import transformers

    import madtp_kernels

    gpu = device.startswith("cuda")
    return {
        "madtp": madtp_kernels.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if gpu else torch.backends.cpu.get_cpu_capability(),
    }


def _plot(folder: Path, task: str, results: list[dict]) -> list[str]:
    from ..evaluate.figures import HEADLINE, UNITS
    from ..report.plots import quality_plot, save_png, tokens_plot

    metric = HEADLINE[task]
    plots = {"tokens.png": tokens_plot(results)}
    if metric in results[0]["quality"]:
        plots["quality.png"] = quality_plot(results, metric, UNITS[task])
    for name, figure in plots.items():
        save_png(figure, folder / name)
    return [f"plot: {folder / name}" for name in plots]


def _table(results: Sequence[dict], task: str, settings: dict) -> list[str]:
    """Lines for the terminal, one column per temperature."""
    from ..evaluate.figures import UNITS

    unit, first = UNITS[task], results[0]
    counts = ", ".join(f"{count} {name}s" for name, count in first["samples"].items())
    processes = f", {settings['processes']} processes" if settings["processes"] > 1 else ""
    threads = "" if settings["device"] != "cpu" else f" (threads: {settings['threads']})"
    lines = [
        f"{task}: {counts}; {settings['dtype']} on {settings['device']}{threads}, batches of "
        f"{settings['batch_size']}{processes}",
        "",
    ]
    names = [f"T = {result['temperature']:g}" if result["temperature"] else "dense" for result in results]
    dense = next((result for result in results if not result["temperature"]), None)

    def add(label: str, cells: Sequence[str]) -> None:
        lines.append(f"{label:28}" + "".join(f"{cell:>20}" for cell in cells).rstrip())

    def cost(key: str) -> list[str]:
        cells = []
        for result in results:
            change = f" ({100 * (result[key] / dense[key] - 1):+.1f} %)" if dense else ""
            cells.append(f"{result[key]:.5g}{change if result is not dense else ''}")
        return cells

    add("", names)
    for metric in first["quality"]:
        add(metric.replace("_to_", " to "), [f"{result['quality'][metric]:.4f}" for result in results])
    add("GFLOPs, official count", cost("gflops"))
    add("GFLOPs, full count", cost("gflops_full"))
    add("model time, ms", [f"{1000 * result['seconds']:.4g}" for result in results])
    add("per second", [f"{result['per_second']:.4g}" for result in results])
    if "match" in first["steps"]:
        found = [result["steps"]["match"] for result in results]
        add("matching: GFLOPs per pair", [f"{match['gflops']:.5g}" for match in found])
        add("matching: ms per pair", [f"{1000 * match['seconds']:.4g}" for match in found])
    lines.append(f"(GFLOPs and time are those of one {unit})")
    for template, found in first.get("templates", {}).items():
        cells = [f"{result['templates'][template]['accuracy']:.4f}" for result in results]
        add(f"  {template} ({found['samples']})", cells)
    for stream in first["tokens"]:
        lines += ["", f"{stream} tokens, least / mean / most"]
        for layer in range(len(first["tokens"][stream])):
            cells = [
                "{min} / {mean:.1f} / {max}".format(**result["tokens"][stream][layer]) for result in results
            ]
            add(f"  after layer {layer}" if layer else "  input", cells)
    for name, reason in first.get("not_run", {}).items():
        lines.append(f"not computed: {name}: {reason}")
    if first.get("tokenizer") == "plain":
        lines.append("words were not split by the published tokenizer: compare with nothing published")
    return lines
