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

SETTING, CUDA_SETTING = "MADTP_KERNELS_BUILD", "MADTP_KERNELS_CUDA"
MINIMUM_TORCH = (2, 10)
LIBRARY_NAME = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
CUDA_ARCHITECTURES = (80, 90, 100)
_CUDA_FOLDER = "/usr/local/cuda/bin"

_COMPILE_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-DNDEBUG")
_NVCC_FLAGS = ("-std=c++20", "-O3", "-Xcompiler", "-fPIC", "-DNDEBUG", "--threads=0")
_PASSING = r"no space left|disk quota|input/output error|cannot allocate|out of memory|memory exhausted|\bkilled\b"
_TORCH_LIBRARIES = ("torch_python", "torch", "torch_cpu", "c10")


class BuildError(RuntimeError):
    """The extension cannot be compiled; the message says what is missing or which source failed.

    Attributes:
        output: what the compiler printed, shortened, with the command; "" where none ran.
        passing: whether it may work the next time: the disk was full, or the compiler was killed.
    """

    def __init__(self, reason: str, output: str = "", passing: bool = False) -> None:
        super().__init__(reason)
        self.output, self.passing = output, passing


def setting(name: str = SETTING) -> str:
    """``MADTP_KERNELS_BUILD``: "0" never compile, "1" a failure is an error, "" compile where possible.
    ``MADTP_KERNELS_CUDA``: the same of the CUDA kernels, but "" compiles them only where there is a GPU.

    Raises:
        BuildError: any other value.
    """
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise BuildError(f"{name}={value}: expected 0 (never compile), 1 (a failure is an error) or unset")
    return value


def source_dir() -> Path:
    """The C++ sources: inside the package when installed, beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def _sources(*suffixes: str) -> list[Path]:
    return sorted(path for path in source_dir().rglob("*") if path.suffix in suffixes)


def _name(source: Path) -> str:
    """Where a source lies in ``csrc``, which is how includes name it, too."""
    return source.relative_to(source_dir()).as_posix()


@functools.cache
def source_hash() -> str:
    """Digest of what the extension is compiled from: the sources, and this file, which holds the flags."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in _sources(".cpp", ".cu", ".h", ".cuh"):
        digest.update(_name(path).encode() + b"\0" + path.read_bytes())
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


def _output(command: list[str], **options) -> subprocess.CompletedProcess:
    """What a program prints, in whatever encoding."""
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", **options
    )


def compiler_version(command: list[str]) -> str:
    """First line of ``<compiler> --version``."""
    try:
        shown = _output([*command, "--version"], check=True).stdout
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
    """``nvcc`` from ``CUDA_HOME`` where that is set, else from PATH or /usr/local/cuda, or None."""
    home = os.environ.get("CUDA_HOME")
    folders = [os.path.join(home, "bin")] if home else [os.environ.get("PATH", os.defpath), _CUDA_FOLDER]
    path = next(filter(None, (shutil.which("nvcc", path=folder) for folder in folders)), None)
    if path is None:
        return None
    # The toolkit's folder is asked of nvcc itself: what PATH finds may be a wrapper script somewhere else.
    top = re.search(r"^#\$ TOP=(.+)$", _output([path, "--dryrun", "-x", "cu", "-c", os.devnull]).stderr, re.MULTILINE)
    release = re.search(r"release (\d+\.\d+)", _output([path, "--version"]).stdout)
    if top is None or release is None:
        return None
    return Nvcc(path, release[1], Path(top[1].strip()).resolve())


def _cuda_toolkit() -> tuple[Nvcc | None, str]:
    """The nvcc to compile .cu files with; or None, and why the extension is built for the CPU only.

    Raises:
        BuildError: ``MADTP_KERNELS_CUDA=1`` asks for what cannot be had.
    """
    import torch

    asked, nvcc = setting(CUDA_SETTING), None
    if not _sources(".cu"):
        return None, "there are no CUDA sources"
    if asked == "0":
        why = f"{CUDA_SETTING}=0 forbids it"
    elif not torch.version.cuda:
        why = f"torch {torch.__version__} is built without CUDA"
    elif asked != "1" and not torch.cuda.is_available():
        why = f"torch sees no GPU ({CUDA_SETTING}=1 compiles for one all the same; that takes many minutes)"
    elif (nvcc := find_nvcc()) is None:
        why = f"nvcc is not in CUDA_HOME, on PATH or in {_CUDA_FOLDER}"
    # libcudart is torch's own at run time, and its file name carries the major version.
    elif nvcc.release.split(".")[0] != torch.version.cuda.split(".")[0]:
        why, nvcc = f"{nvcc.path} is of CUDA {nvcc.release}, torch of CUDA {torch.version.cuda}", None
    else:
        return nvcc, ""
    if asked == "1":
        raise BuildError(f"the CUDA kernels cannot be compiled: {why}")
    return None, why


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
    """The source and the headers of ``csrc`` that it includes, directly or through one another."""
    seen, pending = set(), [source]
    while pending:
        path = pending.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
        pending += [source_dir() / name for name in names]
    return iter(sorted(seen))


