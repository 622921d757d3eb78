"""`madtp info`: which backends can run here, and why the others cannot."""

from __future__ import annotations

from madtp_kernels import info


def add_parser(commands) -> None:
    parser = commands.add_parser("info", help="versions and available backends", description=__doc__)
    parser.set_defaults(run=run)


def run(args) -> int:
    return info.main([])
