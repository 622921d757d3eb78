"""Directories that earlier revisions saved still load, and give what they gave.

`tests/data/earlier` holds two, with the results of the revisions that wrote them: `nlvr` of a9f078f (sizes without
`layer_norm_eps`, a temperature) and `clip` of 92140b1 (0.1.0; `use_sizes` too, towers without the sizes that came later).
"""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import madtp
from madtp import CheckpointError
from madtp.pruning import MADTP
from madtp_kernels import RaggedBatch, attention_with_importance, prune

EARLIER = Path(__file__).parents[1] / "data" / "earlier"
TEXTS = {
    "nlvr": [torch.tensor([39, 7, 8, 9, 10, 11, 12, 3]), torch.tensor([39, 20, 3])],
    "clip": [torch.tensor([5, 7, 8, 9, 10, 11, 12, 39]), torch.tensor([5, 20, 39])],
}


def results(model, task):
    """Everything that was recorded, and the tokens that each vision layer kept."""
    pixels = load_file(EARLIER / task / "expected.safetensors")["pixels"]
    with torch.inference_mode():
        output = model(pixels, TEXTS[task])
    names = {"nlvr": ("logits",), "clip": ("image_features", "text_features")}[task]
    found = {name: getattr(output, name) for name in names}
    return {"pixels": pixels, "kept": torch.stack([layer.lengths for layer in output.vision]).int(), **found}


@pytest.fixture(params=["nlvr", "clip"])
def task(request):
    return request.param


def test_an_earlier_directory_gives_what_it_gave(task):
    model = madtp.load(EARLIER / task, backend="reference")
    expected, found = load_file(EARLIER / task / "expected.safetensors"), results(model, task)
    assert expected.keys() == found.keys() and torch.equal(expected["kept"], found["kept"])
    assert expected["kept"][-1].max() < 10  # or nothing was pruned
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_it_is_saved_in_the_present_form_with_the_same_bits(task, tmp_path):
    earlier = madtp.load(EARLIER / task, backend="reference")
    madtp.save_pretrained(earlier, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["pruning"]["method"] == "madtp" and "temperature" not in settings
    present = madtp.load(tmp_path, backend="reference")
    assert present.pruning == earlier.pruning == MADTP(1.5, proportional_attention=task == "clip")
    assert present.config == earlier.config
    for value, same in zip(results(earlier, task).values(), results(present, task).values(), strict=True):
        assert torch.equal(value, same)
    weights, before = load_file(tmp_path / "model.safetensors"), load_file(EARLIER / task / "model.safetensors")
    assert sorted(value.flatten().tolist() for value in weights.values()) == sorted(
        value.flatten().tolist() for value in before.values()
    )


SPELLINGS = {
    "a temperature": {"temperature": 1.5},
    "without sizes": {"temperature": 1.5, "use_sizes": False},
    "with sizes": {"temperature": 1.5, "use_sizes": True},
    "a rule": {"pruning": {"method": "madtp", "temperature": 1.5}},
    "a rule with sizes": {
        "pruning": {
            "method": "madtp",
            "temperature": 1.5,
            "proportional_attention": True,
            "streams": ["vision", "text"],
        }
    },
    "dense": {"temperature": 0.0},
}


@pytest.mark.parametrize("how", SPELLINGS)
def test_every_spelling_of_the_pruning_that_was_ever_saved(how, tmp_path):
    settings = json.loads((EARLIER / "nlvr" / "config.json").read_text())
    del settings["temperature"]
    (tmp_path / "config.json").write_text(json.dumps({**settings, **SPELLINGS[how]}))
    shutil.copy(EARLIER / "nlvr" / "model.safetensors", tmp_path)
    model = madtp.load(tmp_path, backend="reference")
    assert model.pruning == MADTP(0.0 if how == "dense" else 1.5, proportional_attention=how.endswith("with sizes"))


def test_two_spellings_at_once_are_refused(tmp_path):
    settings = json.loads((EARLIER / "nlvr" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, **SPELLINGS["a rule"]}))
    shutil.copy(EARLIER / "nlvr" / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="pruning or temperature, got both"):
        madtp.load(tmp_path)


# ---- names that 0.1.0 documented


def test_the_former_module_warns():
    sys.modules.pop("madtp.checkpoints", None)
    with pytest.warns(DeprecationWarning, match="renamed to madtp.weights"):
        former = importlib.import_module("madtp.checkpoints")
    assert former.load is madtp.load and former.save_pretrained is madtp.save_pretrained


def test_former_arguments_warn_and_do_what_they_did():
    model, pixels = (
        madtp.load(EARLIER / "nlvr", backend="reference"),
        load_file(EARLIER / "nlvr" / "expected.safetensors"),
    )
    with torch.inference_mode(), pytest.warns(DeprecationWarning) as warned:
        found = model(pixels["pixels"], TEXTS["nlvr"], temperature=1.5, summaries=True)
    assert {str(warning.message).split(":")[0] for warning in warned} == {"temperature", "summaries"}
    assert found.alignment_features is not None
    torch.testing.assert_close(found.logits, pixels["logits"], rtol=1e-5, atol=1e-5)
    with model.dense():
        assert not model.pruning.active
    assert model.temperature == 1.5


def test_operations_alone_as_they_were_shown():
    """The example of docs/how-it-works.md, in small."""
    tokens = RaggedBatch.from_list([torch.randn(57, 48), torch.randn(19, 48)])
    qkv = torch.randn(tokens.values.shape[0], 3, 3, 16)
    out, lse, received, cls = attention_with_importance(*qkv.unbind(1), tokens.cu_seqlens, tokens.max_seqlen)
    result = prune(tokens, tokens.values, torch.randn(10, 48), received, cls, temperature=2.0)
    assert out.shape == (76, 3, 16) and lse.shape == (3, 76)
    assert (result.compacted.tokens.lengths <= tokens.lengths).all() and result.threshold.shape == (2,)
