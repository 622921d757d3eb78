"""Embeddings on disk: searched exactly, by true cosine, whatever their number and whoever wrote them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from madtp.bulk import vectors as module
from madtp.bulk.readers import Row, Shard
from madtp.bulk.vectors import ImageIndex, Vectors, candidates
from madtp.bulk.workers import Failure
from madtp.bulk.writers import Results, ShardFiles
from madtp.jsonl import ResumeError


@pytest.fixture
def random(generator):
    return lambda *shape: torch.randn(*shape, generator=generator).numpy()


def best(collection, queries, count):
    """By definition, in float64: ids of each query, the most similar first, equal ones by number."""
    with np.errstate(invalid="ignore"):
        usable = np.isfinite(collection).all(1) & collection.any(1)
        unit = collection.astype(np.float64) / np.linalg.norm(collection.astype(np.float64), axis=1, keepdims=True)
    scores = np.where(usable, queries @ np.nan_to_num(unit).T / np.linalg.norm(queries, axis=1, keepdims=True), -2)
    order = np.argsort(-scores, axis=1, kind="stable")[:, : min(count, usable.sum())]
    return order.tolist(), np.take_along_axis(scores, order, 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("count", [1, 7, 5000])
def test_search_is_exact(random, monkeypatch, dtype, count):
    monkeypatch.setattr(module, "_BLOCK", 100)
    parts = [10 * random(n, 16).astype(dtype) for n in (250, 1, 99)]
    parts[0][3], parts[0][120] = np.nan, np.inf
    parts[2][5] = 0
    collection, queries = Vectors(parts, [str(n) for n in range(350)]), random(6, 16)
    ids, scores = collection.search(queries, count)
    expected, exact = best(np.concatenate(parts), queries, count)
    np.testing.assert_allclose(scores, exact, atol=1e-6)
    # Scores that float32 cannot tell apart may come in either order.
    ties = np.abs(np.diff(exact, axis=1)) < 1e-6
    tied = np.pad(ties, ((0, 0), (1, 0))) | np.pad(ties, ((0, 0), (0, 1)))
    assert np.array_equal(np.where(tied, -1, ids), np.where(tied, -1, expected))
    assert np.array_equal(np.sort(ids, 1), np.sort(expected, 1)) or count < len(collection)
    assert (
        collection.usable().sum() == 347 and np.abs(np.linalg.norm(collection.rows([0, 251]), axis=1) - 1).max() < 1e-6
    )


def test_equal_vectors_come_in_their_order_and_scores_are_cosines(random, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 4)
    vector = random(16)
    collection = Vectors([np.stack([vector * 2**scale for scale in range(-4, 6)])], list("abcdefghij"))
    ids, scores = collection.search(7 * vector[None], 5)
    assert ids == [[0, 1, 2, 3, 4]] and all(1 - 1e-6 < score <= 1 for score in scores[0])
    assert min(collection.search(-vector[None], 3)[1][0]) >= -1


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_blocks_change_nothing(random, monkeypatch, dtype):
    """Neither what is found nor a bit of a score, also where vectors are equal or nearly so."""
    vectors = random(150, 24)
    vectors[::2] /= np.linalg.norm(vectors[::2], axis=1, keepdims=True)
    vectors[60:90] = vectors[:30]
    vectors[120:135] = vectors[7]
    vectors[140:] = vectors[3] * (1 + 1e-6 * random(10, 24))
    vectors[11], vectors[12] = 0, np.nan
    collection = Vectors([vectors[:70].astype(dtype), vectors[70:].astype(dtype)], list(map(str, range(150))))
    queries = np.concatenate([random(5, 24), vectors[[3, 7]]])
    expected = {count: collection.search(queries, count) for count in (1, 40, 500)}
    usable = np.isin(np.arange(150), (11, 12), invert=True)
    assert sorted(expected[500][0][0]) == np.flatnonzero(usable).tolist()
    assert expected[40][0][6][:17] == [7, 67, *range(120, 135)]
    for size in (1, 7, 64, 149):
        monkeypatch.setattr(module, "_BLOCK", size)
        for count, found in expected.items():
            assert collection.search(queries, count) == found
    ids = [list(range(149, -1, -1))] * len(queries)
    assert collection.scored(queries, ids, 40) == expected[40]


def test_files_of_every_kind(random, tmp_path):
    array = random(5, 8)
    lines = [
        {"row": n + 1, "image": f"{n}.jpg", **({"index": n - (n > 2)} if n != 2 else {"error": "?"})} for n in range(6)
    ]
    for name in ("x.npy", "x.safetensors"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    np.save(tmp_path / "x.npy", array)
    save_file({"features": array}, tmp_path / "x.safetensors")
    (tmp_path / "laion/img_emb").mkdir(parents=True)
    (tmp_path / "laion/metadata").mkdir()
    for n, rows in enumerate((array[:3], array[3:])):
        np.save(tmp_path / f"laion/img_emb/img_emb_{n}.npy", rows.astype(np.float16))
        records = [{"image_path": f"{k if k < 2 else k + 1}.jpg"} for k in range(3 * n, 3 * n + len(rows))]
        (tmp_path / f"laion/metadata/metadata_{n}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for name in ("x.npy", "x.safetensors", "laion"):
        found = Vectors.open(tmp_path / name)
        assert found.names == ["0.jpg", "1.jpg", "3.jpg", "4.jpg", "5.jpg"]
        assert found.search(array, 1)[0] == [[0], [1], [2], [3], [4]]
    with pytest.raises(FileNotFoundError):
        Vectors.open(tmp_path / "absent")
    (tmp_path / "x.npy.jsonl").unlink()
    for wrong in ("x.npy", "x.npy.jsonl", "."):
        with pytest.raises((ValueError, FileNotFoundError)):
            Vectors.open(tmp_path / wrong)
    with pytest.raises(ValueError, match="8 wide"):
        Vectors([array], list("abcde")).search(random(1, 9), 1)


def test_an_index_has_one_writer_and_one_model(tmp_path):
    with ImageIndex(tmp_path / "i", {"model": 1}), pytest.raises(ResumeError, match="written by another process"):
        ImageIndex(tmp_path / "i", {"model": 1}).__enter__()
    with pytest.raises(ResumeError, match="model: 1 then, 2 now"):
        Vectors.open(tmp_path / "i", {"model": 2})
    assert len(Vectors.open(tmp_path / "i", {"model": 1})) == 0


def test_a_damaged_part_of_an_index_is_said_once(random, tmp_path, caplog):
    picture, folder = tmp_path / "picture", tmp_path / "i"
    picture.touch()

    def update(index):
        return index.update(
            [picture], str, lambda paths: [{"embedding": vector} for vector in random(len(paths), 4)], 1
        )

    with ImageIndex(folder, {"model": 1}) as index:
        assert update(index) == (1, {})
    (part,) = folder.glob("img_emb/*.npy")
    part.write_bytes(part.read_bytes()[:-1])
    with ImageIndex(folder, {"model": 1}) as index:
        assert caplog.text.count(f"{part} is left out") == 1
        assert update(index) == (1, {}) and len(index.vectors) == 1


def test_an_index_grows_by_shards_and_keeps_what_was_added_before_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 3)
    images = [tmp_path / f"{n}.jpg" for n in range(8)]
    for n, image in enumerate(images):
        image.write_bytes(bytes(n))
    calls = []

    def prepare(path):
        if path.stem == "2":
            raise ValueError("damaged")
        return path

    def embed(paths):
        calls.append(len(paths))
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return [{"embedding": np.eye(8, dtype=np.float32)[int(path.stem)]} for path in paths]

    stop_at = 3
    with ImageIndex(tmp_path / "i", {}) as index, pytest.raises(KeyboardInterrupt):
        index.update(images, prepare, embed, 2)
    stop_at = None
    with ImageIndex(tmp_path / "i", {}) as index:
        assert [Path(name).stem for name in index.vectors.names] == ["0", "1", "3"]
        assert index.update(images, prepare, embed, 2) == (4, {3: "damaged"})
        parts = {path.stem[-1]: len(np.load(path)) for path in (tmp_path / "i" / "img_emb").iterdir()}
        assert parts == {"0": 3, "1": 3, "2": 1}
        usable = [image for image in images if image.stem != "2"]
        found = index.vectors.rows(index.numbers(usable)).argmax(1).tolist()
        assert found == [int(image.stem) for image in usable]


@pytest.mark.parametrize("kind", ["faiss", "usearch"])
def test_candidates_of_other_indexes(random, tmp_path, kind):
    array, queries = random(200, 16), random(3, 16)
    if kind == "faiss":
        faiss = pytest.importorskip("faiss")
        index, path = faiss.IndexFlatIP(16), tmp_path / "image.index"
        index.add(array)
        faiss.write_index(index, str(path))
    else:
        usearch = pytest.importorskip("usearch.index")
        index, path = usearch.Index(ndim=16, metric="cos"), tmp_path / "image.usearch"
        index.add(np.arange(200), array)
        index.save(str(path))
    collection = Vectors([array], [str(n) for n in range(200)])
    # Products of vectors that have no length of 1 are no cosines; scores are.
    assert collection.scored(queries, candidates(path, queries, 200), 5) == collection.search(queries, 5)
    for found in candidates(path, queries, 1000):  # usearch's graph may not reach all of them
        assert len(set(found)) == len(found) and set(found) <= set(range(200))
        assert len(found) == 200 or (kind == "usearch" and len(found) >= 100)
    assert collection.scored(queries, [[-1, 500, 3], [], [7, 7]], 5)[0] == [[3], [], [7]]
    with pytest.raises(ValueError, match="16 numbers"):
        candidates(path, random(1, 8), 1)


def test_other_tools_read_our_files(random, tmp_path):
    """embedding_reader, which autofaiss and clip-retrieval read with, pairs every vector with its own row."""
    reader = pytest.importorskip("embedding_reader")
    pytest.importorskip("pyarrow")
    vectors = random(48, 8)
    results = Results(tmp_path / "out", {}, vectors="img", dtype="float16")
    for number in range(12):  # of which one has no vectors at all, and no files of them
        with ShardFiles(results, Shard(number, "", "", lambda: iter(()))) as files:
            for row in range(4):
                place = 4 * number + row
                good = number != 5 and place % 7 > 0
                result = {"embedding": vectors[place]} if good else Failure("decode", "ValueError", "no image")
                files.add(Row(row, str(place)), result, {"image_path": f"{place}.jpg", "caption": f"text {place}"})
            files.finish()
    options = {"metadata_folder": str(tmp_path / "out/metadata"), "meta_columns": ["image_path", "caption"]}
    found = reader.EmbeddingReader(str(tmp_path / "out/img_emb"), file_format="parquet_npy", **options)
    names = Vectors.open(tmp_path / "out").names
    assert (found.count, found.dimension) == (len(names), 8) and len(names) == 38
    seen = []
    for array, metadata in found(batch_size=10, show_progress=False):
        for vector, name, caption in zip(array, metadata["image_path"], metadata["caption"], strict=True):
            place = int(name.removesuffix(".jpg"))
            assert caption == f"text {place}" and np.array_equal(vector, vectors[place].astype(np.float16))
            seen.append(name)
    assert seen == names
    # An index is made of the vectors alone, in the order of their files.
    found = reader.EmbeddingReader(str(tmp_path / "out/img_emb"), file_format="npy")
    array = np.concatenate([array for array, _ in found(batch_size=10, show_progress=False)])
    np.testing.assert_array_equal(array, np.concatenate(Vectors.open(tmp_path / "out").parts))
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(8)
    index.add(array.astype(np.float32))
    faiss.write_index(index, str(tmp_path / "image.index"))
    collection = Vectors.open(tmp_path / "out")
    queries = vectors[[1, 30]]
    ids = candidates(tmp_path / "image.index", queries, 38)
    assert collection.scored(queries, ids, 3) == collection.search(queries, 3)
