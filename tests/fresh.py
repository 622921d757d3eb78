"""Fresh Python processes without the seconds that they take to import: each is a fork of one that has imported them.

For tests that need a process of its own, because something is decided once in its life. What is in the environment when a
process starts, `PYTHONPATH` among it, is followed; what an imported module read from it before is not.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

COMMAND = "import sys; from madtp.cli import main; sys.exit(main(sys.argv[1:]))"
"""What ``python -m madtp`` runs."""

# Reads a request a line, and makes a process for each, which leaves its exit status in a file.
_SERVER = """
import importlib, json, os, signal, sys, traceback

for name in sys.argv[1].split():
    importlib.import_module(name)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)


def serve(request):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    worker = os.fork()
    if worker:
        with open(request["place"] + "/pid", "w") as file:
            file.write(str(worker))
        _, status = os.waitpid(worker, 0)
        if os.path.exists(request["place"]):  # else nobody waits any more
            with open(request["place"] + "/status.new", "w") as file:
                file.write(str(os.waitstatus_to_exitcode(status)))
            os.rename(request["place"] + "/status.new", request["place"] + "/status")
        os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(request["place"] + "/" + name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = ["-c", *request["arguments"]]
    status = 0
    try:
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(status)


for line in sys.stdin:
    if not os.fork():
        sys.stdin.close()
        serve(json.loads(line))
"""


class Process:
    """One that was started."""

    def __init__(self, place: Path) -> None:
        self._place = place

    @property
    def pid(self) -> int:
        """Its number, once it runs."""
        self._until(lambda: self._text("pid"), 60)
        return int(self._text("pid"))

    @property
    def returncode(self) -> int | None:
        """Its exit status, minus the signal that ended it; None while it runs."""
        return int(self._text("status")) if self._text("status") else None

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return self._text("out")

    @property
    def stderr(self) -> str:
        """The same of standard error."""
        return self._text("err")

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 120) -> int:
        """Its exit status when it has ended; TimeoutError, and an end to it, where it does not."""
        try:
            self._until(lambda: self.returncode is not None, timeout)
        except TimeoutError:
            self.send_signal(signal.SIGKILL)
            raise
        return self.returncode

    def _text(self, name: str) -> str:
        path = self._place / name
        return path.read_text() if path.exists() else ""

    def _until(self, done, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {timeout} s: {self.stderr[-2000:]}")
            time.sleep(0.01)


class Fresh:
    """Starts processes in which some modules are imported already."""

    def __init__(self, modules: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER, modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        assert self._server.stdout.readline() == "ready\n"
        self._places = tempfile.TemporaryDirectory()
        self._lock = threading.Lock()

    def start(self, code: str, *arguments: object, env: dict | None = None, cwd: object = None) -> Process:
        """Run some code as ``python -c`` would."""
        place = Path(tempfile.mkdtemp(dir=self._places.name))
        request = {
            "place": str(place), "code": code, "arguments": [str(argument) for argument in arguments],
            "env": dict(os.environ if env is None else env), "cwd": str(cwd or Path.cwd()),
        }  # fmt: skip
        with self._lock:
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
        return Process(place)

    def run(self, code: str, *arguments: object, timeout: float = 120, **options) -> Process:
        """The same, until its end."""
        process = self.start(code, *arguments, **options)
        process.wait(timeout)
        return process

    def close(self) -> None:
        """End it; processes that still run go on."""
        self._server.stdin.close()
        self._server.wait()
        self._places.cleanup()
