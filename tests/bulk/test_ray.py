"""The callables under Ray Data, on a cluster of this machine; skipped where Ray is not installed."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from small_models import CONFIGS
from test_bulk import save_tars
from test_cli_batch import save_pictures

import madtp
from madtp.bulk.readers import Source

ray = pytest.importorskip("ray")
pytest.importorskip("pyarrow")
pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cluster():
    import ray.data

    variables = {name: os.environ[name] for name in ("MADTP_KERNELS_BUILD",) if name in os.environ}
    # Actors import this file for the class below.
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for task in ("clip", "caption"):
        madtp.save_pretrained(madtp.load("random:base", config=CONFIGS[task], temperature=2.0), folder / task)
    return folder


class Mortal(madtp.Embedder):
    """Whoever is first to leave its mark ends its process in the middle of a batch."""

    def __init__(self, *args, mark, **options):
        super().__init__(*args, **options)
        self.mark = mark

    def answer(self, instances):
        try:
            os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return super().answer(instances)
        os.kill(os.getpid(), 9)


def test_two_actors_of_which_one_dies(cluster, models, tmp_path):
    """Nothing is lost, nothing is there twice, and vectors are those of an embedder alone."""
    module = example("ray_embed")
    tars = save_tars(tmp_path, 6, 8, bad=("0030004",))
    dataset = ray.data.read_webdataset([str(path) for path in tars], decoder=None)
    dataset = dataset.map_batches(
        Mortal,
        fn_constructor_kwargs={"model": str(models / "clip"), "mark": str(tmp_path / "mark"), "backend": "reference"},
        compute=ray.data.ActorPoolStrategy(size=2),
        batch_size=4,
        num_cpus=1,
    )
    rows = dataset.take_all()
    assert (tmp_path / "mark").exists()
    images = {row.key: row.image.read() for shard in Source(tars) for row in shard.rows()}
    assert sorted(row["__key__"] for row in rows) == sorted(images) and len(rows) == 48
    assert [row["__key__"] for row in rows if row["error"]] == ["0030004"]
    alone = madtp.Embedder(models / "clip", backend="reference")
    keys = [row["__key__"] for row in rows if not row["error"]]
    expected = alone({"jpg": [images[key] for key in keys]})["embedding"]
    found = np.stack([row["embedding"] for row in rows if not row["error"]])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert all(row["txt"].decode() == f"text {row['__key__']}" for row in rows)
    # The example itself, written to files.
    dataset = ray.data.read_webdataset([str(path) for path in tars[:2]], decoder=None)
    module.embed(dataset, str(models / "clip"), backend="reference").write_parquet(str(tmp_path / "out"))
    import pyarrow.parquet as pq

    assert pq.read_table(tmp_path / "out").num_rows == 16


def test_captions_of_a_table(cluster, models, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    photos = sorted(path for path in save_pictures(tmp_path / "photos", 5).rglob("*") if path.is_file())
    paths = [*map(str, photos), str(tmp_path / "absent.jpg")]
    pq.write_table(pa.table({"path": paths, "id": range(6)}), tmp_path / "rows.parquet")
    dataset = ray.data.read_parquet(str(tmp_path / "rows.parquet"))
    options = {"backend": "reference", "generation": {"num_beams": 1}}
    example("ray_caption").caption(dataset, str(models / "caption"), **options).write_json(str(tmp_path / "out"))
    rows = [json.loads(line) for path in (tmp_path / "out").iterdir() for line in path.read_text().splitlines()]
    expected = madtp.Captioner(models / "caption", **options)({"path": paths})
    assert {row["id"]: row["caption"] for row in rows} == dict(enumerate(expected["caption"].tolist()))
    assert [row["id"] for row in rows if row["error"]] == [5]
