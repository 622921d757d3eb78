"""Compiles the C++ extension ``_C`` against an installed PyTorch.

Shared by ``setup.py``, which runs this file as a script in the environment that holds torch, and by
:mod:`madtp_kernels.native`, which compiles at first use. Standard library only, apart from torch itself, and
independent of the rest of the package. Not here: where a compiled extension is looked for (``native.py``).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path

SETTING = "MADTP_KERNELS_BUILD"
MINIMUM_TORCH = (2, 10)
LIBRARY_NAME = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
CUDA_ARCHITECTURES = (80, 90, 100)

_COMPILE_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-DNDEBUG")
_NVCC_FLAGS = ("-std=c++20", "-O3", "-Xcompiler", "-fPIC", "-DNDEBUG", "--threads=0")
_TORCH_LIBRARIES = ("torch_python", "torch", "torch_cpu", "c10")


class BuildError(RuntimeError):
    """The extension cannot be compiled; the message says what is missing or which source failed.

    Attributes:
        output: what the compiler printed, shortened, with the command; "" where none ran.
    """

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


def setting() -> str:
    """``MADTP_KERNELS_BUILD``: "0" never compile, "1" a failure is an error, "" compile where possible.

    Raises:
        BuildError: any other value.
    """
    value = os.environ.get(SETTING, "")
    if value not in ("", "0", "1"):
        raise BuildError(f"{SETTING}={value}: expected 0 (never compile), 1 (a failure is an error) or unset")
    return value


def source_dir() -> Path:
    """The C++ sources: inside the package when installed, beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def _sources(*suffixes: str) -> list[Path]:
    return sorted(path for path in source_dir().glob("*") if path.suffix in suffixes)


