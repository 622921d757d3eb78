"""`madtp info`: versions, which backends can run here, and why the others cannot."""

from __future__ import annotations

import argparse


def add_parser(commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "info",
        help="versions and available backends",
        description="Versions, which backends can run here, and why the others cannot.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what `python -m madtp_kernels.info` prints."""
    from madtp_kernels import info

    return info.main(["--json"] if args.json else [])
