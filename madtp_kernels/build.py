"""Compiles the C++ extension ``_C`` against an installed PyTorch: ``python build.py [folder]``.

``setup.py`` runs this file in the environment that holds torch, :mod:`madtp_kernels.native` calls it at first use. Standard
library and torch only; where a compiled extension is looked for is in ``native.py``.
"""

from __future__ import annotations

import concurrent.futures
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
from typing import NamedTuple

SETTING, CUDA_SETTING = "MADTP_KERNELS_BUILD", "MADTP_KERNELS_CUDA"
"""Environment variables that steer compilation: see :func:`setting`."""
MINIMUM_TORCH = (2, 10)
"""Major and minor version."""
LIBRARY_NAME = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
"""File name of the compiled extension."""
CUDA_ARCHITECTURES = (80, 90, 100)
"""Compute capabilities that CUDA sources are compiled for, times ten."""
_CUDA_FOLDER = "/usr/local/cuda/bin"
_COMPILE_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-DNDEBUG")
_NVCC_FLAGS = ("-std=c++20", "-O3", "-Xcompiler", "-fPIC", "-DNDEBUG", "--threads=0")
_TRANSIENT = r"no space left|disk quota|input/output error|cannot allocate|out of memory|memory exhausted|\bkilled\b"


class BuildError(RuntimeError):
    """The extension cannot be compiled; the message says why.

    Attributes:
        output: command and output of the compiler, shortened; "" where none ran.
        transient: it may work the next time: the disk was full, or the compiler was killed.
    """

    def __init__(self, reason: str, output: str = "", transient: bool = False) -> None:
        super().__init__(reason)
        self.output, self.transient = output, transient


def setting(name: str = SETTING) -> str:
    """Value of an environment variable: "0" never compile, "1" a failure is an error, "" compile where possible (the CUDA
    kernels: where there is a GPU). Raises BuildError for any other."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise BuildError(f"{name}={value}: expected 0 (never compile), 1 (a failure is an error) or unset")
    return value


def say(message: str) -> None:
    """Tell whoever waits."""
    print(f"madtp_kernels: {message}", file=sys.stderr, flush=True)


def source_dir() -> Path:
    """The C++ sources: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "csrc" if (package / "csrc").is_dir() else package.parent / "csrc"


def _sources(*suffixes: str) -> list[Path]:
    return sorted(path for path in source_dir().rglob("*") if path.suffix in suffixes)


def _digest(*parts: str | Path) -> str:
    """Of texts, and of files under ``source_dir()`` with their names."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            digest.update(part.relative_to(source_dir()).as_posix().encode() + b"\0" + part.read_bytes())
        else:
            digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def source_hash() -> str:
    """Digest of the sources and of this file, which holds the flags."""
    return _digest(Path(__file__).read_text(encoding="utf-8"), *_sources(".cpp", ".cu", ".h", ".cuh"))


def _run(command: list[str]) -> subprocess.CompletedProcess:
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "encoding": "utf-8", "errors": "replace"}
    return subprocess.run(command, **options)


def compiler() -> list[str]:
    """The C++ compiler: ``CXX``, which may be several words ("ccache g++"), else the first of g++, c++, clang++ on PATH."""
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
        done = _run([*command, "--version"])
        done.check_returncode()
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ compiler does not run: {error}") from error
    return (done.stdout.strip() or "unknown").splitlines()[0]


class Nvcc(NamedTuple):
    """A CUDA compiler: its path, its release such as "13.0", the toolkit's folder."""

    path: str
    release: str
    toolkit: Path


