"""Options that every command with a model has, and the model they describe."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Everything but the model itself."""
    group = parser.add_argument_group("how the model runs")
    pruning = group.add_mutually_exclusive_group()
    pruning.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="pruning temperature, higher prunes more (default: the checkpoint's)",
    )
    pruning.add_argument("--dense", action="store_true", help="do not prune (the same as --temperature 0)")
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    group.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="precision (default: float32)",
    )
    group.add_argument(
        "--backend",
        choices=["reference", "cpu", "triton", "cuda"],
        help="force an implementation of the kernels (default: the best there is)",
    )
    group.add_argument(
        "--grouping",
        choices=["instance", "pair", "batch"],
        default="instance",
        help="what keeps equally many tokens: nothing (default), the two images of a pair, or all images and "
        "all texts of a batch, as in the official code",
    )
    group.add_argument(
        "--tokenizer",
        metavar="SOURCE",
        help="directory, vocab.txt or hub id (default: the model's, or bert-base-uncased)",
    )
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def load_model(args: argparse.Namespace):
    """The model that the options describe. A missing tokenizer is found out now."""
    import torch

    import madtp

    if args.threads:
        torch.set_num_threads(args.threads)
    model = madtp.load(
        args.model,
        task="nlvr",
        temperature=0.0 if args.dense else args.temperature,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        backend=args.backend,
        tokenizer=args.tokenizer,
        grouping=args.grouping,
    )
    _ = model.processor.tokenizer
    return model
