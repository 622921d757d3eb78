"""Against tensors that the official MADTP code produced: kept tokens identical, numbers within tolerance, per backend.

    pytest tests/test_conformance.py                 the families in tests/golden
    pytest tests/test_conformance.py --golden DIR    any other directory of the same layout

Cases that the manifest does not mark robust may legitimately flip a borderline token and are not compared.
"""

import dataclasses
import itertools
import json
import re

import pytest
import torch
from conftest import GOLDEN, golden_families
from helpers import DEVICE, backends_here, interpreted
from safetensors.torch import load_file

import madtp
from madtp import CaptionConfig, NLVRConfig, RetrievalConfig, VQAConfig
from madtp.config import CLIPConfig, CLIPTextConfig, TextConfig, VisionConfig
from madtp.guidance import QueryModel, alignment_features
from madtp.pruning import MADTP
from madtp.pruning import official as official_rules
from madtp.vision import VisionTransformer
from madtp.weights import from_official
from madtp_kernels import RaggedBatch, attention_importance, compact, score_tokens

# The official float32 run differs from its own float64 run by up to 3e-5; the golden README calls 1e-4 ample.
TOLERANCE = dict(atol=1e-4, rtol=1e-4)
MARGIN = 1e-4  # relative distance from the threshold below which a decision may flip; the manifests use the same


def pytest_generate_tests(metafunc):
    if "family" not in metafunc.fixturenames:
        return
    kind = metafunc.function.family_kind
    families = [f for f in golden_families(metafunc.config) if kind(json.loads((f / "manifest.json").read_text()))]
    rows = [
        pytest.param(family, *backend.values, marks=backend.marks, id=f"{family.name}-{backend.values[0]}")
        for family in families
        for backend in backends_here()
    ]
    metafunc.parametrize("family, backend", rows)


def for_family(kind):
    """Mark a test as belonging to the families whose manifest satisfies ``kind``."""

    def mark(function):
        function.family_kind = kind
        return function

    return mark


class Golden:
    """One family's tensors; attribute access opens the file of that name."""

    def __init__(self, directory):
        self.directory = directory
        self.manifest = json.loads((directory / "manifest.json").read_text())
        self.config = self.manifest["config"]

    def __getattr__(self, name):
        tensors = load_file(self.directory / f"{name}.safetensors")
        setattr(self, name, tensors)
        return tensors

    def weights(self):
        return {k: v.float() if v.is_floating_point() else v for k, v in self.state_dict.items()}

    def sizes(self, kind, section):
        known = {f.name for f in dataclasses.fields(kind)}
        return kind(**{k: v for k, v in self.config[section].items() if k in known})

    def told(self, tensor, pattern, otherwise):
        """A number that the manifest's words about a tensor tell."""
        meaning = self.manifest.get("files", {}).get("golden.safetensors", {}).get(tensor, {}).get("meaning", "")
        found = re.search(pattern, meaning)
        return int(found[1]) if found else otherwise


def pixels_of(images_u8):
    return images_u8.float() / 64 - 2


def tokens_by_origin(ids, n):
    """Our ids to the golden's: original token j = 0..n-1, n + l for the token merged in layer l. Without token 0."""
    return [(-1 - i) + n if i < 0 else i - 1 for i in ids.tolist()[1:]]


def check_stream(trace, sample, golden, prefix, case, column):
    """Every layer of one sample keeps exactly the official tokens, and scored them alike."""
    n = int(golden[f"{prefix}.tokens_in"][case, 0])
    incoming = previous_official = list(range(n))
    for layer, record in enumerate(trace):
        cu = record.cu_seqlens
        ours = tokens_by_origin(record.ids[cu[sample] : cu[sample + 1]], n)
        where = f"{prefix} case {case} layer {layer}"
        assert len(ours) == int(golden[f"{prefix}.tokens_out"][case, layer]), where
        theirs = [i for i in golden[f"{prefix}.origin"][case, layer, column].tolist() if i != -1]
        assert set(ours) == set(theirs), where
        if record.importance is not None:
            cu_in = record.cu_seqlens_in
            threshold = golden[f"{prefix}.threshold"][case, layer, column]
            torch.testing.assert_close(record.threshold[sample].cpu(), threshold, **TOLERANCE, msg=where)
            if f"{prefix}.importance" in golden:
                scores = record.importance[cu_in[sample] + 1 : cu_in[sample + 1]].cpu()
                official = golden[f"{prefix}.importance"][case, layer, column, : len(incoming)]
                expected = dict(zip(previous_official, official.tolist(), strict=True))
                torch.testing.assert_close(
                    scores, torch.tensor([expected[i] for i in incoming]), **TOLERANCE, msg=where
                )
        incoming, previous_official = ours, theirs


