"""`madtp info`: which backends can run here, and why the others cannot."""

from __future__ import annotations

import runpy


def add_parser(commands) -> None:
    parser = commands.add_parser("info", help="versions and available backends", description=__doc__)
    parser.set_defaults(run=run)


def run(args) -> int:
    runpy.run_module("madtp_kernels.info", run_name="__main__")
    return 0
