"""`madtp info`: versions and backends."""

from __future__ import annotations

from dataclasses import dataclass

from madtp_kernels import info

from ..options import option
from .options import Command


@dataclass(kw_only=True)
class Info(Command):
    """What `python -m madtp_kernels.info` prints."""

    name = "info"
    help = "versions and available backends"
    description = "Versions, which backends can run here, and why the others cannot."

    json: bool = option("as JSON", False)

    def run(self) -> int:
        return info.main(["--json"] if self.json else [])
