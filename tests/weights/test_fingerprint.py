"""The fingerprint of a model changes with everything that decides its answers, and with nothing else."""

import pytest
import torch
from test_huggingface import hugging_face

import madtp
from madtp import CaptionConfig
from madtp.config import TextConfig, VisionConfig
from madtp.fingerprint import fingerprint
from madtp.pruning import MADTP
from madtp.tasks import TASKS
from madtp.weights import randomize

SIZES = CaptionConfig(
    vision=VisionConfig(image_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=1, sd_num=10, sd_dim=64),
    text=TextConfig(64, 2, 1, 96, vocab_size=200, max_position_embeddings=40, encoder_width=64, sep_token_id=3),
)


@pytest.fixture
def model():
    model = TASKS["caption"].Model(SIZES, temperature=2.0).eval()
    randomize(model)
    model.processor = TASKS["caption"].Processor(32, 200, 40, "demo")
    return model


def without_a_dictionary(model):
    """As original BLIP checkpoints are."""
    return {key: value for key, value in model.state_dict().items() if key != "space_dict"}


def test_what_was_made_up_is_the_same_in_every_process(model, tmp_path, fresh):
    torch.save(without_a_dictionary(model), tmp_path / "blip.pth")
    script = (
        "import sys, torch, madtp; from madtp.fingerprint import fingerprint\n"
        "torch.manual_seed(int(sys.argv[2])); torch.randn(3)\n"
        "model = madtp.load(sys.argv[1], 'caption', temperature=2.0)\n"
        "print(fingerprint(model, texts=False), model.space_dict.std().item())"
    )
    found = [fresh.run(script, tmp_path / "blip.pth", seed).stdout.split() for seed in "12"]
    assert found[0] == found[1]
    assert 0.9 < float(found[0][-1]) < 1.1  # official: N(0, 1)


def test_what_is_made_up_does_not_depend_on_dtype_or_on_what_else_is_missing(model):
    state = without_a_dictionary(model)
    whole = madtp.load(state, "caption")
    assert torch.equal(madtp.load(state, "caption", dtype=torch.bfloat16).space_dict, whole.space_dict.bfloat16())
    nlvr = madtp.load("random:base", "nlvr", config=madtp.NLVRConfig(SIZES.vision, SIZES.text, merge_from=1))
    kept = {key: value for key, value in nlvr.state_dict().items() if key != "space_dict" and "merge_layer" not in key}
    assert torch.equal(madtp.load(kept, "nlvr").space_dict, whole.space_dict)


def test_patched_models_make_up_the_same_dictionary():
    theirs = hugging_face("caption", torch.Generator().manual_seed(1))
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    ours = madtp.load(state, "caption")
    madtp.apply_patch(theirs, temperature=1.0)
    assert torch.equal(theirs._madtp.model.space_dict, ours.space_dict)


def test_everything_that_decides_answers_is_in_it(model):
    seen = [fingerprint(model), fingerprint(model, seed=1), fingerprint(model, seed=2), fingerprint(model, texts=False)]
    model.temperature = 2.5
    seen.append(fingerprint(model))
    model.pruning = MADTP(model.temperature, proportional_attention=True)
    seen.append(fingerprint(model))
    model.grouping = "batch"
    seen.append(fingerprint(model))
    with torch.no_grad():
        model.space_dict[0, 0] += 1e-6
    seen.append(fingerprint(model))
    model.processor = TASKS["caption"].Processor(32, 200, 39, "demo")
    seen.append(fingerprint(model))
    model.bfloat16()
    seen.append(fingerprint(model))
    assert len(set(seen)) == len(seen)


def test_nothing_else_is_in_it(model, tmp_path):
    before = fingerprint(model, seed=3)
    model.processor.tokenizer(["a", "dog and"], padding=True, truncation=True, max_length=7)  # leaves its state behind
    assert fingerprint(model, seed=3) == before
    madtp.save_pretrained(model, tmp_path)
    assert fingerprint(madtp.load(tmp_path), seed=3) == before
    assert fingerprint(model.cpu().train(), seed=3) == before