def cases_by_temperature(temperatures, robust, backend):
    """Cases of each temperature: all, or the first that can be compared where CUDA's sources are emulated. Through the
    interpreter one that prunes and can be compared, of a middling temperature, or a dense one where there is none.
    """
    if interpreted(backend):
        above = sorted(t for t in temperatures.unique().tolist() if t > 0)
        for temperature in [*sorted(above, key=lambda t: abs(above.index(t) - len(above) // 2)), 0.0]:
            cases = ((temperatures == temperature) & robust.bool()).nonzero().flatten().tolist()
            if cases:
                yield temperature, cases[:1]
                return
        return
    for temperature in temperatures.unique().tolist():
        cases = (temperatures == temperature).nonzero().flatten().tolist()
        if emulated(backend):
            cases = [case for case in cases if robust[case]][:2]
        if cases:
            yield temperature, cases


def emulated(backend):
    """Whether CUDA's sources run on the CPU (test_cuda_sources.py)."""
    return backend == "cuda" and DEVICE == "cpu"


def stored_rows(offsets, tokens_out):
    """Which cases a ragged tensor holds, one every so many: {case: slice of its rows}.

    The stride is the one at which every case has the rows that it should have: its tokens at the end, and CLS.
    """
    lengths, cases = offsets.diff().tolist(), len(tokens_out)
    strides = [stride for stride in range(1, cases + 1) if len(range(0, cases, stride)) >= len(lengths)]
    for stride in reversed(strides):
        stored = range(0, cases, stride)[: len(lengths)]
        if lengths == [int(tokens_out[case, -1]) + 1 for case in stored]:
            return {case: slice(*offsets[i : i + 2].tolist()) for i, case in enumerate(stored)}
    raise AssertionError(f"no stride gives {len(lengths)} of {cases} cases the rows they have")


def check_rows(ours, ids, official, origin, n, where):
    """Token rows agree, matched by what they stand for; row 0 is CLS."""
    by_origin = dict(zip(origin, official[1:], strict=True))
    expected = torch.stack([official[0], *(by_origin[i] for i in tokens_by_origin(ids, n))])
    torch.testing.assert_close(ours.cpu(), expected, **TOLERANCE, msg=where)


# ---- unit functions -----------------------------------------------------------------------------------------------


# Of the batches of four, those that slow backends run: one that is pruned and one that is not. N and temperature.
FEW = {(16, 1.0), (16, 5.0)}


def is_unit(manifest):
    return manifest["family"] == "unit"


@for_family(is_unit)
def test_reduction_rule(family, backend):
    golden = Golden(family)
    inputs, outputs = golden.reduce_token_inputs, golden.reduce_token_outputs
    compared = 0
    for name, case in golden.manifest["cases"].items():
        if (
            (interpreted(backend) or emulated(backend))
            and case["B"] > 1
            and (case["N"], case["temperature"]) not in FEW
        ):
            continue
        x, probabilities, cls, alignment = (
            inputs[f"{name}.{key}"].to(DEVICE) for key in ("x", "self_attn", "cls_attn", "token_attn")
        )
        batch, heads, length, _ = probabilities.shape
        cu = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * length
        tokens = batch * length

        def packed(t, batch=batch, tokens=tokens):  # [B, N, ...] -> [T, ...] with a token 0 in front of each sample
            first = t.new_zeros(batch, 1, *t.shape[2:])
            return torch.cat([first, t], 1).reshape(tokens, *t.shape[2:])

        # Queries log P against unit keys give back the official probabilities, with a log-sum-exp of 0.
        q = probabilities.clamp_min(1e-30).log().permute(0, 2, 1, 3).reshape(tokens, heads, length)
        k = torch.eye(length, device=DEVICE)[:, None].expand(length, heads, length).repeat(batch, 1, 1)
        lse = q.new_zeros(heads, tokens)
        received, _ = attention_importance(q, k, q, lse, cu, length, scale=1.0, backend=backend)

        entries = torch.eye(alignment.shape[2], device=DEVICE)
        importance, threshold = score_tokens(
            packed(alignment), entries, received, packed(cls), cu, length, case["temperature"], backend=backend
        )
        official = outputs[f"{name}.importance"]
        scale = official.abs().amax().item()  # mixed-sign alignment makes some scores large
        ours = importance.reshape(batch, length)[:, 1:].cpu()
        torch.testing.assert_close(ours, official, atol=1e-4 * max(scale, 1), rtol=1e-4, msg=name)
        torch.testing.assert_close(
            threshold.cpu(), outputs[f"{name}.threshold"], atol=1e-4 * max(scale, 1), rtol=1e-4, msg=name
        )

        theta = outputs[f"{name}.threshold"][:, None]
        if ((official - theta).abs() / official.abs().mean()).min() < MARGIN:
            continue
        compacted = {
            min_keep: compact(
                RaggedBatch(packed(x), cu, length),
                importance,
                threshold,
                groups=torch.zeros(batch, dtype=torch.int32, device=DEVICE),
                min_keep=torch.full((batch,), min_keep, dtype=torch.int32, device=DEVICE),
                backend=backend,
            )
            for min_keep in {0, golden.config["clip_max_keep"]}
        }
        for variant in ("vision", "text_nlvr", "text_med", "clip"):
            facts = case[variant]
            result = compacted[golden.config["clip_max_keep"] if variant == "clip" else 0]
            rows = result.tokens.to_list()
            ids = result.tokens.with_values(result.ids).to_list()
            where = f"{name} {variant}"
            if not facts["pruned"]:
                assert [len(r) for r in rows] == [length] * batch, where
                continue
            for b in range(batch):
                kept = outputs[f"{name}.{variant}.indices"][b].tolist()
                official_x = outputs[f"{name}.{variant}.x"][b]
                assert [i - 1 for i in ids[b].tolist()[1:-1]] == sorted(kept), where
                assert ids[b][-1] == -1, where
                # The text variants carry the tokens' order too; rows are matched by position.
                expected = torch.stack([official_x[kept.index(i)] for i in sorted(kept)])
                torch.testing.assert_close(rows[b][1:-1].cpu(), expected, atol=0, rtol=0, msg=where)
                size = official_x[-1].abs().amax().item()
                torch.testing.assert_close(
                    rows[b][-1].cpu(), official_x[-1], atol=1e-4 * max(1, size), rtol=1e-4, msg=where
                )
                compared += 1
    assert compared > 0


@for_family(is_unit)
def test_query_model(family, backend):
    golden = Golden(family)
    tensors = golden.query_model
    for name, case in golden.manifest["query_model_cases"].items():
        ft, dictionary = tensors[f"{name}.ft"], tensors[f"{name}.sd"]
        model = QueryModel(case["ft_dim"], case["sd_dim"], case["map_func"])
        if case["map_func"]:
            model.load_state_dict({k: tensors[f"{name}.{k}"] for k in ("q_map.0.weight", "q_map.0.bias")})
        with torch.inference_mode():
            entries, bias = model.fold(dictionary)
            alignment = ft @ entries.mT + (0 if bias is None else bias)
            torch.testing.assert_close(alignment, tensors[f"{name}.token_att"], **TOLERANCE)
            tokens = RaggedBatch.from_list([torch.cat([f.new_zeros(1, f.shape[1]), f]) for f in ft])
            summary = alignment_features(tokens, dictionary, model)
        torch.testing.assert_close(summary, tensors[f"{name}.att_ft"], **TOLERANCE)


# ---- vision transformer alone -------------------------------------------------------------------------------------


@for_family(lambda manifest: set(manifest["config"]) >= {"vision", "n_inputs"})
def test_vision_transformer(family, backend):
    golden = Golden(family)
    results = golden.golden
    model = VisionTransformer(golden.sizes(VisionConfig, "vision")).eval()
    weights = golden.weights()
    dictionary = weights.pop("space_dict").to(DEVICE)
    model.load_state_dict({k.removeprefix("visual_encoder."): v for k, v in from_official(weights).items()})
    model.to(DEVICE)
    pixels = pixels_of(golden.inputs["images_u8"])
    case_temperature, case_input = golden.inputs["case_temperature"], golden.inputs["case_input"]
    summaries = results["sd_img_ft"]
    compared = 0
    for temperature, cases in cases_by_temperature(case_temperature, results["vision.robust"], backend):
        with torch.inference_mode():
            out = model(
                pixels[case_input[cases]].to(DEVICE),
                dictionary,
                MADTP(temperature, backend=backend),
                alignment_features=True,
            )
        rows = out.tokens.to_list()
        for sample, case in enumerate(cases):
            if not results["vision.robust"][case]:
                continue
            check_stream(out.trace, sample, results, "vision", case, 0)
            start, stop = results["output.offsets"][case : case + 2]
            record = out.trace[-1]
            ids = record.ids[record.cu_seqlens[sample] : record.cu_seqlens[sample + 1]]
            origin = [i for i in results["vision.origin"][case, -1, 0].tolist() if i != -1]
            n = int(results["vision.tokens_in"][case, 0])
            check_rows(rows[sample], ids, results["output"][start:stop], origin, n, f"output of case {case}")
            if case % 2 == 0 and case // 2 < len(summaries):
                torch.testing.assert_close(out.alignment_features[sample].cpu(), summaries[case // 2], **TOLERANCE)
            compared += 1
    assert compared > 0


# ---- BLIP-NLVR ----------------------------------------------------------------------------------------------------


def nlvr_model(golden, grouping, backend):
    config = NLVRConfig(golden.sizes(VisionConfig, "vision"), golden.sizes(TextConfig, "text"))
    return madtp.load(golden.weights(), config=config, grouping=grouping, backend=backend, device=DEVICE)


@pytest.mark.parametrize("grouping", ["pair", "instance"])
@for_family(lambda manifest: manifest["family"].startswith("nlvr"))
def test_nlvr(family, backend, grouping):
    golden = Golden(family)
    if interpreted(backend) and golden.config["text"]["num_hidden_layers"] > 4:
        pytest.skip("too much for the interpreter, which runs a smaller family")
    results = golden.golden if grouping == "pair" else golden.golden_decoupled
    model = nlvr_model(golden, grouping, backend)
    pixels = pixels_of(golden.inputs["images_u8"])
    texts = [
        ids[:length] for ids, length in zip(golden.inputs["input_ids"], golden.inputs["lengths"].tolist(), strict=True)
    ]
    case_temperature, case_pair = golden.inputs["case_temperature"], golden.inputs["case_pair"]
    every = max(1, len(case_pair) // 12)  # of the summaries, as every manifest says
    streams = ["vision", "text"] if grouping == "pair" else ["vision0", "vision1", "text"]
    robust = torch.stack([results[f"{stream}.robust"] for stream in streams]).all(0)
    embedded = {}
    if grouping == "pair":
        embedded = stored_rows(results["image_embeds.offsets"], results["vision.tokens_out"])
    compared = 0
    for temperature, cases in cases_by_temperature(case_temperature, robust, backend):
        pairs = case_pair[cases].long()
        both = torch.cat([pixels[2 * pairs], pixels[2 * pairs + 1]])
        with torch.inference_mode():
            out = model(both, [texts[p] for p in pairs.tolist()], pruning=temperature, alignment_features=True)
        states, embeds = out.last_hidden_state.to_list(), out.image_embeds.to_list()
        for sample, case in enumerate(cases):
            if not robust[case]:
                continue
            for image in (0, 1):
                prefix, column = ("vision", image) if grouping == "pair" else (f"vision{image}", 0)
                check_stream(out.vision, sample + image * len(cases), results, prefix, case, column)
            check_stream(out.text, sample, results, "text", case, 0)
            torch.testing.assert_close(out.logits[sample].cpu(), results["logits"][case], **TOLERANCE)
            compared += 1
            if grouping == "instance":
                continue
            hidden = states[sample][0].cpu()
            torch.testing.assert_close(hidden, results["hidden_state"][case], **TOLERANCE)
            start, stop = results["last_hidden_state.offsets"][case : case + 2]
            record = out.text[-1]
            ids = record.ids[record.cu_seqlens[sample] : record.cu_seqlens[sample + 1]]
            origin = [i for i in results["text.origin"][case, -1, 0].tolist() if i != -1]
            n = int(results["text.tokens_in"][case, 0])
            official = results["last_hidden_state"][start:stop]
            check_rows(states[sample], ids, official, origin, n, f"text of case {case}")
            if case in embedded:
                for image in (0, 1):
                    row = sample + image * len(cases)
                    record = out.vision[-1]
                    ids = record.ids[record.cu_seqlens[row] : record.cu_seqlens[row + 1]]
                    origin = [i for i in results["vision.origin"][case, -1, image].tolist() if i != -1]
                    n = int(results["vision.tokens_in"][case, 0])
                    official = results["image_embeds"][embedded[case], image]
                    check_rows(embeds[row], ids, official, origin, n, f"image {image} of case {case}")
            if case % every == 0 and case // every < len(results["sd_txt_ft"]):
                vision, text = out.alignment_features
                torch.testing.assert_close(text[sample].cpu(), results["sd_txt_ft"][case // every], **TOLERANCE)
                for image in (0, 1):
                    torch.testing.assert_close(
                        vision[sample + image * len(cases)].cpu(),
                        results["sd_img_ft"][case // every, image],
                        **TOLERANCE,
                    )
    assert compared > 0


# ---- the other BLIP models ----------------------------------------------------------------------------------------


def blip_model(golden, config, backend, **sizes):
    """The model of a family."""
    text = dataclasses.replace(golden.sizes(TextConfig, "text"), sep_token_id=sep_of(golden))
    config = config(golden.sizes(VisionConfig, "vision"), text, **sizes)
    return madtp.load(golden.weights(), config=config, backend=backend, device=DEVICE)


def sep_of(golden):
    """The id of [SEP], with which texts end."""
    return golden.told("generated_ids", r"eos=sep\((\d+)\)", 2)


def unpadded(padded, lengths):
    return [ids[:length].long() for ids, length in zip(padded, lengths.tolist(), strict=True)]


def check_final_rows(stream, trace, sample, results, prefix, case, official):
    """The final tokens of one sample, matched by what they stand for."""
    record = trace[-1]
    ids = record.ids[record.cu_seqlens[sample] : record.cu_seqlens[sample + 1]]
    origin = [i for i in results[f"{prefix}.origin"][case, -1, 0].tolist() if i != -1]
    n = int(results[f"{prefix}.tokens_in"][case, 0])
    check_rows(stream[sample], ids, official, origin, n, f"final tokens of {prefix}, case {case}")


def written(official, prompt, sep):
    """What follows the prompt in a row of official generated ids, up to [SEP]. One without is as long as the row: only
    behind [SEP] the official search pads, and with an id that may be a word's."""
    ids = official.tolist()[prompt:]
    return ids[: ids.index(sep)] if sep in ids else ids


@for_family(lambda manifest: manifest["family"].startswith("caption"))
def test_caption(family, backend):
    golden = Golden(family)
    results, inputs = golden.golden, golden.inputs
    model = blip_model(golden, CaptionConfig, backend)
    pixels, texts = pixels_of(inputs["images_u8"]), unpadded(inputs["caption_ids"], inputs["lengths"])
    prompt, items = inputs["generate_prompt_ids"].long(), inputs["case_item"].tolist()
    embedded = stored_rows(results["image_embeds.offsets"], results["vision.tokens_out"])
    longest = golden.told("generated_ids", r"max_length=(\d+)", results["generated_ids"].shape[1])
    compared = 0
    for temperature, cases in cases_by_temperature(inputs["case_temperature"], results["vision.robust"], backend):
        chosen = [items[case] for case in cases]
        with torch.inference_mode():
            out = model(pixels[chosen], [texts[i] for i in chosen], pruning=temperature)
            captions = model.generate(out.images, prompt, max_length=longest)
        for sample, case in enumerate(cases):
            if not results["vision.robust"][case]:
                continue
            check_stream(out.vision, sample, results, "vision", case, 0)
            if case in embedded:
                official = results["image_embeds"][embedded[case]]
                check_final_rows(out.images, out.vision, sample, results, "vision", case, official)
            start, stop = results["logits.offsets"][case : case + 2]
            official = results["logits"][start:stop]
            torch.testing.assert_close(out.logits[sample][-len(official) :].cpu(), official, **TOLERANCE)
            expected = written(results["generated_ids"][case], len(prompt), sep_of(golden))
            assert captions[sample].tolist() == expected, f"caption of case {case}"
            compared += 1
    assert compared > 0


@for_family(lambda manifest: manifest["family"].startswith("vqa"))
def test_vqa(family, backend):
    golden = Golden(family)
    results, inputs = golden.golden, golden.inputs
    model = blip_model(golden, VQAConfig, backend)
    pixels = pixels_of(inputs["images_u8"])
    questions = unpadded(inputs["question_ids"], inputs["question_lengths"])
    answers = unpadded(inputs["answer_ids"], inputs["answer_atts"].sum(1))
    items, k = inputs["case_item"].tolist(), results["topk_ids"].shape[1]
    longest = golden.told("generated_ids", r"max_length=(\d+)", results["generated_ids"].shape[1])
    robust = results["vision.robust"] & results["text.robust"]
    compared = 0
    for temperature, cases in cases_by_temperature(inputs["case_temperature"], robust, backend):
        chosen = [items[case] for case in cases]
        with torch.inference_mode():
            out = model(pixels[chosen], [questions[i] for i in chosen], pruning=temperature)
            ranking = model.rank(out.questions, answers, k=k)
            words = model.generate(out.questions, max_length=longest)
        for sample, case in enumerate(cases):
            if not robust[case]:
                continue
            check_stream(out.vision, sample, results, "vision", case, 0)
            check_stream(out.text, sample, results, "text", case, 0)
            start, stop = results["question_states.offsets"][case : case + 2]
            official = results["question_states"][start:stop]
            check_final_rows(out.questions, out.text, sample, results, "text", case, official)
            torch.testing.assert_close(
                ranking.first_token_probabilities[sample].cpu(), results["topk_probs"][case], **TOLERANCE
            )
            ours = dict(zip(ranking.candidates[sample].tolist(), ranking.scores[sample].tolist(), strict=True))
            theirs = dict(zip(results["topk_ids"][case].tolist(), results["log_probs_sum"][case].tolist(), strict=True))
            for candidate in ours.keys() & theirs.keys():
                assert ours[candidate] == pytest.approx(theirs[candidate], abs=1e-4, rel=1e-4), f"case {case}"
            if ours.keys() == theirs.keys():
                assert int(ranking.best[sample]) == int(results["max_ids"][case]), f"answer of case {case}"
            # Candidates with the same first word are equally likely; only between such may the last places go either way.
            last = answers[int(results["topk_ids"][case, -1])][1]
            assert all(answers[candidate][1] == last for candidate in ours.keys() ^ theirs.keys()), f"case {case}"
            expected = written(results["generated_ids"][case], 1, sep_of(golden))
            assert words[sample].tolist() == expected, f"words of case {case}"
            compared += 1
    assert compared > 0


@pytest.mark.parametrize("text_mode", ["clean", "compat"])
@for_family(lambda manifest: manifest["family"].startswith("retrieval"))
def test_retrieval(family, backend, text_mode):
    golden = Golden(family)
    results, inputs = golden.golden, golden.inputs
    layout = {"clean": "exact", "compat": "pad35"}[text_mode]
    model = blip_model(golden, RetrievalConfig, backend, proj_dim=golden.config["proj_dim"], text_mode=text_mode)
    pixels = pixels_of(inputs["images_u8"])
    texts = unpadded(inputs["text_ids"], inputs["lengths"])
    pairs = inputs["itm_pairs"].tolist()
    temperatures = inputs["temperatures"].repeat_interleave(len(texts))
    robust = results["vision.robust"] & results[f"{layout}.text.robust"]
    compared = 0
    for temperature, cases in cases_by_temperature(temperatures, robust, backend):
        number, items = cases[0] // len(texts), [case % len(texts) for case in cases]
        chosen_pairs = [pair for pair in pairs if set(pair) <= set(items)]
        with torch.inference_mode():
            out = model(pixels[items], [texts[item] for item in items], pruning=temperature)
        for sample, (case, item) in enumerate(zip(cases, items, strict=True)):
            if results["vision.robust"][case]:
                check_stream(out.vision, sample, results, "vision", case, 0)
                official = results["image_feat"][number, item]
                torch.testing.assert_close(out.image_embeds[sample].cpu(), official, **TOLERANCE)
                compared += 1
            if results[f"{layout}.text.robust"][case]:
                check_stream(out.text, sample, results, f"{layout}.text", case, 0)
                official = results[f"{layout}.text_feat"][number, item]
                torch.testing.assert_close(out.text_embeds[sample].cpu(), official, **TOLERANCE)
                compared += 1
        if not chosen_pairs:
            continue
        places = [[items.index(item) for item in pair] for pair in chosen_pairs]
        with torch.inference_mode():
            matches = model.match(out.images, [texts[item] for item in items], places, pruning=temperature)
        for sample, ours in enumerate(matches.order.tolist()):
            pair = pairs.index(chosen_pairs[ours])
            case = number * len(pairs) + pair
            image_case = number * len(texts) + pairs[pair][0]
            if results[f"{layout}.itm.robust"][case] and results["vision.robust"][image_case]:
                check_stream(matches.text, sample, results, f"{layout}.itm", case, 0)
                official = results[f"{layout}.itm_logits"][number, pair]
                torch.testing.assert_close(matches.logits[ours].cpu(), official, **TOLERANCE)
                compared += 1
    assert compared > 0


@for_family(lambda manifest: manifest["family"].startswith("retrieval"))
def test_retrieval_in_official_batches(family, backend):
    """All images and all texts in one official batch, which keeps the batch's maximum of everything.

    The batched runs tell no margins, so that another set may have decisions that legitimately flip: the bundled one has none.
    """
    golden = Golden(family)
    if family.parent != GOLDEN or interpreted(backend):
        pytest.skip("for the bundled family only, and too much for the interpreter")
    results, inputs = golden.batched, golden.inputs
    model = blip_model(golden, RetrievalConfig, backend, proj_dim=golden.config["proj_dim"], text_mode="compat")
    model.grouping = "batch"
    pixels, texts = pixels_of(inputs["images_u8"]), unpadded(inputs["text_ids"], inputs["lengths"])
    for number, temperature in enumerate(inputs["temperatures"].tolist()):
        with torch.inference_mode():
            out = model(pixels, texts, pruning=temperature)
        for trace, official in ((out.vision, "vision_tokens_out"), (out.text, "text_tokens_out")):
            for record, prunable in zip(trace, results[official][number].tolist(), strict=True):
                assert record.lengths.tolist() == [prunable + 1] * len(texts)
        torch.testing.assert_close(out.text_embeds.cpu(), results["text_feat"][number], **TOLERANCE)


# ---- CLIP ---------------------------------------------------------------------------------------------------------


def clip_model(golden, backend):
    vision, text = golden.config["vision"], golden.config["text"]
    sizes = {f.name: vision[f.name] for f in dataclasses.fields(VisionConfig) if f.name in vision}
    config = CLIPConfig(
        vision=VisionConfig(**sizes | {"map_func": True}),  # the towers have maps, whatever the manifest says of BLIP's
        text=CLIPTextConfig(
            hidden_size=text["width"],
            num_hidden_layers=text["layers"],
            num_attention_heads=text["heads"],
            intermediate_size=4 * text["width"],
            vocab_size=text["vocab_size"],
            max_position_embeddings=text["context_length"],
        ),
        embed_dim=golden.config["embed_dim"],
        text_mode="compat",
    )
    # The scale is the one weight that the golden state dict leaves out.
    weights = golden.weights() | {"logit_scale": torch.zeros(())}
    return madtp.load(weights, config=config, backend=backend, device=DEVICE)


def clip_cases(golden, backend, robust):
    """For every temperature the items whose cases are compared: (temperature index, temperature, items, their cases)."""
    items = len(golden.inputs["images_u8"])
    temperatures = golden.inputs["temperatures"].repeat_interleave(items)
    for temperature, cases in cases_by_temperature(temperatures, robust, backend):
        cases = [case for case in cases if robust[case]]
        if cases:
            yield cases[0] // items, temperature, [case % items for case in cases], cases


def texts_of(golden):
    """The padded golden texts up to and including their end-of-text token, the highest id."""
    return [ids[: int(ids.argmax()) + 1] for ids in golden.inputs["text"]]


def replayed(golden, cases, layers):
    """In place of `weakest_last`: the order in which the official code left the kept tokens on the CPU that ran it."""

    def order(source, importance, cu_seqlens_in, cu_seqlens):
        layer = next(layers)
        rows = []
        for sample, case in enumerate(cases):
            start, stop = cu_seqlens[sample : sample + 2].tolist()
            own = list(range(start, stop))
            if golden["text.pruned"][case, layer]:
                kept = [i for i in golden["text.kept_local"][case, layer, 0].tolist() if i != -1]
                row_of = {int(source[row]) - int(cu_seqlens_in[sample]) - 1: row for row in own[1:-1]}
                own = [start, *(row_of[i] for i in kept), stop - 1]
            rows += own
        return torch.tensor(rows, device=source.device)

    return order


@for_family(lambda manifest: manifest["family"].startswith("clip"))
def test_clip_images(family, backend):
    golden = Golden(family)
    results, model = golden.golden, clip_model(golden, backend)
    pixels = pixels_of(golden.inputs["images_u8"])
    compared = 0
    for index, temperature, items, cases in clip_cases(golden, backend, results["vision.robust"]):
        with torch.inference_mode():
            out = model.encode_image(pixels[items], temperature, alignment_features=True)
        for sample, (item, case) in enumerate(zip(items, cases, strict=True)):
            check_stream(out.trace, sample, results, "vision", case, 0)
            torch.testing.assert_close(out.features[sample].cpu(), results["image_feat"][index, item], **TOLERANCE)
            if item < results["sd_img_ft"].shape[1]:
                official = results["sd_img_ft"][index, item]
                torch.testing.assert_close(out.alignment_features[sample].cpu(), official, **TOLERANCE)
            compared += 1
    assert compared > 0


@for_family(lambda manifest: manifest["family"].startswith("clip"))
def test_clip_texts(family, backend, monkeypatch):
    """With the official CPU's order of kept tokens replayed, on which the features depend, everything is the same."""
    golden = Golden(family)
    results, model = golden.golden, clip_model(golden, backend)
    texts = texts_of(golden)
    compared = 0
    for index, temperature, items, cases in clip_cases(golden, backend, results["text.robust"]):
        monkeypatch.setattr(official_rules, "weakest_last", replayed(results, cases, itertools.count()))
        with torch.inference_mode():
            out = model.encode_text([texts[i] for i in items], temperature, alignment_features=True)
        for sample, (item, case) in enumerate(zip(items, cases, strict=True)):
            check_stream(out.trace, sample, results, "text", case, 0)
            for layer, record in enumerate(out.trace):
                ids = record.ids[record.cu_seqlens[sample] : record.cu_seqlens[sample + 1]]
                official = [i for i in results["text.origin"][case, layer, 0].tolist() if i != -1]
                assert tokens_by_origin(ids, int(results["text.tokens_in"][case, 0])) == official
            torch.testing.assert_close(out.features[sample].cpu(), results["text_feat"][index, item], **TOLERANCE)
            if item < results["sd_txt_ft"].shape[1]:
                official = results["sd_txt_ft"][index, item]
                torch.testing.assert_close(out.alignment_features[sample].cpu(), official, **TOLERANCE)
            compared += 1
    assert compared > 0


@for_family(lambda manifest: manifest["family"].startswith("clip"))
def test_clip_texts_keep_the_official_tokens_in_the_order_of_a_gpu(family, backend):
    """Up to the first layer that prunes: from there on, scores depend on the order, which is another on a CPU."""
    golden = Golden(family)
    results, model = golden.golden, clip_model(golden, backend)
    texts = texts_of(golden)
    if not (results["text.pruned"].any(1) & results["text.robust"].bool()).any():
        pytest.skip("none of its texts that can be compared is pruned")
    pruned = 0
    for _, temperature, items, cases in clip_cases(golden, backend, results["text.robust"]):
        with torch.inference_mode():
            out = model.encode_text([texts[i] for i in items], temperature, alignment_features=True)
        for sample, case in enumerate(cases):
            first = [*results["text.pruned"][case].tolist(), 1].index(1)
            check_stream(out.trace[: first + 1], sample, results, "text", case, 0)
            if first == len(out.trace):
                continue
            record, scores = out.trace[first], results["text.importance"][case, first, 0]
            kept = [i for i in results["text.kept_local"][case, first, 0].tolist() if i != -1]
            weakest = min(kept, key=lambda i: scores[i])
            ids = record.ids[record.cu_seqlens[sample] : record.cu_seqlens[sample + 1]].tolist()
            # No earlier layer pruned, so a token's position among the prunable ones is its id less token 0.
            assert ids == [0, *sorted(i + 1 for i in kept if i != weakest), weakest + 1, -(1 + first)]
            pruned += 1
    assert pruned > 0 or interpreted(backend)
