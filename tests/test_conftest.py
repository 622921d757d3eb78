"""What `conftest.py` does after a test that loses the GPU."""

import os

import conftest
import pytest
import torch


@pytest.fixture
def lost(monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: device-side assert triggered\nFor debugging consider ...")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)


def test_a_process_whose_device_is_lost_ends_and_names_the_test(lost, request, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    with pytest.raises(
        pytest.exit.Exception, match="::test_a_process_.* unusable: CUDA .* triggered; no test after it"
    ):
        conftest.end_if_lost(request)


def test_of_several_workers_only_one_ends(lost, request, monkeypatch):
    codes, messages = [], []
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw3")
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(conftest, "print", lambda message, **_: messages.append(message), raising=False)
    conftest.end_if_lost(request)
    assert codes == [1] and request.node.nodeid in messages[0]
