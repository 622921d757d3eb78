"""Command-line options, Triton's interpreter where there is no GPU, NaN in every uninitialised tensor, and the end of a process
whose device is lost."""

import os
import random
import sys
from pathlib import Path

# Small shapes gain nothing from a second thread, and lose a lot where something else runs on the machine. Commands that
# tests start inherit it. Tests about threads set their number themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import quick_interpreter
import torch
from fresh import Fresh

# Triton reads this when a kernel is defined: it has to be set before any kernel module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    quick_interpreter.install()

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser):
    parser.addoption(
        "--golden",
        action="append",
        metavar="DIR",
        help="directory of golden tensors to check instead of tests/golden: one family, or a folder of families "
        "(may be given several times)",
    )
    parser.addoption(
        "--seed", type=int, metavar="N", help="seed of the random inputs, to repeat what a failure printed"
    )


LONGEST = (
    "test_packaging.py", "test_cuda_sources.py", "test_conformance.py", "test_cli_batch.py", "test_triton_interpreter.py",
    "test_compress.py", "test_graphs.py", "test_triton_aot.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files come first: where processes take whole files, none is left alone with one in the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


def golden_families(config) -> list[Path]:
    """Directories with a manifest, from --golden or from the repository."""
    roots = [Path(root) for root in config.getoption("--golden") or [GOLDEN]]
    families = []
    for root in roots:
        found = [root] if (root / "manifest.json").exists() else sorted(p.parent for p in root.glob("*/manifest.json"))
        if not found:
            raise pytest.UsageError(f"--golden {root}: no manifest.json there or one level below")
        families += found
    return families


@pytest.fixture
def generator(request):
    """Random numbers from a fresh seed, which a failing test shows."""
    seed = request.config.getoption("--seed")
    seed = random.SystemRandom().getrandbits(31) if seed is None else seed
    print(f"repeat with --seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def fresh():
    """Starts processes that have imported torch and nothing of the project."""
    processes = Fresh("torch")
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def fresh_command():
    """Starts processes that have imported the command and tokenizers: ``fresh_command.start(COMMAND, "nlvr", ...)``."""
    processes = Fresh(
        "madtp.cli madtp.predict madtp.cli.batch sympy "
        "transformers.models.bert.tokenization_bert transformers.models.clip.tokenization_clip"
    )
    yield processes
    processes.close()


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """torch.empty is filled with NaN (integers: the largest value), so that an element nobody wrote cannot hide."""
    previous = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")  # `use_deterministic_algorithms` imports PyTorch's compiler
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(previous[0])
    torch.utils.deterministic.fill_uninitialized_memory = previous[1]


@pytest.fixture(autouse=True)
def lost_device_ends_the_process(request):
    """A failed assertion on a GPU spoils it for the rest of the process: every later test would fail, and say nothing."""
    yield
    if torch.cuda.is_initialized():
        end_if_lost(request)


def end_if_lost(request):
    """Of several workers only this one ends: pytest-xdist names the test and gives the others to a new worker."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"{request.node.nodeid} left the device unusable: {str(error).splitlines()[0]}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(f"{message}; no test after it ran", returncode=1)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(message, file=sys.stderr, flush=True)
        os._exit(1)
