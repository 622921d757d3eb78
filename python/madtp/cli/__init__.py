"""The `madtp` command. Each subcommand is a module of this package; how errors end is decided here.

Exit codes: 0 done; 1 done, but some rows of a batch could not be answered; 2 not done, with one line on
stderr that says why; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from . import calibrate, caption, compress, demo, embed, evaluate, info, nlvr, retrieve, vqa

_EXAMPLES = """\
examples:
  madtp demo
  madtp caption --model DIR photos/ --output captions.jsonl --batch-size 16
  madtp vqa --model DIR photo.jpg --question "How many dogs are there?"
  madtp retrieve --model DIR photos/ --index photos.index --text "a dog on a beach"
  madtp embed --model DIR photos/ --output photos.npy
  madtp nlvr --model model_base_nlvr_0.5.pth --images left.jpg right.jpg --text "Both images show a dog."
  madtp evaluate --model DIR --annotations nlvr_test.json --image-root NLVR2/images --output nlvr.json
  madtp compress --model DENSE --image-root DIR --annotations TRAIN --dev DEV --reduction 0.8 --output DIR
  madtp calibrate --model DENSE --pairs pairs.jsonl --reduction 0.3 --output DIR
  madtp info
"""


def parser() -> argparse.ArgumentParser:
    """The command line of `madtp` and all its subcommands."""
    top = argparse.ArgumentParser(
        prog="madtp",
        description="Vision-language models that run on the tokens that matter.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (caption, vqa, retrieve, embed, nlvr, evaluate, compress, calibrate, demo, info):
        module.add_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; nothing but `--debug` lets a traceback through."""
    args = parser().parse_args(argv)
    logging.basicConfig(format="madtp: %(message)s")
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("madtp: interrupted", file=sys.stderr)
        return 130
    except (
        BrokenPipeError
    ):  # the reader of our output is gone: nothing more to say, also not at interpreter exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if getattr(args, "debug", False):
            raise
        print(f"madtp: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= 500 else text[:497] + "..."
    # Errors about what the user gave speak for themselves; the kind of any other helps to find its cause.
    expected = isinstance(error, (ValueError, OSError))
    return text if expected else f"{type(error).__name__}: {text} (--debug shows where)"
