"""The callables under Daft; skipped where it is not installed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from small_models import CONFIGS
from test_cli_batch import save_pictures

import madtp

daft = pytest.importorskip("daft")
pytestmark = pytest.mark.slow


def test_embeddings_of_a_table(tmp_path):
    spec = importlib.util.spec_from_file_location("daft_embed", Path(__file__).parents[2] / "examples/daft_embed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    madtp.save_pretrained(madtp.load("random:base", config=CONFIGS["clip"], temperature=2.0), tmp_path / "clip")
    photos = sorted(str(path) for path in save_pictures(tmp_path / "photos", 5).rglob("*") if path.is_file())
    paths = [*photos[:3], None, str(tmp_path / "absent.jpg"), *photos[3:]]
    frame = daft.from_pydict({"path": paths, "id": list(range(len(paths)))})
    alone = madtp.Embedder(tmp_path / "clip", backend="reference")
    expected = alone({"path": paths})
    found = module.embed(frame, str(tmp_path / "clip"), alone.width, batch_size=3, backend="reference").to_pydict()
    assert found["id"] == list(range(len(paths))) and found["path"] == paths
    assert found["error"] == expected["error"].tolist() and [bool(error) for error in found["error"]].count(True) == 2
    for vector, error, right in zip(found["embedding"], found["error"], expected["embedding"], strict=True):
        assert vector is None if error else np.abs(vector - right).max() < 1e-6
