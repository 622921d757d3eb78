"""Decoders for tests: other processes import them by name, which they could not from a test file."""

import os
import signal
from pathlib import Path

import torch


def faulty(row):
    """Ends its process for some rows, always or the first time."""
    what, mark = row.fields["what"], row.fields["mark"]
    if what == "dies" or (what == "dies once" and not os.path.exists(mark)):
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fails":
        raise ZeroDivisionError("division by zero")
    return torch.full((3, 4), row.number), [torch.arange(row.number)], {"name": what}


class Unloadable:
    """Ends the process that it is unpickled in."""

    def __reduce__(self):
        return os._exit, (3,)
