"""What every Triton kernel takes of a multiprocessor on sm_80, sm_90 and sm_100, compiled ahead of time: no GPU is needed.

    python benchmarks/kernel_resources.py [--out benchmarks/results/triton-kernels.md] [--targets 80 90 100]

One row per kernel and case of `tests/kernels/test_triton_aot.py`, of real sizes: registers of a thread, stack (where spilled registers
go), shared memory of a block, machine instructions in all, and those after the last instruction of a matrix product: what
finishes a tile. Compiling takes some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton import knobs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/kernels"))
import test_triton_aot as aot

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
MATRIX_PRODUCT = re.compile(r"^(HMMA|HGMMA|UTC\w*MMA)")


def instructions(kernel) -> tuple[int, int | None]:
    """Machine instructions of a compiled kernel: all, and those after the last one of a matrix product (None without any)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [name for name in INSTRUCTION.findall(listing) if name != "NOP"]
    products = [i for i, name in enumerate(names) if MATRIX_PRODUCT.match(name)]
    return len(names), len(names) - 1 - products[-1] if products else None


def rows(capability: int) -> list[dict]:
    """A row per kernel, dtype and case."""
    found = []
    with aot.compiling(capability) as compiled:
        for dtype in ("float32", "bfloat16"):
            for label in aot.launches(aot.DTYPES[dtype], capability):
                for name, kernel in compiled:
                    total, ending = instructions(kernel)
                    case = {"kernel": name, "dtype": dtype, "case": label, "all": total, "ending": ending}
                    found.append(case | aot.resources(kernel))
                compiled.clear()
    return found


def table(capability: int) -> str:
    """Of one target, as Markdown."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print(f"\n## sm_{capability}\n")
        print(
            "| kernel | dtype | case | warps | registers | stack, bytes | shared memory, KiB | instructions | after the product |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        seen = set()
        for row in rows(capability):
            ending = "" if row["ending"] is None else row["ending"]
            line = (
                f"| `{row['kernel']}` | {row['dtype']} | {row['case']} | {row['warps']} | {row['registers']} | {row['stack']} "
                f"| {row['shared'] / 1024:.1f} | {row['all']} | {ending} |"
            )
            if line not in seen:
                print(line)
            seen.add(line)
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "triton-kernels.md")
    parser.add_argument("--targets", type=int, nargs="+", default=aot.TARGETS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(table(arguments.targets[0]))
        return
    text = (
        "# Triton kernels, compiled ahead of time\n\n"
        f"`python benchmarks/kernel_resources.py` with Triton {triton.__version__}; width 768, 12 heads of 64, 577 tokens, a "
        "dictionary of 100. Nothing was run: what these figures cost on a GPU is in the folders beside this file.\n\n"
        "Up to 32 bytes of stack are a choice of the assembler, which stays at a number of registers (128, 96) at which one more "
        "program fits a multiprocessor: attention in float32 on sm_90 takes 168 registers and no stack where it may "
        "(`maxnreg=168`), and 128 with 32 bytes where nothing is said.\n"
    )
    for capability in arguments.targets:  # each in a process of its own: the target is Triton's global state
        command = [sys.executable, __file__, "--one", "--targets", str(capability)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"sm_{capability}: {done.stderr[-4000:]}")
        text += done.stdout.rstrip("\n") + "\n"
        arguments.out.write_text(text, encoding="utf-8")
        print(f"sm_{capability}: {done.stdout.count('`_')} kernels", flush=True)


if __name__ == "__main__":
    main()
