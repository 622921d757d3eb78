"""``python -m madtp_kernels.info [--json]``: versions, and which backends run here or why they do not.

Loading the extension shows whether the C++ backends run; where it is not compiled yet, it is compiled.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence

import torch

from . import __version__, backends, build, native


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiler() -> str:
    try:
        return build.compiler_version(build.compiler())
    except build.BuildError as error:
        return str(error)


def _nvcc() -> str:
    nvcc = build.find_nvcc()
    return f"{nvcc.release} ({nvcc.path})" if nvcc else "not found"


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _extension() -> dict[str, object] | None:
    try:
        module = native.load()
    except native.Unavailable:
        return None
    return {"file": module.__file__, **module.build_info()}


def collect() -> dict:
    """Everything that is shown, as plain JSON types.

    ``backends[device][name]`` is None for a backend that runs on tensors of that device, else the reason why
    it does not; devices are "cpu" and "cuda".
    """
    return {
        "versions": {
            "madtp_kernels": __version__,
            "python": f"{platform.python_version()} ({platform.platform()})",
            "torch": str(torch.__version__),
            "triton": _installed("triton"),
            "transformers": _installed("transformers"),
            "compiler": _compiler(),
            "nvcc": _nvcc(),
        },
        "gpus": _gpus(),
        "extension": _extension(),
        "backends": {
            device: {name: backends.availability(name, device) for name in backends.NAMES} for device in ("cpu", "cuda")
        },
    }


def _text(info: dict) -> str:
    lines = [f"{name:14}{value}" for name, value in info["versions"].items()]
    lines.append(f"{'GPU':14}{', '.join(info['gpus']) or 'none'}")
    if info["extension"]:
        shown = (f"{name} {value}" for name, value in info["extension"].items() if name != "file")
        lines += [f"{'extension':14}{info['extension']['file']}", f"{'':14}{', '.join(shown)}"]
    for device, reasons in info["backends"].items():
        lines += ["", f"backends for {device} tensors"]
        lines += [f"  {name:12}{reason or 'available'}" for name, reason in reasons.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; the exit code is 0 whatever is missing."""
    parser = argparse.ArgumentParser(prog="python -m madtp_kernels.info", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="as JSON")
    arguments = parser.parse_args(argv)
    info = collect()
    print(json.dumps(info, indent=2) if arguments.json else _text(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
