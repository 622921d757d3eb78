"""Wheels, how the extension is compiled, there and at first use, and what is said where that fails.

The sources in csrc take minutes to compile, and whoever runs these tests has compiled them on installing. A
module that compiles in a second stands in their place; everything else is the real checkout, copied.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fresh import COMMAND

from madtp_kernels import backends, build, info, native

ROOT = Path(__file__).resolve().parents[1]

MODULE = """\
// flags: -DFROM_FLAGS=1
#include <Python.h>
#include "cpu/answer.h"
#ifndef FROM_FLAGS
#define FROM_FLAGS 0
#endif
static PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:O,s:i,s:i}", "cuda", Py_False, "answer", answer(), "flags", FROM_FLAGS);
}
static PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, nullptr}, {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""


def _why_nothing_compiles() -> str | None:
    try:
        build.check_requirements()
        build.compiler()
    except build.BuildError as error:
        return str(error)
    return None


needs_compiler = pytest.mark.skipif(_why_nothing_compiles() is not None, reason=str(_why_nothing_compiles()))


def write_sources(folder: Path) -> None:
    (folder / "cpu").mkdir(parents=True)
    (folder / "bindings.cpp").write_text(MODULE)
    (folder / "cpu/answer.h").write_text("int answer();\n")
    (folder / "cpu/answer.cpp").write_text('#include "cpu/answer.h"\nint answer() { return 42; }\n')


def environment(cache: Path, **settings: str | None) -> dict[str, str]:
    """This process's environment without what steers the project, with a cache of its own."""
    dropped = ("PYTHONPATH", "CXX", build.SETTING, build.CUDA_SETTING, "MADTP_KERNELS_BACKEND", "TRITON_INTERPRET")
    result = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**result, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", **settings}


def python(*arguments, cwd: Path, env: dict[str, str], check: bool = True):
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if check and done.returncode:
        pytest.fail(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("madtp_kernels", "python"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_sources(folder / "csrc")
    return folder


def build_wheel(checkout: Path, tmp_path: Path, *options: str, pip: tuple = (), **settings):
    """What ``pip wheel`` printed, and the wheel or None; skips where pip cannot fetch setuptools."""
    command = ("-m", "pip", *pip, "wheel", "-v", "--no-deps", *options, "-w", tmp_path / "wheels", checkout)
    env = environment(tmp_path / "cache", **settings)
    done = python(*command, cwd=tmp_path, env=env, check=False)
    said = done.stdout + done.stderr
    if re.search(r"No matching distribution found for setuptools|No module named pip|no such option: --python", said):
        pytest.skip(f"pip cannot set up a build here: {said[-300:]}")
    wheels = list((tmp_path / "wheels").glob("*.whl"))
    assert len(wheels) == (done.returncode == 0), said
    return said, next(iter(wheels), None)


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def extract(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def pure_wheel(checkout, tmp_path_factory):
    """Built with MADTP_KERNELS_BUILD=0, by the tools of this environment."""
    folder = tmp_path_factory.mktemp("pure")
    return build_wheel(checkout, folder, "--no-build-isolation", MADTP_KERNELS_BUILD="0")[1]


@pytest.fixture
def site(pure_wheel, tmp_path):
    """A folder to put on PYTHONPATH: the package as installed from a wheel without an extension."""
    return extract(pure_wheel, tmp_path / "site")


LOAD = """
import json
from madtp_kernels import native
try:
    print(json.dumps({"file": native.load().__file__, **native.load().build_info()}))
except native.Unavailable as error:
    print(json.dumps({"reason": str(error)}))
"""


@pytest.fixture
def load(fresh, tmp_path):
    """A function: what native.load() gives in a new process that finds a site, and what was said on stderr."""

    def run(site: Path, **settings: str):
        env = environment(tmp_path / "cache", PYTHONPATH=str(site), **settings)
        done = fresh.run(LOAD, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return run


# ---- wheels


@needs_compiler
@pytest.mark.slow
def test_wheel_built_in_isolation_holds_an_extension_for_the_torch_that_is_here(checkout, tmp_path, load):
    said, wheel = build_wheel(checkout, tmp_path, MADTP_KERNELS_BUILD="1")
    assert wheel is not None, said
    assert "torch" not in "".join(re.findall(r"(?:Collecting|Downloading) .*", said))
    library = f"madtp_kernels/{build.LIBRARY_NAME}"
    assert {library, "madtp_kernels/_C.json", "madtp_kernels/csrc/bindings.cpp"} <= contents(wheel)
    assert not wheel.name.endswith("-none-any.whl")
    site = extract(wheel, tmp_path / "site")
    assert json.loads((site / "madtp_kernels/_C.json").read_text())["environment"] == build.environment_tag()
    loaded, said = load(site, MADTP_KERNELS_BUILD="0")
    assert loaded["file"] == str(site / library) and loaded["answer"] == 42
    assert said == ""


def test_wheel_without_extension_is_pure_and_complete(pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    names = contents(pure_wheel)
    assert not [name for name in names if name.endswith(".so")]
    for folder, pattern in ("madtp_kernels", "*.py"), ("python/madtp", "*.py"), ("python/madtp/data", "*.*"):
        paths = [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)]
        assert paths and {path.removeprefix("python/") for path in paths} <= names
    assert {"madtp_kernels/csrc/bindings.cpp", "madtp_kernels/csrc/cpu/answer.h"} <= names


def test_source_distribution_is_complete(checkout, tmp_path):
    """It holds everything that a wheel is built from."""
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = python("-c", code, cwd=checkout, env=environment(tmp_path / "cache"))
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "madtp_kernels", "csrc", "python/madtp"):
        paths = [checkout / name] if (checkout / name).is_file() else (checkout / name).rglob("*.*")
        assert {path.relative_to(checkout).as_posix() for path in paths if path.is_file()} <= names


def test_installed_package_runs_the_demo(site, tmp_path, fresh):
    """Models and all: the checkout is out of reach, and so is a network."""
    env = environment(tmp_path / "cache", PYTHONPATH=str(site), MADTP_KERNELS_BUILD="0", HF_HUB_OFFLINE="1")
    once = "from madtp.cli import demo; demo._FEWEST_ROUNDS = demo._MOST_ROUNDS = 1; "  # of what is timed
    done = fresh.run(once + COMMAND, "demo", "--pairs", "2", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "2 held-out pairs" in done.stdout and re.search(r"batch of 2 +\S+ +\S+ +\S+x", done.stdout)
    assert (tmp_path / "demo-output" / "overlay.png").stat().st_size > 10_000
    code = "import madtp; print(madtp.__file__, madtp.load('demo-dense').temperature)"
    assert fresh.run(code, cwd=tmp_path, env=env).stdout == f"{site}/madtp/__init__.py 0.0\n"


def test_metadata(pure_wheel):
    with zipfile.ZipFile(pure_wheel) as archive:
        folder = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        metadata = archive.read(f"{folder}/METADATA").decode()
        assert "madtp = madtp.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
        assert "Apache License" in archive.read(f"{folder}/licenses/LICENSE").decode()
    assert "Requires-Dist: torch>=2.10\n" in metadata and "Requires-Dist: transformers>=5.17\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata and "Requires-Python: >=3.10\n" in metadata
    requires = re.search(r"^requires = (.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert "torch" not in requires[1]


def test_wheel_without_a_compiler_says_what_is_missing(checkout, tmp_path):
    said, wheel = build_wheel(checkout, tmp_path, "--no-build-isolation", CXX="/nonexistent/g++")
    assert wheel.name.endswith("-none-any.whl")
    assert "no C++ compiler: CXX names '/nonexistent/g++', which does not exist" in said


@pytest.mark.parametrize("value, reason", [("1", "no C++ compiler"), ("no", "MADTP_KERNELS_BUILD=no: expected 0")])
def test_strict_build_that_cannot_be_fails_with_the_reason(checkout, tmp_path, value, reason):
    strict = {"CXX": "/nonexistent/g++", "MADTP_KERNELS_BUILD": value}
    said, wheel = build_wheel(checkout, tmp_path, "--no-build-isolation", **strict)
    assert wheel is None
    assert f"the C++ extension was not compiled: {reason}" in said


@pytest.mark.slow
def test_wheel_built_where_there_is_no_torch(checkout, tmp_path):
    python("-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path, env=environment(tmp_path))
    said, wheel = build_wheel(checkout, tmp_path, pip=("--python", tmp_path / "venv/bin/python"))
    assert wheel.name.endswith("-none-any.whl")
    assert re.search(r"first use will try again: torch cannot be imported in .*No module named 'torch'", said)


@needs_compiler
def test_editable_install_compiles_into_the_cache_and_not_into_the_checkout(checkout, tmp_path, load):
    code = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    python("-c", code, cwd=checkout, env=environment(tmp_path / "cache", MADTP_KERNELS_BUILD="1"))
    assert not list((checkout / "madtp_kernels").rglob("*.so"))
    loaded, said = load(checkout)
    assert loaded["answer"] == 42 and Path(loaded["file"]).is_relative_to(tmp_path / "cache")
    assert said == ""


# ---- first use


@needs_compiler
def test_first_use_compiles_once_for_all_processes(site, tmp_path, load):
    with ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(lambda _: load(site), range(3)))
    assert {loaded["answer"] for loaded, _ in outcomes} == {42}
    assert all(Path(loaded["file"]).is_relative_to(tmp_path / "cache") for loaded, _ in outcomes)
    assert "".join(said for _, said in outcomes).count("compiling the C++ kernels") == 1
    assert load(site)[1] == ""


@needs_compiler
def test_extension_compiled_for_another_torch_or_other_sources_is_not_used(site, tmp_path, load):
    library = Path(load(site)[0]["file"])
    installed = site / "madtp_kernels"
    for path in (library, library.with_name("_C.json")):
        shutil.move(path, installed)
    assert load(site)[0]["file"] == str(installed / library.name)
    record = json.loads((installed / "_C.json").read_text())
    for change in ({"environment": "torch0.0"}, {"sources": "0"}):
        (installed / "_C.json").write_text(json.dumps({**record, **change}))
        assert "forbids compiling one" in load(site, MADTP_KERNELS_BUILD="0")[0]["reason"]
    assert Path(load(site)[0]["file"]).is_relative_to(tmp_path / "cache")


@needs_compiler
def test_failure_to_compile_is_explained_kept_and_tried_again_on_request(site, tmp_path, load):
    source = site / "madtp_kernels/csrc/cpu/answer.cpp"
    source.write_text("int answer() { return nothing; }\n")
    first, said = load(site)
    assert re.search(r"could not compile cpu/answer\.cpp .*error:.*nothing.*details in", first["reason"])
    assert "compiling the C++ kernels" in said
    again, said = load(site)
    assert "MADTP_KERNELS_BUILD=1 tries again" in again["reason"] and said == ""
    details = json.loads(Path(re.search(r"details in (.*failure\.json)", again["reason"])[1]).read_text())
    assert any("return nothing" in line for line in details["output"])
    assert "compiling" in load(site, MADTP_KERNELS_BUILD="1")[1]
    source.write_text("int answer() { return 7; }\n")
    assert load(site)[0]["answer"] == 7


@needs_compiler
def test_cached_extension_that_does_not_load_is_compiled_again(site, tmp_path, load):
    cached = Path(load(site)[0]["file"])
    cached.write_bytes(b"not a library")
    loaded, said = load(site)
    assert loaded["answer"] == 42 and "compiling" in said


@needs_compiler
def test_half_a_library_or_a_damaged_record_is_compiled_again(site, tmp_path, load):
    """Half of one would end Python with SIGBUS."""
    cached = Path(load(site)[0]["file"])
    record, whole = cached.with_name("_C.json"), cached.read_bytes()
    for damage in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1])):
        cached.write_bytes(damage)
        loaded, said = load(site)
        assert loaded["answer"] == 42 and "compiling" in said
        assert cached.read_bytes() == whole
    for damage in (b"[]", b"{", b'"text"', b"\xff\0", b"[" * 9999):
        record.write_bytes(damage)
        assert build.read_record(record) == {}
    assert load(site)[0]["answer"] == 42


@needs_compiler
def test_a_failure_that_passes_is_not_kept(site, tmp_path, load):
    """A full disk, a compiler that was killed; a damaged record of a failure, and one of yesterday."""
    compiler = tmp_path / "g++"

    def behaves(script):
        compiler.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo fake; exit;; esac\n{script}\n')
        compiler.chmod(0o755)

    for script in ("echo 'fatal error: error writing to x.s: No space left on device' >&2; exit 1", "kill -9 $$"):
        behaves(script)
        assert "could not compile" in load(site, CXX=str(compiler))[0]["reason"]
        assert not list((tmp_path / "cache").rglob("failure.json"))
    behaves("echo 'error: nothing' >&2; exit 1")
    assert "error: nothing" in load(site, CXX=str(compiler))[0]["reason"]
    (kept,) = (tmp_path / "cache").rglob("failure.json")
    assert "error: nothing" in native._earlier_failure(kept, str(compiler))
    os.utime(kept, (0, kept.stat().st_mtime - 4000))
    assert native._earlier_failure(kept, str(compiler)) is None
    for content in ([], {"compiler": str(compiler)}):
        kept.write_text(json.dumps(content))
        assert native._earlier_failure(kept, str(compiler)) is None


def test_environment_can_forbid_compiling(site, tmp_path, load):
    outcome, said = load(site, MADTP_KERNELS_BUILD="0")
    assert outcome["reason"].endswith("is installed, and MADTP_KERNELS_BUILD=0 forbids compiling one")
    assert said == ""
    assert "expected 0 (never compile), 1" in load(site, MADTP_KERNELS_BUILD="no")[0]["reason"]


@needs_compiler
def test_cache_that_cannot_be_written_is_named(site, tmp_path, load):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert str(tmp_path / "cache") in load(site)[0]["reason"]


ANSWER = """
import torch
from madtp_kernels import BackendError, RaggedBatch, compact
batch = RaggedBatch.from_list([torch.randn(5, 8), torch.randn(3, 8)])
importance, threshold = torch.rand(8), torch.full((2,), 0.5)
by_itself = compact(batch, importance, threshold)
reference = compact(batch, importance, threshold, backend="reference")
assert torch.equal(by_itself.tokens.values, reference.tokens.values)
try:
    compact(batch, importance, threshold, backend="cpu")
except BackendError as error:
    print(error)
"""


@pytest.mark.parametrize("variable", ["CXX", "PATH"])
def test_operations_answer_where_there_is_no_compiler(site, tmp_path, fresh, variable):
    env = environment(tmp_path / "cache", PYTHONPATH=str(site), **{variable: "/nonexistent"})
    done = fresh.run(ANSWER, cwd=tmp_path, env=env)
    assert "no C++ compiler" in done.stdout
    assert "compact: backend 'cpu' is not used on cpu: no C++ compiler" in done.stderr


# ---- the build


@pytest.fixture
def sources(tmp_path, monkeypatch):
    write_sources(tmp_path / "csrc")
    monkeypatch.setattr(build, "source_dir", lambda: tmp_path / "csrc")
    build.source_hash.cache_clear()
    yield tmp_path / "csrc"
    build.source_hash.cache_clear()  # the next test is to find the extension of the real sources


@needs_compiler
def test_only_what_changed_is_compiled_again(sources, tmp_path, capfd):
    def compiled() -> list[str]:
        build.compile_extension(tmp_path / "out")
        return sorted(re.findall(r"sources compiled: \S*?(\w+\.cpp)", capfd.readouterr().err))

    assert compiled() == ["answer.cpp", "bindings.cpp"]
    assert compiled() == []
    (sources / "cpu/answer.cpp").write_text('#include "cpu/answer.h"\nint answer() { return 43; }\n')
    assert compiled() == ["answer.cpp"]
    (sources / "cpu/answer.h").write_text("int answer();  // included by both\n")
    assert compiled() == ["answer.cpp", "bindings.cpp"]
    (sources / "bindings.cpp").write_text(MODULE.replace("-DFROM_FLAGS=1", "-DFROM_FLAGS=2"))
    assert compiled() == ["bindings.cpp"]
    assert len(list((tmp_path / "objects").iterdir())) == 2


@needs_compiler
def test_an_installation_compiles_anew_what_first_use_would_find(sources, tmp_path, capfd):
    """A CUDA toolkit or another compiler may have come; nobody waits for objects that are the same."""

    def said(**options) -> str:
        assert build.fits(native.compile_into(tmp_path / "root", **options).parent)
        return capfd.readouterr().err

    assert "2 of 2 sources compiled" in said()
    assert said() == ""
    again = said(anew=True)
    assert "compiling the C++ kernels" in again and "sources compiled" not in again


@needs_compiler
def test_flags_of_a_single_source_apply_on_x86_64_only(sources, tmp_path, monkeypatch):
    library = build.compile_extension(tmp_path / "here")
    expected = int(platform.machine() == "x86_64")
    assert build.import_library(library).build_info()["flags"] == expected
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    library = build.compile_extension(tmp_path / "there")
    assert build.import_library(library).build_info()["flags"] == 0


@needs_compiler
def test_progress_and_what_is_left_out_are_said(sources, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv(build.CUDA_SETTING, "0")
    (sources / "kernel.cu").write_text("nothing that a C++ compiler would take")
    build.compile_extension(tmp_path / "out")
    said = capfd.readouterr().err
    assert "2 of 2 sources compiled: " in said
    assert "without CUDA kernels: MADTP_KERNELS_CUDA=0 forbids it" in said


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A CUDA compiler of release 13.0, where nothing names it; torch has CUDA 13 and sees a GPU."""
    path = tmp_path / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/cuda' >&2\necho 'tools, release 13.0, V13.0.1'\n")
    path.chmod(0o755)
    for name in ("CUDA_HOME", build.CUDA_SETTING):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "_CUDA_FOLDER", str(tmp_path / "nowhere"))
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return path


def test_nvcc_is_found_wherever_it_usually_is(nvcc, monkeypatch):
    assert build.find_nvcc() is None
    monkeypatch.setattr(build, "_CUDA_FOLDER", str(nvcc.parent))
    found = build.Nvcc(str(nvcc), "13.0", nvcc.parent.parent)
    assert build.find_nvcc() == found and build._cuda_toolkit() == (found, "")
    monkeypatch.setenv("CUDA_HOME", "/absent")  # what is named is meant
    assert build.find_nvcc() is None
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parent.parent))
    assert build.find_nvcc() == found
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert build.find_nvcc() == found


def test_cuda_is_compiled_where_there_is_a_gpu_or_a_setting_asks(nvcc, monkeypatch):
    assert "nvcc is not in CUDA_HOME" in build._cuda_toolkit()[1]
    monkeypatch.setenv("PATH", str(nvcc.parent))
    for asked, gpu, cuda, why in (
        ("", True, "13.1", None),
        ("", False, "13.1", "torch sees no GPU"),
        ("1", False, "13.1", None),
        ("0", True, "13.1", "forbids it"),
        ("", True, None, "is built without CUDA"),
        ("", True, "12.8", "of CUDA 13.0, torch of CUDA 12.8"),
    ):
        monkeypatch.setenv(build.CUDA_SETTING, asked)
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        found, said = build._cuda_toolkit()
        assert (found is None, said) == (why is not None, said if why else "") and (why or "") in said
    monkeypatch.setenv(build.CUDA_SETTING, "1")
    with pytest.raises(build.BuildError, match="cannot be compiled: .*torch of CUDA 12.8"):
        build._cuda_toolkit()
    monkeypatch.setenv(build.CUDA_SETTING, "yes")
    with pytest.raises(build.BuildError, match="expected 0"):
        build._cuda_toolkit()


@needs_compiler
def test_source_that_does_not_compile_is_named_with_what_the_compiler_said(sources, tmp_path):
    (sources / "cpu/answer.cpp").write_text("int answer() { return nothing; }\n")
    with pytest.raises(build.BuildError, match=r"could not compile cpu/answer\.cpp .*error: ") as caught:
        build.compile_extension(tmp_path / "out")
    assert "return nothing" in caught.value.output
    assert not list((tmp_path / "out").glob("_C*"))


# ---- info


def test_info_names_versions_and_every_backend_with_its_reason(site, tmp_path, fresh):
    env = environment(tmp_path / "cache", PYTHONPATH=str(site), CXX="/nonexistent/g++")
    module = "import runpy; runpy.run_module('madtp_kernels.info', run_name='__main__')"
    shown = fresh.run(module, cwd=tmp_path, env=env).stdout
    for name in ("python", "torch", "triton", "transformers", "compiler", "nvcc", "GPU"):
        assert re.search(rf"^{name} +\S", shown, re.MULTILINE), shown
    collected = json.loads(fresh.run(module, "--json", cwd=tmp_path, env=env).stdout)
    assert collected["versions"]["torch"] == torch.__version__
    assert collected["extension"] is None
    assert set(collected["backends"]) == {"cpu", "cuda"}
    for device, reasons in collected["backends"].items():
        assert set(reasons) == set(backends.NAMES) and reasons["reference"] is None
        for name, reason in reasons.items():
            assert f"{name:12}{reason or 'available'}" in shown, (device, name)
    assert "no C++ compiler: CXX names '/nonexistent/g++'" in collected["backends"]["cpu"]["cpu"]


def test_info_of_this_installation():
    collected = info.collect()
    assert json.loads(json.dumps(collected)) == collected
    assert (collected["extension"] is None) == (collected["backends"]["cpu"]["cpu"] is not None)