def _object_prefix(source: Path) -> str:
    return _name(source).replace("/", ".") + "-"


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
            digest.update(_name(path).encode() + b"\0" + path.read_bytes())
        return cls(source, tuple(command), folder / f"{_object_prefix(source)}{digest.hexdigest()[:16]}.o")

    def compile(self, verbose: bool) -> None:
        partial = self.object.with_suffix(f".{os.getpid()}.partial")
        try:
            command = [*self.command, "-c", str(self.source), "-o", str(partial)]
            _execute(command, f"compile {_name(self.source)}", verbose)
            _put(partial, self.object)
        finally:
            partial.unlink(missing_ok=True)


def _put(partial: Path, path: Path) -> None:
    """Give a file its name, once its content is on the disk: what has the name is whole, whenever the power fails."""
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _execute(command: list[str], what: str, verbose: bool) -> None:
    if verbose:
        print(shlex.join(command), file=sys.stderr, flush=True)
    done = _output(command)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        cause = next((line for line in lines if re.search(r"\berror\b|undefined|Killed", line)), lines[-1])
        # The first lines name the cause, the last ones are what a compiler says that was killed.
        shown = lines if len(lines) <= 60 else [*lines[:30], f"... {len(lines) - 60} lines ...", *lines[-30:]]
        raise BuildError(
            f"{Path(command[0]).name} could not {what} (exit status {done.returncode}): {cause.strip()}",
            "\n".join([shlex.join(command), *shown]),
            passing=done.returncode < 0 or any(re.search(_PASSING, line, re.IGNORECASE) for line in lines),
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
    nvcc, without_cuda = _cuda_toolkit()
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
    if without_cuda:
        say(f"without CUDA kernels: {without_cuda}")
    with concurrent.futures.ThreadPoolExecutor(_jobs()) as pool:
        try:
            stale = [unit for unit in units if not unit.object.exists()]
            pending = {pool.submit(unit.compile, verbose): _name(unit.source) for unit in stale}
            for count, done in enumerate(concurrent.futures.as_completed(pending), 1):
                done.result()
                say(f"{count} of {len(stale)} sources compiled: {pending[done]}")
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
            "sha256": _digest(partial),
        }
        _put(partial, library)
        partial.write_text(json.dumps(information, indent=2) + "\n", encoding="utf-8")
        _put(partial, out_dir / "_C.json")
    finally:
        partial.unlink(missing_ok=True)
    _remove_superseded(object_dir, units)
    return library


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_record(path: Path) -> dict:
    """The JSON object in a file; an empty one where there is none."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def fits(folder: Path) -> bool:
    """Whether a folder's library is of this environment and these sources, and whole: half of one would kill Python."""
    record, library = read_record(folder / "_C.json"), folder / LIBRARY_NAME
    if record.get("environment") != environment_tag() or record.get("sources") != source_hash():
        return False
    if setting(CUDA_SETTING) == "1" and not record.get("cuda"):
        return False
    return library.is_file() and record.get("sha256") == _digest(library)


def say(message: str) -> None:
    """Tell whoever waits."""
    print(f"madtp_kernels: {message}", file=sys.stderr, flush=True)


def _nvcc_command(nvcc: Nvcc) -> list[str]:
    """nvcc with machine code for each generation that it knows, and PTX of the newest for later ones."""
    known = _output([nvcc.path, "--list-gpu-arch"]).stdout.split()
    targets = [number for number in CUDA_ARCHITECTURES if f"compute_{number}" in known]
    if not targets:
        raise BuildError(f"{nvcc.path} compiles for none of the architectures {CUDA_ARCHITECTURES}")
    command = [nvcc.path, *_NVCC_FLAGS, f"-I{source_dir()}"]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in targets]
    return [*command, f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}"]


def _remove_superseded(object_dir: Path, units: list[_Unit]) -> None:
    current = {unit.object for unit in units}
    for unit in units:
        for path in object_dir.glob(f"{_object_prefix(unit.source)}*.o"):
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
