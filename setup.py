"""What pyproject.toml cannot say: where the packages lie, and how an installation compiles the C++ extension.

pip builds in an isolated environment without torch, but the extension has to fit the torch that will run it. So it is compiled
by a child process of the same interpreter that does not inherit the isolation. Best effort: without torch or a compiler the
wheel is pure Python, and the extension is compiled at first use. MADTP_KERNELS_BUILD=0 skips it, MADTP_KERNELS_BUILD=1 makes a
failure an error. CUDA kernels, which take minutes, are compiled where there is a GPU, or with MADTP_KERNELS_CUDA=1.
`pip install -v` shows the progress.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent
BUILD_SCRIPT = ROOT / "madtp_kernels" / "build.py"

# Arguments of both: a path, then folders that may hold torch. They print {"library": path} or {"reason": text}.
COMPILE_FOR_WHEEL = """
import runpy, sys
sys.path += sys.argv[3:]
sys.argv = sys.argv[1:3]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
COMPILE_INTO_CACHE = """
import json, sys
sys.path = [sys.argv[1], *sys.path[1:], *sys.argv[2:]]
try:
    from madtp_kernels import native
    print(json.dumps({"library": native.load().__file__}))
except (ImportError, RuntimeError) as error:
    print(json.dumps({"reason": str(error)}))
"""


def run_outside_isolation(code, *arguments):
    """What the code prints, in the environment that is installed into.

    pip isolates through PYTHONPATH: without it the interpreter sees its own environment again, wherever torch comes from there.
    What this process can import comes last, for a torch on PYTHONPATH and no isolation.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    folders = dict.fromkeys([*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    command = [sys.executable, "-c", code, *map(str, arguments), *filter(os.path.isdir, folders)]
    done = subprocess.run(command, env=environment, cwd=os.sep, stdout=subprocess.PIPE)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"reason": f"the build process ended with status {done.returncode}"}


class build_native(Command):
    """Compile the extension into the wheel; for an editable install into the user's cache, where a change is noticed."""

    def initialize_options(self):
        self.editable_mode, self.build_lib, self.files = False, None, []

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        setting = runpy.run_path(str(BUILD_SCRIPT))["setting"]()
        if setting == "0":
            return
        if self.editable_mode:
            outcome = run_outside_isolation(COMPILE_INTO_CACHE, ROOT)
        else:
            outcome = run_outside_isolation(COMPILE_FOR_WHEEL, BUILD_SCRIPT, ROOT / "build" / "native")
        if "reason" in outcome and setting == "1":
            raise ExecError(f"the C++ extension was not compiled: {outcome['reason']}")
        if "reason" in outcome:
            print(f"madtp_kernels: C++ extension not compiled, first use will try again: {outcome['reason']}")
        elif not self.editable_mode:
            library = Path(outcome["library"])
            for path in (library, library.with_name("_C.json")):
                self.files.append(str(Path(self.build_lib) / "madtp_kernels" / path.name))
                self.copy_file(str(path), self.files[-1])

    def get_outputs(self):
        return self.files

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []


class build_with_native(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012 (a list in setuptools, too)


class bdist_wheel_with_native(bdist_wheel):
    """A wheel is tagged for one platform exactly when it holds a compiled extension."""

    def run(self):
        # What an earlier build left there must not get into this wheel.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        self.run_command("build")
        compiled = bool(self.get_finalized_command("build_native").files)
        self.root_is_pure = not compiled
        self.distribution.has_ext_modules = lambda: compiled
        super().run()


setup(
    packages=[*find_packages(include=["madtp_kernels*"]), "madtp_kernels.csrc", *find_packages("python")],
    package_dir={"madtp_kernels.csrc": "csrc", "madtp": "python/madtp"},
    package_data={
        "madtp_kernels.csrc": ["**/*.cpp", "**/*.h", "**/*.cu", "**/*.cuh"],
        "madtp": ["data/**/*"],
    },
    include_package_data=False,
    cmdclass={"bdist_wheel": bdist_wheel_with_native, "build": build_with_native, "build_native": build_native},
)
