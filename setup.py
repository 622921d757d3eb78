"""What pyproject.toml cannot say: where the packages lie, and how an installation compiles the C++ extension.

pip builds in an isolated environment without torch, but the extension has to fit the torch that will run it. So it is compiled
by a child process of the same interpreter that does not inherit the isolation. Best effort: without torch or a compiler the
wheel is pure Python, and the extension is compiled at first use. MADTP_KERNELS_BUILD=0 skips it, MADTP_KERNELS_BUILD=1 makes a
failure an error. CUDA kernels, which take minutes, are compiled where there is a GPU, or with MADTP_KERNELS_CUDA=1.
`pip install -v` shows the progress.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent

# Arguments: this folder, the one to compile into, those that may hold torch. Prints the library's path, or why there is none.
CHILD = """
import json, sys
sys.path = [sys.argv[1], *sys.path[1:], *sys.argv[3:]]
missing = f"torch cannot be imported in {sys.prefix}: "
try:
    import torch
    missing = ""
    from madtp_kernels import build, native
    library = native.compile_into(sys.argv[2] or native.cache_dir(), anew=True)
    build.import_library(library)
    print(json.dumps([str(library), None]))
except (ImportError, OSError, RuntimeError) as error:
    print(getattr(error, "output", ""), file=sys.stderr)
    print(json.dumps([None, missing + str(error)]))
"""


def compile_outside_isolation(folder):
    """Compile for the environment that is installed into; the library's path, or None where that fails and may.

    pip isolates through PYTHONPATH: without it the interpreter sees its own environment again, wherever torch comes from there.
    What this process can import comes last, for a torch on PYTHONPATH and no isolation.
    """
    setting = os.environ.get("MADTP_KERNELS_BUILD", "")
    if setting == "0":
        return None
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    command = [sys.executable, "-B", "-c", CHILD, str(ROOT), str(folder), *filter(os.path.isdir, sys.path)]
    done = subprocess.run(command, env=environment, cwd=os.sep, stdout=subprocess.PIPE)
    try:
        library, reason = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        library, reason = None, f"the build process ended with status {done.returncode}"
    if reason and setting:
        raise ExecError(f"the C++ extension was not compiled: {reason}")
    if reason:
        print(f"madtp_kernels: C++ extension not compiled, first use will try again: {reason}")
    return library and Path(library)


class editable_wheel_and_cache(editable_wheel):
    """The extension is compiled into the user's cache, where a change of the sources is noticed."""

    def run(self):
        compile_outside_isolation("")
        super().run()


class bdist_wheel_with_extension(bdist_wheel):
    """A wheel is tagged for one platform exactly when it holds a compiled extension."""

    def run(self):
        package = Path(self.get_finalized_command("build").build_lib) / "madtp_kernels"
        shutil.rmtree(package.parent, ignore_errors=True)  # what an earlier build left must not get into this wheel
        self.run_command("build")
        library = compile_outside_isolation(ROOT / "build" / "native")
        for path in (library, library.with_name("_C.json")) if library else ():
            shutil.copy(path, package)
        self.root_is_pure = library is None
        self.distribution.has_ext_modules = lambda: library is not None
        super().run()


setup(
    packages=[*find_packages(include=["madtp_kernels*"]), "madtp_kernels.csrc", *find_packages("python")],
    package_dir={"madtp_kernels.csrc": "csrc", "madtp": "python/madtp"},
    package_data={"madtp_kernels.csrc": ["**/*.cpp", "**/*.h", "**/*.cu", "**/*.cuh"], "madtp": ["data/**/*"]},
    include_package_data=False,
    cmdclass={"bdist_wheel": bdist_wheel_with_extension, "editable_wheel": editable_wheel_and_cache},
)
