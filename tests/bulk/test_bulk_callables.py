"""`madtp.Embedder`, `Captioner`, `Answerer`: batches of columns as engines bring them, one result or one reason per
row.
"""

import io
import pickle
import random

import numpy as np
import pytest
import torch
from small_models import CONFIGS
from test_cli_batch import picture

import madtp
from madtp import predict
from madtp.bulk.callables import to_image


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for task, config in CONFIGS.items():
        madtp.save_pretrained(madtp.load("random:base", config=config, temperature=2.0), folder / task)
    return folder


@pytest.fixture
def images():
    rng = random.Random(5)
    return [picture(rng) for _ in range(5)]


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def objects(values):
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def vectors_of(model, images):
    return torch.stack(
        [predict.embed_images(model, [model.processor.image(image)])[0][0].features for image in images]
    ).numpy()


@pytest.mark.parametrize("kind", ["bytes", "S", "arrays", "4d", "grey", "paths", "pil", "struct", "list"])
def test_images_as_engines_bring_them(models, images, tmp_path, kind):
    embedder = madtp.Embedder(models / "clip", backend="reference")
    if kind == "4d":
        images = [image.resize((20, 30)) for image in images]
    if kind == "grey":
        images = [image.convert("L") for image in images]
    columns = {
        "bytes": lambda: objects([encoded(image) for image in images]),
        "S": lambda: np.array([encoded(image) for image in images]),
        "arrays": lambda: objects([np.asarray(image) for image in images]),
        "4d": lambda: np.stack([np.asarray(image) for image in images]),
        "grey": lambda: objects([np.asarray(image) for image in images]),
        "paths": lambda: objects([str(path) for path in saved(images, tmp_path)]),
        "pil": lambda: images,
        "struct": lambda: objects([{"bytes": encoded(image), "path": None} for image in images]),
        "list": lambda: [encoded(image) for image in images],
    }[kind]()
    if isinstance(columns, np.ndarray) and columns.dtype != object:
        columns.flags.writeable = False
    found = embedder({"image": columns, "id": np.arange(5)})
    assert ("image" in found) == (kind == "paths") and found["id"].tolist() == [0, 1, 2, 3, 4]
    assert found["error"].tolist() == [None] * 5
    assert found["embedding"].dtype == np.float32 and found["image_tokens"].dtype == np.int32
    np.testing.assert_allclose(found["embedding"], vectors_of(embedder.model, images), atol=1e-6)


def saved(images, folder):
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
        yield folder / f"{number}.png"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_bad_row_costs_itself_only(models, images, count):
    embedder = madtp.Embedder(models / "clip", backend="reference", batch_size=2)
    for place in range(count):
        batch = objects([encoded(image) for image in images[:count]])
        for bad in (b"<html>", b"", None, 3.5, np.zeros((2, 2, 2), dtype=np.uint8), encoded(images[place])[:60]):
            batch[place] = bad
            found = embedder({"jpg": batch})
            assert [error is None for error in found["error"]] == [n != place for n in range(count)]
            assert np.isnan(found["embedding"][place]).all()
            good = [n for n in range(count) if n != place]
            np.testing.assert_allclose(
                found["embedding"][good],
                vectors_of(embedder.model, [images[n] for n in good] or images)[: len(good)],
                atol=1e-6,
            )
    found = embedder({"jpg": objects([None] * count)})
    assert found["embedding"].shape == (count, 16) and len(found["error"]) == count


def test_texts(models):
    embedder = madtp.Embedder(models / "clip", text="caption", backend="reference")
    found = embedder({"caption": np.array(["a dog", "a cat on a mat"]), "path": np.array(["a", "b"])})
    model = embedder.model
    expected = predict.embed_texts(model, [model.processor.text(text) for text in ("a dog", "a cat on a mat")])[0]
    np.testing.assert_array_equal(found["embedding"], np.stack([one.features for one in expected]))
    assert found["caption"].tolist() == ["a dog", "a cat on a mat"] and found["path"].tolist() == ["a", "b"]
    assert embedder({"caption": objects([None, "b"])})["error"].tolist() == [
        "ValueError: no 'caption' in this row", None,
    ]  # fmt: skip


