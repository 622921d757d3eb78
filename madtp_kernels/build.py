"""Compiles the C++ extension ``_C`` against the installed PyTorch; where one is looked for and kept is in ``native.py``."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
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
from pathlib import Path
from typing import NamedTuple

import torch

SETTING, CUDA_SETTING = "MADTP_KERNELS_BUILD", "MADTP_KERNELS_CUDA"
"""Environment variables that steer compilation: see :func:`setting`."""
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


def _digest(text: str, *files: Path) -> str:
    """Of a text, and of files under ``source_dir()`` with their names."""
    digest = hashlib.sha256(text.encode() + b"\0")
    for path in files:
        digest.update(f"{path.relative_to(source_dir())}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def source_hash() -> str:
    """Digest of the sources and of this file, which holds the flags."""
    return _digest(Path(__file__).read_text(encoding="utf-8"), *_sources(".cpp", ".cu", ".h", ".cuh"))


_run = functools.partial(
    subprocess.run, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace"
)


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
        shown = _run([*command, "--version"], check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ compiler does not run: {error}") from error
    return (shown.strip() or "unknown").splitlines()[0]


class Nvcc(NamedTuple):
    """A CUDA compiler: its path, its release such as "13.0", the toolkit's folder."""

    path: str
    release: str
    toolkit: Path


def find_nvcc() -> Nvcc | None:
    """``nvcc`` from ``CUDA_HOME`` where that is set, else from PATH or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else [os.environ.get("PATH", os.defpath), _CUDA_FOLDER]
    path = shutil.which("nvcc", path=os.pathsep.join(folders))
    if path is None:
        return None
    # nvcc itself names its folder: what PATH finds may be a wrapper script somewhere else.
    top = re.search(r"^#\$ TOP=(.+)$", _run([path, "--dryrun", "-x", "cu", "-c", os.devnull]).stderr, re.MULTILINE)
    release = re.search(r"release (\d+\.\d+)", _run([path, "--version"]).stdout)
    return Nvcc(path, release[1], Path(top[1].strip()).resolve()) if top and release else None


def _cuda_toolkit() -> tuple[Nvcc | None, str]:
    """The nvcc to compile .cu files with, or None and why not. Raises BuildError where MADTP_KERNELS_CUDA=1 asks for one."""
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
    return f"torch{torch.__version__}-{sysconfig.get_config_var('SOABI')}-{''.join(platform.libc_ver())}"


def check_requirements() -> None:
    """Raises BuildError naming the first thing, other than a compiler, that a build lacks here."""
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the C++ extension is built on Linux only, this is {sys.platform}")
    if torch.__version__ < "2.10":
        raise BuildError(f"torch {torch.__version__} is too old: at least 2.10 is needed")
    if not _sources(".cpp"):
        raise BuildError(f"no C++ sources in {source_dir()}")
    if not Path(headers := sysconfig.get_path("include"), "Python.h").exists():
        raise BuildError(f"Python.h is not in {headers}: install Python's development headers (python3-dev)")


def _own_flags(source: Path) -> list[str]:
    """A ``// flags: -mavx512f ...`` line of a source: for units that run where a processor has them."""
    flags = re.search(r"^// flags: (.*)", source.read_text(encoding="utf-8"), re.MULTILINE)
    return shlex.split(flags[1]) if flags and platform.machine() in ("x86_64", "AMD64") else []


def _with_headers(source: Path) -> list[Path]:
    """A source and the headers of ``csrc`` that it includes, directly or through one another."""
    files = [source]
    for path in files:  # which grows meanwhile
        names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
        files += {header for name in names if (header := source_dir() / name).exists()}.difference(files)
    return sorted(files)


