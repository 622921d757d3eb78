"""Measures the tiles of `madtp_kernels.linear` on this GPU and writes the table that chooses among them.

    python benchmarks/tune.py --out tune.jsonl            a line of JSON per tile and product, as it is known
    python benchmarks/tune.py --table tune.jsonl          the entries that follow from such a file, to standard output
    python benchmarks/tune.py --out tune.jsonl --write    both, into madtp_kernels/linear/tiles.py

The products are those of a ViT-B layer in bfloat16, with all or some of the rows of the buffer in use. Times are device times
per call, from replays of a CUDA graph of several calls. Every tile has to give the bits of the first one, for all rows and
for a row alone; one that does not is reported and never chosen. ``--rehearsal`` compiles only; ``--part i/n`` takes every
n-th tile, so that several processes can share that.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from madtp_kernels.linear import tiles
from madtp_kernels.linear import triton as implementation
from madtp_kernels.linear.tiles import Tile

TABLE = Path(tiles.__file__)
# width, columns, activation, whether a residual is added
PRODUCTS = [(768, 2304, "", False), (768, 768, "", True), (768, 3072, "gelu", False), (3072, 768, "", True)]
BUFFERS = {36928: (1.0, 0.5, 0.2, 0.08), 1154: (1.0, 0.5), 64: (1.0,)}
CALLS, REPLAYS = 8, 5


class Product:
    """Operands of one product; logits are of about 1."""

    def __init__(
        self, rows: int, width: int, columns: int, activation: str, residual: bool, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device="cuda").to(dtype)

        self.x, self.weight, self.bias = normal(rows, width), normal(columns, width) / width**0.5, normal(columns)
        self.activation = activation
        self.residual = normal(rows, columns) if residual else None

    def by(self, tile: Tile, cu_seqlens: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        residual = None if self.residual is None else self.residual[rows]
        return implementation._multiply(
            tile, self.x[rows], self.weight, self.bias, cu_seqlens, self.activation, residual
        )

    def by_pytorch(self, rows: slice) -> torch.Tensor:
        out = F.linear(self.x[rows], self.weight, self.bias)
        if self.activation:
            out = F.gelu(out)
        return out if self.residual is None else out + self.residual[rows]


def offsets(rows: int) -> torch.Tensor:
    return torch.tensor([0, rows], dtype=torch.int32, device="cuda")


def microseconds(call: Callable[[], object], calls: int = CALLS) -> float:
    """Device time of one of several calls in a row, the least of some replays."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return min(times)


def candidates(dtype: torch.dtype) -> tuple[Tile, ...]:
    if dtype == torch.float32:
        return tiles.FLOAT32
    if not implementation._copy_engine(torch.device("cuda")):
        return tiles.SIXTEEN_BITS
    return (*tiles.COPY_ENGINE, *tiles.CANDIDATES)


def rehearse(part: int, parts: int) -> None:
    """Compile every tile with every ending."""
    kinds = (torch.bfloat16, torch.float32)
    for dtype, tile in [(kind, tile) for kind in kinds for tile in candidates(kind)][part::parts]:
        for width, columns, activation, residual in PRODUCTS:
            product = Product(256, width, columns, activation, residual, dtype)
            try:
                product.by(tile, offsets(256))
            except Exception as error:
                print(f"{[*tile]}: {error}"[:300], file=sys.stderr)
    torch.cuda.synchronize()


