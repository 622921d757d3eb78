"""The conformance test reads any directory of its layout: strides, temperatures and vocabularies other than the bundled ones."""

import json
import shutil

import pytest
import test_conformance as conformance
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file


def rewritten(source, target, change):
    """A copy of a family whose tensors are changed: ``change(name of the file, tensors)`` gives them."""
    target.mkdir()
    shutil.copy(source / "manifest.json", target)
    for path in source.glob("*.safetensors"):
        tensors = change(path.stem, load_file(path))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / path.name)
    return target


def chosen(tensors, cases, of_all):
    """Only those cases of every tensor with one row per case; of ragged ones, those that have a case. The others as they are."""
    made = {}
    for name, tensor in tensors.items():
        offsets = tensors.get(f"{name}.offsets")
        if name.endswith(".offsets"):
            continue
        if offsets is not None:
            stride = -(-of_all // (len(offsets) - 1))
            kept = [case // stride for case in cases if case % stride == 0]
            made[name] = torch.cat([tensor[offsets[i] : offsets[i + 1]] for i in kept])
            lengths = torch.tensor([0, *(int(offsets[i + 1] - offsets[i]) for i in kept)])
            made[f"{name}.offsets"] = lengths.cumsum(0).to(offsets.dtype)
        elif tensor.dim() and len(tensor) == of_all:
            made[name] = tensor[cases]
        else:
            made[name] = tensor
    return made


def test_every_third_case_and_other_temperatures(tmp_path, monkeypatch):
    """As the families that are kept aside: image embeddings of every third case, and no temperature of 2."""
    source = GOLDEN / "nlvr_4l"
    temperatures = load_file(source / "inputs.safetensors")["case_temperature"]
    count, stored = len(temperatures), 4
    with_rows = [case for case in range(0, count, stored) if temperatures[case] != 2]
    others = [case for case in range(count) if case % stored and temperatures[case] != 2]
    cases = [case for first in with_rows for case in (first, others.pop(0), others.pop(0))]

    def change(file, tensors):
        if file == "inputs":
            return {k: v[cases] if k.startswith("case_") else v for k, v in tensors.items()}
        if file != "golden":
            return tensors
        made = chosen(tensors, cases, count)
        every, before = max(1, len(cases) // 12), count // 12
        for name in (
            "sd_img_ft",
            "sd_txt_ft",
        ):  # summaries of cases that had one; what the rule asks for beyond is left out
            rows = []
            for case in cases[::every]:
                if case % before:
                    break
                rows.append(tensors[name][case // before])
            made[name] = torch.stack(rows)
        return made

    family = rewritten(source, tmp_path / "nlvr_other", change)
    golden = load_file(family / "golden.safetensors")
    rows = conformance.stored_rows(golden["image_embeds.offsets"], golden["vision.tokens_out"])
    assert list(rows) == list(range(0, len(cases), 3))
    compared = []
    check_rows = conformance.check_rows
    monkeypatch.setattr(conformance, "check_rows", lambda *given: (compared.append(given[-1]), check_rows(*given)))
    conformance.test_nlvr(family, "reference", "pair")
    assert sum(what.startswith("image 0") for what in compared) > len(rows) // 2
    # Through the interpreter, which is too slow for all cases, one is compared at whatever temperature there is.
    monkeypatch.setattr(conformance, "interpreted", lambda backend: True)
    compared.clear()
    conformance.test_nlvr(family, "reference", "pair")
    assert len(compared) >= 1


def test_a_tensor_whose_rows_fit_no_stride():
    with pytest.raises(AssertionError, match="no stride gives 2 of 6 cases the rows they have"):
        conformance.stored_rows(torch.tensor([0, 3, 6]), torch.arange(12).view(6, 2))


def test_a_text_of_one_token():
    """[ENC] alone: no token but the protected one, and so no origins."""
    row, ids = torch.randn(1, 8), torch.tensor([0])
    conformance.check_rows(row, ids, row, [], 0, "alone")
    with pytest.raises(AssertionError, match="alone"):
        conformance.check_rows(row + 1, ids, row, [], 0, "alone")


def test_a_clip_of_which_no_text_is_pruned(tmp_path):
    """As where texts are short, so that their last token stands too far behind."""

    def change(file, tensors):
        if file != "golden":
            return tensors
        return tensors | {"text.robust": tensors["text.robust"] * (1 - tensors["text.pruned"].amax(1))}

    family = rewritten(GOLDEN / "clip", tmp_path / "clip_other", change)
    with pytest.raises(pytest.skip.Exception, match="none of its texts"):
        conformance.test_clip_texts_keep_the_official_tokens_in_the_order_of_a_gpu(family, "reference")


def test_words_whose_id_is_that_of_padding(tmp_path):
    """Two entries of the vocabulary change places: 0, which the official search pads with, and the word that is written most."""
    source = GOLDEN / "caption"
    generated = load_file(source / "golden.safetensors")["generated_ids"]
    prompt = len(load_file(source / "inputs.safetensors")["generate_prompt_ids"])
    counts = generated[:, prompt:].flatten().bincount(minlength=200)
    counts[:3] = 0
    word = int(counts.argmax())
    places = torch.arange(200)
    places[[0, word]] = torch.tensor([word, 0])

    def swapped(ids):
        """In rows that end at [SEP], which is 2, what follows is padding and stays."""
        ended = (ids == 2).long().cumsum(-1) - (ids == 2).long() > 0
        return torch.where(ended & (ids == 0), ids, places.to(ids.dtype)[ids.long()])

    def change(file, tensors):
        made = dict(tensors)
        for name, tensor in tensors.items():
            if file == "state_dict" and tensor.dim() and len(tensor) == 200:
                made[name] = tensor[places]
            elif (file == "inputs" and name in ("caption_ids", "generate_prompt_ids")) or (
                file == "golden" and name == "generated_ids"
            ):
                made[name] = swapped(tensor)
            elif file == "golden" and name == "logits":
                made[name] = tensor[:, places]
        return made

    family = rewritten(source, tmp_path / "caption_other", change)
    rows = load_file(family / "golden.safetensors")["generated_ids"]
    inside = [conformance.written(row, prompt, 2) for row in rows]
    assert (
        any(0 in words for words in inside)
        and json.loads((family / "manifest.json").read_text())["family"] == "caption"
    )
    conformance.test_caption(family, "reference")