def find_nvcc() -> Nvcc | None:
    """``nvcc`` from ``CUDA_HOME`` where that is set, else from PATH or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    folders = [os.path.join(home, "bin")] if home else [os.environ.get("PATH", os.defpath), _CUDA_FOLDER]
    path = next(filter(None, (shutil.which("nvcc", path=folder) for folder in folders)), None)
    if path is None:
        return None
    # nvcc itself names its folder: what PATH finds may be a wrapper script somewhere else.
    top = re.search(r"^#\$ TOP=(.+)$", _run([path, "--dryrun", "-x", "cu", "-c", os.devnull]).stderr, re.MULTILINE)
    release = re.search(r"release (\d+\.\d+)", _run([path, "--version"]).stdout)
    return Nvcc(path, release[1], Path(top[1].strip()).resolve()) if top and release else None


def _cuda_toolkit() -> tuple[Nvcc | None, str]:
    """The nvcc to compile .cu files with, or None and why not. Raises BuildError where MADTP_KERNELS_CUDA=1 asks for one."""
    import torch

    asked, nvcc, why = setting(CUDA_SETTING), None, ""
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
    elif nvcc.release.split(".")[0] != torch.version.cuda.split(".")[0]:  # libcudart is torch's own at run time
        why, nvcc = f"{nvcc.path} is of CUDA {nvcc.release}, torch of CUDA {torch.version.cuda}", None
    if why and asked == "1":
        raise BuildError(f"the CUDA kernels cannot be compiled: {why}")
    return nvcc, why


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
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < MINIMUM_TORCH:
        raise BuildError(
            f"torch {torch.__version__} is too old: at least {'.'.join(map(str, MINIMUM_TORCH))} is needed"
        )
    if not _sources(".cpp"):
        raise BuildError(f"no C++ sources in {source_dir()}")
    if not Path(headers := sysconfig.get_path("include"), "Python.h").exists():
        raise BuildError(f"Python.h is not in {headers}: install Python's development headers (python3-dev)")


def _own_flags(source: Path) -> list[str]:
    """A ``// flags: -mavx512f ...`` line among a source's first comments: for units that run where a processor has them."""
    head = re.match(r"(?:\s*(?://.*)?\n)*", source.read_text(encoding="utf-8"))[0]
    flags = re.search(r"^//\s*flags:\s*(.*)", head, re.MULTILINE)
    return shlex.split(flags[1]) if flags and platform.machine() in ("x86_64", "AMD64") else []


def _with_headers(source: Path) -> Iterator[Path]:
    """A source and the headers of ``csrc`` that it includes, directly or through one another."""
    seen, pending = set(), [source]
    while pending:
        path = pending.pop()
        if path not in seen and path.exists():
            seen.add(path)
            names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
            pending += [source_dir() / name for name in names]
    return iter(sorted(seen))


def _put(command: list[str], path: Path, what: str, verbose: bool) -> None:
    """Run a compiler; its output gets its name once it is whole and on the disk."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        command = [*command, "-o", str(partial)]
        if verbose:
            print(shlex.join(command), file=sys.stderr, flush=True)
        done = _run(command)
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
            cause = next((line for line in lines if re.search(r"\berror\b|undefined|Killed", line)), lines[-1])
            # The first lines name the cause, the last ones are what a compiler says that was killed.
            shown = lines if len(lines) <= 60 else [*lines[:30], f"... {len(lines) - 60} lines ...", *lines[-30:]]
            raise BuildError(
                f"{Path(command[0]).name} could not {what} (exit status {done.returncode}): {cause.strip()}",
                "\n".join([shlex.join(command), *shown]),
                done.returncode < 0 or any(re.search(_TRANSIENT, line, re.IGNORECASE) for line in lines),
            )
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _commands() -> tuple[dict[Path, list[str]], list[str], dict]:
    """The command of each source (less output), the linker's options, and what both depend on."""
    import torch

    cxx, torch_dir = compiler(), Path(torch.__file__).resolve().parent
    nvcc, without_cuda = _cuda_toolkit()
    facts = {"environment": environment_tag(), "compiler": compiler_version(cxx), "cuda": nvcc and nvcc.release}
    headers = [torch_dir / "include", torch_dir / "include/torch/csrc/api/include", Path(sysconfig.get_path("include"))]
    flags = [
        *cxx,
        *_COMPILE_FLAGS,
        f"-I{source_dir()}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
    ]
    # No rpath: torch is always imported first, so the process already holds these libraries.
    link = [*cxx, "-shared", "-fopenmp", f"-L{torch_dir / 'lib'}", "-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10"]
    commands = {}
    if nvcc:
        flags.append("-DMADTP_WITH_CUDA")
        headers.append(nvcc.toolkit / "include")
        link += [f"-L{nvcc.toolkit / 'lib64'}", f"-L{nvcc.toolkit / 'lib'}", "-lc10_cuda", "-lcudart"]
        commands = dict.fromkeys(_sources(".cu"), _nvcc_command(nvcc))
    else:
        say(f"without CUDA kernels: {without_cuda}")
    for folder in headers:  # -isystem keeps the warnings of other people's headers out
        flags += ["-isystem", str(folder)]
    commands |= {source: [*flags, *_own_flags(source)] for source in _sources(".cpp")}
    return commands, link, facts


