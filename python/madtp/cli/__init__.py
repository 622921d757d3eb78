"""The `madtp` command. Each subcommand is a module of this package; how errors end is decided here.

Exit codes: 0 done; 1 done, but some rows of a batch could not be answered, or a target was missed; 2 not done, with one
line on stderr that says why; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence

import madtp_kernels

from ..options import UsageError
from ..tasks import TASKS
from . import evaluate
from .answer import command_of
from .calibrate import Calibrate
from .compress import Compress
from .demo import Demo
from .embed import Embed
from .info import Info
from .options import register
from .retrieve import Retrieve

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


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, not below the list of all options."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help shows the options)\n")


def parser() -> argparse.ArgumentParser:
    """The command line of `madtp` and all its subcommands."""
    top = _Parser(
        prog="madtp",
        description="Vision-language models that run on the tokens that matter.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"madtp {madtp_kernels.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for task in TASKS.values():
        if task.Inputs is not None:
            register(commands, command_of(task))
    for command in (Compress, Calibrate, Retrieve, Embed, evaluate.command(), Demo, Info):
        register(commands, command)
    for command in commands.choices.values():
        command.add_argument("--quiet", action="store_true", help="no progress, notes or warnings, errors only")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; nothing but `--debug` lets a traceback through."""
    _occupy_standard_streams()
    args, unknown = parser().parse_known_args(argv)
    if unknown:
        args.usage_error(f"unrecognized arguments: {' '.join(unknown)}")
    args.argv = list(sys.argv[1:] if argv is None else argv)
    # As a file name may hold characters that a terminal cannot show.
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="madtp: %(message)s")
    logging.getLogger("madtp").setLevel(logging.ERROR if args.quiet else logging.WARNING)
    try:
        code = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk behind standard output is an error like any other
        return code
    except UsageError as error:
        return args.usage_error(str(error))  # exits
    except KeyboardInterrupt:
        print("madtp: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output is gone: nothing more to say
        _give_up_stdout()
        return 141
    except Exception as error:
        if args.debug:
            raise
        print(f"madtp: error: {_one_line(error)}", file=sys.stderr)
        _give_up_stdout()
        return 2


def _occupy_standard_streams() -> None:
    """A file that is opened where standard output was closed would get its number, and all that is printed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _give_up_stdout() -> None:
    """What could not be written so far would be tried again at exit, and be an error then."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"  # rather than "[Errno 2] ..."
    text = " ".join(text.split()) or type(error).__name__
    text = text if len(text) <= 500 else text[:497] + "..."
    # Errors about what the user gave speak for themselves; the kind of any other helps to find its cause.
    expected = isinstance(error, (ValueError, OSError, FloatingPointError, madtp_kernels.BackendError))
    expected |= type(error) is ImportError and error.name is None  # our own words about a package that is not there
    return text if expected else f"{type(error).__name__}: {text} (--debug shows where)"