def _commands() -> tuple[dict[Path, list[str]], list[str], dict]:
    """The command of each source (less output), the linker's (less objects and output), and what both depend on."""
    cxx, torch_dir = compiler(), Path(torch.__file__).resolve().parent
    nvcc, without_cuda = _cuda_toolkit()
    facts = {"environment": environment_tag(), "compiler": compiler_version(cxx), "cuda": nvcc and nvcc.release}
    headers = [torch_dir / "include", torch_dir / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    flags = [*cxx, *_COMPILE_FLAGS, f"-I{source_dir()}", abi]
    # No rpath: torch is always imported first, so the process already holds these libraries.
    link = [*cxx, "-shared", "-fopenmp", f"-L{torch_dir / 'lib'}", "-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10"]
    commands = {}
    if nvcc:
        flags.append("-DMADTP_WITH_CUDA")
        headers.append(nvcc.toolkit / "include")
        link += [f"-L{nvcc.toolkit / 'lib64'}", f"-L{nvcc.toolkit / 'lib'}", "-lc10_cuda", "-lcudart"]
        # Machine code for each generation that this nvcc knows, and PTX of the newest for later ones.
        known = _run([nvcc.path, "--list-gpu-arch"]).stdout.split()
        targets = [number for number in CUDA_ARCHITECTURES if f"compute_{number}" in known]
        code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in targets]
        newest = f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}"
        command = [nvcc.path, *_NVCC_FLAGS, f"-I{source_dir()}", *code, newest]
        commands = dict.fromkeys(_sources(".cu"), command)
    else:
        say(f"without CUDA kernels: {without_cuda}")
    for folder in headers:  # -isystem keeps the warnings of other people's headers out
        flags += ["-isystem", str(folder)]
    commands |= {source: [*flags, *_own_flags(source)] for source in _sources(".cpp")}
    return commands, link, facts


def _produce(path: Path, command: list[str], what: str) -> None:
    """Run a compiler; its output gets its name once it is whole and on the disk."""
    partial = path.with_name(path.name + ".partial")
    done = _run([*command, "-o", str(partial)])
    if done.returncode:
        said = (done.stdout + done.stderr).strip() or "no output"
        lines = said.splitlines()
        cause = next((line for line in lines if re.search(r"\berror\b|undefined|Killed", line)), lines[-1])
        if len(lines) > 60:  # the first name the cause, the last are what a compiler says that was killed
            lines[30:-30] = [f"... {len(lines) - 60} lines ..."]
        raise BuildError(
            f"{Path(command[0]).name} could not {what} (exit status {done.returncode}): {cause.strip()}",
            "\n".join([shlex.join(command), *lines]),
            done.returncode < 0 or re.search(_TRANSIENT, said, re.IGNORECASE) is not None,
        )
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def compile_extension(out_dir: Path) -> Path:
    """Compile ``csrc`` against the torch of this interpreter. Raises BuildError.

    The library has its name, ``_C.<abi tag>.so``, only once it is complete; ``_C.json`` beside it says what it was built from and
    for. Object files lie in ``objects`` beside the folder, a digest of command, source and headers in their names, so that only
    what changed is compiled again.
    """
    commands, link, facts = _commands()
    object_dir, objects = out_dir.parent / "objects", {}
    for source, command in commands.items():
        name, digest = source.relative_to(source_dir()), _digest(json.dumps([facts, command]), *_with_headers(source))
        objects[source] = object_dir / f"{str(name).replace('/', '.')}-{digest}.o"
    for folder in (out_dir, object_dir):
        folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> None:
        name = source.relative_to(source_dir())
        _produce(objects[source], [*commands[source], "-c", str(source)], f"compile {name}")
        say(f"{sum(path.exists() for path in objects.values())} of {len(objects)} sources compiled: {name}")

    asked = os.environ.get("MAX_JOBS", "")  # which torch's own builds read
    jobs = max(1, int(asked)) if asked.isdecimal() else len(os.sched_getaffinity(0))
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, [source for source, path in objects.items() if not path.exists()]))
    library = out_dir / LIBRARY_NAME
    _produce(library, [link[0], *map(str, objects.values()), *link[1:]], "link")
    facts |= {"sources": source_hash(), "sha256": hashlib.sha256(library.read_bytes()).hexdigest()}
    (out_dir / "_C.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for path in set(object_dir.iterdir()).difference(objects.values()):
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
    spec = importlib.util.spec_from_file_location("madtp_kernels._C", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