def measure(dtype: torch.dtype, write: Callable[[dict], None]) -> None:
    architecture = implementation._architecture(torch.device("cuda"))
    calls = 1 if dtype == torch.float32 else CALLS
    buffers = BUFFERS if dtype != torch.float32 else {36928: (1.0, 0.2), 1154: (1.0,)}  # the ordinary units: slow
    for capacity, shares in buffers.items():
        for width, columns, activation, residual in PRODUCTS:
            product = Product(capacity, width, columns, activation, residual, dtype)
            ending = activation or ("residual" if residual else "bias")
            sizes = {"rows": capacity, "width": width, "columns": columns, "ending": ending}
            facts = {"stage": "tune", "architecture": architecture, "dtype": str(dtype).removeprefix("torch."), **sizes}
            expected = None
            for share in shares:
                used = round(capacity * share)
                call = lambda p=product, n=used: p.by_pytorch(slice(n))
                write({**facts, "figure": "F.linear over the tokens", "share": share, "us": microseconds(call, calls)})
            for tile in candidates(dtype):
                try:
                    alone = product.by(tile, offsets(1), slice(5, 6))
                    every = product.by(tile, offsets(capacity))
                    expected = every if expected is None else expected
                    same = torch.equal(every, expected) and torch.equal(alone, expected[5:6])
                    for share in shares:
                        cu_seqlens = offsets(round(capacity * share))
                        us = microseconds(lambda p=product, t=tile, cu=cu_seqlens: p.by(t, cu), calls)
                        write({**facts, "figure": "tile", "tile": [*tile], "share": share, "us": us, "same_bits": same})
                except Exception as error:
                    write(
                        {**facts, "figure": "tile", "tile": [*tile], "error": f"{type(error).__name__}: {error}"[:300]}
                    )
                    torch.cuda.synchronize()
            torch.cuda.empty_cache()


def entries(lines: list[dict]) -> dict[int, list[tuple]]:
    """For each architecture and product in bfloat16 the tile that is the least above the best, averaged over the shares."""
    times: dict[tuple, dict[Tile, dict[float, float]]] = collections.defaultdict(lambda: collections.defaultdict(dict))
    for line in lines:
        if line.get("figure") == "tile" and line.get("same_bits") and line["dtype"] == "bfloat16":
            key = (line["architecture"], line["rows"], line["width"], line["columns"])
            times[key][Tile(*line["tile"])][line["share"]] = line["us"]
    table = collections.defaultdict(list)
    for (architecture, *sizes), by_tile in times.items():
        shares = set.union(*(set(t) for t in by_tile.values()))
        best = {share: min(t[share] for t in by_tile.values() if share in t) for share in shares}
        complete = {tile: t for tile, t in by_tile.items() if set(t) == shares}
        excess = {tile: sum(math.log(t[share] / best[share]) for share in shares) for tile, t in complete.items()}
        table[architecture].append((*sizes, min(excess, key=excess.__getitem__)))
    return table


def source(table: dict[int, list[tuple]]) -> str:
    """The assignment of `MEASURED` as it stands in tiles.py."""
    text = "MEASURED: dict[int, tuple[Measured, ...]] = {\n"
    for architecture, rows in sorted(table.items()):
        text += f"    {architecture}: (\n"
        for *sizes, tile in rows:
            shape = [str(value) for value in tile if not isinstance(value, bool)]
            options = [f"{name}=True" for name, value in tile._asdict().items() if value is True]
            text += f"        Measured({', '.join(map(str, sizes))}, Tile({', '.join(shape + options)})),\n"
        text += "    ),\n"
    return text + "}\n"


def rewrite(table: dict[int, list[tuple]]) -> None:
    """Put the entries into tiles.py; those of other architectures stay."""
    merged = {number: [tuple(entry) for entry in rows] for number, rows in tiles.MEASURED.items()} | dict(table)
    text = TABLE.read_text(encoding="utf-8")
    pattern = re.compile(r"^MEASURED: .*?\}\n", re.MULTILINE | re.DOTALL)
    TABLE.write_text(pattern.sub(lambda _: source(merged), text, count=1), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE", help="append the lines here; they are printed in any case")
    parser.add_argument("--write", action="store_true", help="put what follows into madtp_kernels/linear/tiles.py")
    parser.add_argument("--table", metavar="FILE", help="measure nothing: print the entries that follow from this file")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rehearsal", action="store_true", help="compile only")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th tile, from the I-th")
    arguments = parser.parse_args()
    if arguments.table:
        lines = [json.loads(line) for line in Path(arguments.table).read_text(encoding="utf-8").splitlines()]
        table = entries(lines)
        rewrite(table) if arguments.write else print(source(table), end="")
        return 0
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    if arguments.rehearsal:
        rehearse(*map(int, arguments.part.split("/")))
        return 0
    lines = []

    def write(line: dict) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)
        if arguments.out:
            with open(arguments.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    with torch.inference_mode():
        measure(getattr(torch, arguments.dtype), write)
    if arguments.write:
        rewrite(entries(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