@functools.cache
def source_hash() -> str:
    """Digest of what the extension is compiled from: the sources, and this file, which holds the flags."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in _sources(".cpp", ".cu", ".h", ".cuh"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> list[str]:
    """The C++ compiler as a command: ``CXX``, which may be several words ("ccache g++"), else the first of
    g++, c++ and clang++ on PATH.

    Raises:
        BuildError: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["c++"], ["clang++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    if named:
        raise BuildError(f"no C++ compiler: CXX names {named[0]!r}, which does not exist")
    raise BuildError("no C++ compiler: none of g++, c++, clang++ is on PATH and CXX is not set")


def compiler_version(command: list[str]) -> str:
    """First line of ``<compiler> --version``."""
    try:
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ compiler does not run: {error}") from error
    return (shown.strip() or "unknown").splitlines()[0]


@dataclasses.dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: path of ``nvcc``, its release such as "13.0", and the toolkit's folder."""

    path: str
    release: str
    toolkit: Path


def find_nvcc() -> Nvcc | None:
    """``nvcc`` from ``CUDA_HOME`` or PATH, or None."""
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if path is None:
        return None
    # The toolkit's folder is asked of nvcc itself: what PATH finds may be a wrapper script somewhere else.
    steps = subprocess.run([path, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    version = subprocess.run([path, "--version"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", steps.stderr, re.MULTILINE)
    release = re.search(r"release (\d+\.\d+)", version.stdout)
    if top is None or release is None:
        return None
    return Nvcc(path, release[1], Path(top[1].strip()).resolve())


def _cuda_toolkit(torch_cuda: str | None) -> Nvcc | None:
    """The nvcc to compile .cu files with, or None when the extension is to be built for the CPU only."""
    if not torch_cuda or not _sources(".cu"):
        return None
    nvcc = find_nvcc()
    # libcudart is torch's own at run time, and its file name carries the major version.
    if nvcc is None or nvcc.release.split(".")[0] != torch_cuda.split(".")[0]:
        return None
    return nvcc


def environment_tag() -> str:
    """What a compiled extension is bound to besides its sources: torch, Python and machine, the C library."""
    import torch

    return f"torch{torch.__version__}-{sysconfig.get_config_var('SOABI')}-{''.join(platform.libc_ver())}"


def check_requirements() -> None:
    """Raises BuildError naming the first thing, other than a compiler, that a build lacks here."""
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the C++ extension is built on Linux only, this is {sys.platform}")
    try:
        import torch
    except ImportError as error:
        raise BuildError(f"torch cannot be imported in {sys.prefix}: {error}") from error
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < MINIMUM_TORCH:
        needed = ".".join(map(str, MINIMUM_TORCH))
        raise BuildError(f"torch {torch.__version__} is too old: at least {needed} is needed")
    if not _sources(".cpp"):
        raise BuildError(f"no C++ sources in {source_dir()}")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise BuildError(f"Python.h is not in {headers}: install Python's development headers (python3-dev)")


def _own_flags(source: Path) -> list[str]:
    """Flags of one translation unit: a ``// flags: -mavx512f ...`` line among the comments it opens with.

    They apply on x86-64 only, where the unit holds what is run on processors that have those instructions.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    for line in source.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("//"):
            break
        if named := re.match(r"//\s*flags:\s*(.*)", line):
            return shlex.split(named[1])
    return []


def _with_headers(source: Path) -> Iterator[Path]:
    """The source and the headers beside it that it includes, directly or through one another."""
    seen, pending = set(), [source]
    while pending:
        path = pending.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
        pending += [path.parent / name for name in names]
    return iter(sorted(seen))


@dataclasses.dataclass(frozen=True)
class _Unit:
    """One translation unit: the command that compiles it (less input and output), the object it becomes."""

    source: Path
    command: tuple[str, ...]
    object: Path

    @classmethod
    def of(cls, source: Path, command: list[str], identity: str, folder: Path) -> _Unit:
        """The object's name carries a digest of all it depends on, so an object that exists is up to date."""
        digest = hashlib.sha256("\0".join([identity, *command]).encode())
        for path in _with_headers(source):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return cls(source, tuple(command), folder / f"{source.name}-{digest.hexdigest()[:16]}.o")

    def compile(self, verbose: bool) -> None:
        if self.object.exists():
            return
        partial = self.object.with_suffix(f".{os.getpid()}.partial")
        try:
            command = [*self.command, "-c", str(self.source), "-o", str(partial)]
            _execute(command, f"compile {self.source.name}", verbose)
            os.replace(partial, self.object)
        finally:
            partial.unlink(missing_ok=True)


def _execute(command: list[str], what: str, verbose: bool) -> None:
    if verbose:
        print(shlex.join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        cause = next((line for line in lines if re.search(r"\berror\b|undefined|Killed", line)), lines[-1])
        # The first lines name the cause, the last ones are what a compiler says that was killed.
        shown = lines if len(lines) <= 60 else [*lines[:30], f"... {len(lines) - 60} lines ...", *lines[-30:]]
        raise BuildError(
            f"{Path(command[0]).name} could not {what} (exit status {done.returncode}): {cause.strip()}",
            "\n".join([shlex.join(command), *shown]),
        )


def _jobs() -> int:
    """As many compilers at once as processors, or ``MAX_JOBS`` (the variable torch's own builds read)."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    return max(1, len(os.sched_getaffinity(0)))


def compile_extension(
    out_dir: str | os.PathLike, verbose: bool = False, object_dir: str | os.PathLike | None = None
) -> Path:
    """Compile ``csrc`` against the torch of this interpreter.

    Args:
        out_dir: folder that receives the library and, beside it, ``_C.json``: what it was built from and for.
        verbose: print the commands to stderr.
        object_dir: folder of the object files, kept from one build to the next so that only what changed is
            compiled again; ``out_dir/objects`` by default.

    Returns:
        Path of the library, ``_C.<abi tag>.so``. It appears under this name only when complete.

    Raises:
        BuildError: something is missing, or the compiler failed.
    """
    check_requirements()
    import torch

    out_dir = Path(out_dir)
    object_dir = Path(object_dir) if object_dir is not None else out_dir / "objects"
    cxx = compiler()
    cxx_version = compiler_version(cxx)
    nvcc = _cuda_toolkit(torch.version.cuda)
    torch_dir = Path(torch.__file__).resolve().parent

    headers = [torch_dir / "include", torch_dir / "include/torch/csrc/api/include"]
    headers.append(sysconfig.get_path("include"))
    flags = [*_COMPILE_FLAGS, f"-I{source_dir()}"]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")
    if nvcc:
        flags.append("-DMADTP_WITH_CUDA")
        headers.append(nvcc.toolkit / "include")
    for folder in headers:  # -isystem keeps the warnings of other people's headers out
        flags += ["-isystem", str(folder)]

    identity = f"{torch.__version__}|{cxx_version}|{nvcc.release if nvcc else ''}"
    units = []
    for source in _sources(".cpp"):
        units.append(_Unit.of(source, [*cxx, *flags, *_own_flags(source)], identity, object_dir))
    # No rpath: torch is always imported first, so the process already holds these libraries.
    libraries = [f"-L{torch_dir / 'lib'}", *(f"-l{name}" for name in _TORCH_LIBRARIES)]
    if nvcc:
        units += [_Unit.of(source, _nvcc_command(nvcc), identity, object_dir) for source in _sources(".cu")]
        libraries += [f"-L{nvcc.toolkit / 'lib64'}", f"-L{nvcc.toolkit / 'lib'}", "-lc10_cuda", "-lcudart"]

    out_dir.mkdir(parents=True, exist_ok=True)
    object_dir.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(_jobs()) as pool:
        try:
            for pending in [pool.submit(unit.compile, verbose) for unit in units]:
                pending.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise

    library = out_dir / LIBRARY_NAME
    partial = out_dir / f"{LIBRARY_NAME}.{os.getpid()}.partial"
    try:
        objects = [str(unit.object) for unit in units]
        _execute([*cxx, "-shared", "-fopenmp", *objects, *libraries, "-o", str(partial)], "link", verbose)
        information = {
            "environment": environment_tag(),
            "sources": source_hash(),
            "compiler": cxx_version,
            "cuda": nvcc.release if nvcc else None,
        }
        (out_dir / "_C.json").write_text(json.dumps(information, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, library)
    finally:
        partial.unlink(missing_ok=True)
    _remove_superseded(object_dir, units)
    return library


def _nvcc_command(nvcc: Nvcc) -> list[str]:
    """nvcc with machine code for each generation that it knows, and PTX of the newest for later ones."""
    known = subprocess.run([nvcc.path, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    targets = [number for number in CUDA_ARCHITECTURES if f"compute_{number}" in known]
    if not targets:
        raise BuildError(f"{nvcc.path} compiles for none of the architectures {CUDA_ARCHITECTURES}")
    command = [nvcc.path, *_NVCC_FLAGS, f"-I{source_dir()}"]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in targets]
    return [*command, f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}"]


def _remove_superseded(object_dir: Path, units: list[_Unit]) -> None:
    current = {unit.object for unit in units}
    for unit in units:
        for path in object_dir.glob(f"{unit.source.name}-*.o"):
            if path not in current:
                with contextlib.suppress(OSError):
                    path.unlink()


def import_library(library: Path) -> types.ModuleType:
    """The extension module in this file.

    Raises:
        ImportError: it does not load into this process.
    """
    import torch  # noqa: F401  (brings the libraries that the extension is linked to into the process)

    name = "madtp_kernels._C"
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_file_location(name, library, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _main(folder: str) -> int:
    """Compile into a folder for this environment inside ``folder``, and load the result once.

    Prints the outcome to stdout as one line of JSON, {"library": path} or {"reason": text}.
    """
    try:
        check_requirements()
        library = compile_extension(Path(folder) / environment_tag(), verbose=True)
        import_library(library)
    except (BuildError, ImportError) as error:
        print(getattr(error, "output", ""), file=sys.stderr)
        print(json.dumps({"reason": str(error)}))
        return 1
    print(json.dumps({"library": str(library)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(*sys.argv[1:]))