def _nvcc_command(nvcc: Nvcc) -> list[str]:
    """nvcc with machine code for each generation that it knows, and PTX of the newest for later ones."""
    known = _run([nvcc.path, "--list-gpu-arch"]).stdout.split()
    targets = [number for number in CUDA_ARCHITECTURES if f"compute_{number}" in known]
    if not targets:
        raise BuildError(f"{nvcc.path} compiles for none of the architectures {CUDA_ARCHITECTURES}")
    code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in targets]
    newest = f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}"
    return [nvcc.path, *_NVCC_FLAGS, f"-I{source_dir()}", *code, newest]


def compile_extension(
    out_dir: str | os.PathLike, verbose: bool = False, object_dir: str | os.PathLike | None = None
) -> Path:
    """Compile ``csrc`` against the torch of this interpreter.

    Args:
        out_dir: folder that receives the library and, beside it, ``_C.json``: what it was built from and for.
        verbose: print the commands to stderr.
        object_dir: folder of the object files (default ``out_dir/objects``). An object's name carries a digest of its
            command, source and headers, so that only what changed is compiled again.

    Returns:
        Path of the library, ``_C.<abi tag>.so``. It has this name only once it is complete.

    Raises:
        BuildError: something is missing, or the compiler failed.
    """
    check_requirements()
    out_dir = Path(out_dir)
    object_dir = out_dir / "objects" if object_dir is None else Path(object_dir)
    commands, link, facts = _commands()
    names = {source: source.relative_to(source_dir()).as_posix() for source in commands}
    objects = {}
    for source, command in commands.items():
        digest = _digest(json.dumps([facts, command]), *_with_headers(source))
        objects[source] = object_dir / f"{names[source].replace('/', '.')}-{digest}.o"
    out_dir.mkdir(parents=True, exist_ok=True)
    object_dir.mkdir(parents=True, exist_ok=True)
    stale = [source for source, path in objects.items() if not path.exists()]
    # MAX_JOBS is the variable that torch's own builds read.
    jobs = (
        int(os.environ.get("MAX_JOBS", ""))
        if os.environ.get("MAX_JOBS", "").isdigit()
        else len(os.sched_getaffinity(0))
    )
    with concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool:
        pending = {}
        for source in stale:
            command = [*commands[source], "-c", str(source)]
            pending[pool.submit(_put, command, objects[source], f"compile {names[source]}", verbose)] = names[source]
        try:
            for count, done in enumerate(concurrent.futures.as_completed(pending), 1):
                done.result()
                say(f"{count} of {len(stale)} sources compiled: {pending[done]}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    library = out_dir / LIBRARY_NAME
    _put([link[0], *map(str, objects.values()), *link[1:]], library, "link", verbose)
    facts |= {"sources": source_hash(), "sha256": hashlib.sha256(library.read_bytes()).hexdigest()}
    partial = out_dir / f"_C.json.{os.getpid()}.partial"
    partial.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, out_dir / "_C.json")
    for path in set(object_dir.glob("*.o")) - set(objects.values()):
        path.unlink(missing_ok=True)
    return library


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
    return library.is_file() and record.get("sha256") == hashlib.sha256(library.read_bytes()).hexdigest()


def import_library(library: Path) -> types.ModuleType:
    """The extension module in this file. Raises ImportError where it does not load into this process."""
    import torch  # noqa: F401  (brings the libraries that the extension is linked to into the process)

    loader = importlib.machinery.ExtensionFileLoader("madtp_kernels._C", str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def _main(folder: str) -> int:
    """Compile into a folder for this environment inside ``folder`` and load the result once; setup.py reads the outcome from
    stdout, a line of JSON: {"library": path} or {"reason": text}."""
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