def test_captions_and_answers(models, images):
    questions = objects(["what", "who", None, "", "why"])
    batch = {"bytes": objects([encoded(image) for image in images]), "question": questions}
    captioner = madtp.Captioner(models / "caption", backend="reference", generation={"num_beams": 2})
    found = captioner(batch)
    expected = predict.caption(captioner.model, images, num_beams=2)
    assert found["caption"].tolist() == [one.caption for one in expected] and found["error"].tolist() == [None] * 5
    assert found["image_tokens"].tolist() == [one.image_tokens for one in expected]
    sampler = madtp.Captioner(models / "caption", backend="reference", generation={"top_p": 0.9}, seed=1)
    whole = sampler(batch)["caption"].tolist()
    assert whole == [sampler({"bytes": batch["bytes"][n : n + 1]})["caption"][0] for n in range(5)]
    answerer = madtp.Answerer(models / "vqa", backend="reference", question="where")
    found = answerer(batch)
    assert [error is None for error in found["error"]] == [True, True, False, False, True]
    assert found["answer"][4] == predict.vqa(answerer.model, [(images[4], "why")])[0].answer
    del batch["question"]
    assert answerer(batch)["answer"][1] == predict.vqa(answerer.model, [(images[1], "where")])[0].answer
    chosen = madtp.Answerer(models / "vqa", backend="reference", question="where", candidates=["a", "b", "c"])(batch)
    assert set(chosen["answer"]) <= {"a", "b", "c"} and all(score < 0 for score in chosen["score"])


def test_tokens_of_an_instance(models):
    embedder, answerer = madtp.Embedder(models / "clip"), madtp.Answerer(models / "vqa")
    assert embedder.tokens(torch.zeros(3, 48, 48)) == 37 and embedder.tokens(torch.zeros(3, 48, 96)) == 73
    assert madtp.Embedder(models / "clip", text="text").tokens(torch.zeros(9, dtype=torch.int64)) == 9
    assert answerer.tokens((torch.zeros(3, 48, 48), torch.zeros(5, dtype=torch.int64))) == 42


def test_it_is_small_and_loads_where_it_is_called(models):
    for one in (
        madtp.Embedder(models / "clip", temperature=3.0),
        madtp.Captioner(models / "caption"),
        madtp.Answerer(models / "vqa", question="what"),
    ):
        assert len(pickle.dumps(one)) < 2_000 and one._model is None
    embedder = madtp.Embedder(models / "clip", temperature=3.0, dtype="bfloat16")
    assert embedder.model.temperature == 3.0 and embedder.model.dtype == torch.bfloat16
    copy = pickle.loads(pickle.dumps(embedder))
    assert copy._model is None and copy.model.temperature == 3.0
    for method in ("topk", {"method": "topk"}):
        ranked = madtp.Embedder(models / "clip", method=method, strength=0.25)
        assert ranked.model.pruning.name == "topk" and ranked.model.pruning.strength == 0.25
    with pytest.raises(ValueError, match="method: expected one of .*madtp.*, got 'best'"):
        _ = madtp.Embedder(models / "clip", method="best").model
    with pytest.raises(ValueError, match="strength: of no use with a model that is loaded already"):
        madtp.Embedder(embedder.model, strength=0.25)
    with pytest.raises(TypeError, match="name its source instead"):
        pickle.dumps(madtp.Embedder(embedder.model))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_cannot_be_loaded(models, images):
    with pytest.raises(ValueError, match="sees no GPU .* num_gpus=1"):
        madtp.Embedder(models / "clip", device="cuda")({"image": images})
    with pytest.raises(ValueError, match="holds a model for task 'caption'"):
        madtp.Embedder(models / "caption")({"image": images})
    with pytest.raises(ValueError, match="no column with images is known, the batch has picture"):
        madtp.Embedder(models / "clip")({"picture": images})
    with pytest.raises(ValueError, match="same length"):
        madtp.Embedder(models / "clip")({"image": images, "id": [1]})


def test_importing_and_making_one_touches_no_gpu(models, fresh):
    code = (
        "import sys, torch; torch.cuda.init = torch.cuda._lazy_init = lambda: sys.exit(3); import madtp;"
        f"madtp.Embedder({str(models / 'clip')!r}, device='cuda'); assert 'transformers' not in sys.modules"
    )
    assert fresh.run(code).returncode == 0


def test_images_that_are_none():
    for value, reason in (
        (np.zeros((2, 2, 3)), r"float64 \[2, 2, 3\]"),
        (np.zeros((2, 2, 5), dtype=np.uint8), "uint8"),
        (np.nan, "no image"),
        (7, "got int"),
        ({"bytes": None, "path": None}, "no image"),
    ):
        with pytest.raises(ValueError, match=reason):
            to_image(value)
    assert to_image({"bytes": None, "path": "a.jpg"}) == "a.jpg"
