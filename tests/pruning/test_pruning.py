"""The interface of a pruning rule: what it is given, where it runs, how it is named, saved and refused."""

import dataclasses
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers import DEVICE, normal, offsets
from test_tasks import COUNT, make, pixels, texts, with_processor  # noqa: F401 -- fixtures

import madtp
from madtp import flops
from madtp.layers import Attention, LayerNorm
from madtp.pruning import MADTP, METHODS, LayerTrace, Pruning, Random, Tokens, TopK, register
from madtp_kernels import RaggedBatch

TASKS = ("vqa", "caption", "retrieval")


@register
@dataclass(frozen=True)
class EveryOther(Pruning):
    """A user's rule: tokens at odd places go into their left neighbours, which are never protected ones."""

    name: ClassVar[str] = "every other"
    layers: tuple[int, ...] = ()

    @property
    def strength(self):
        return float(len(self.layers))

    def __call__(self, tokens, *, block_input, attention, dictionary, layer, norm=None):
        assert dictionary is None and attention.attention_received is None
        assert attention.keys.shape[0] == attention.queries.shape[0] == len(block_input.ids)
        received = attention.received(queries=slice(0, 1))
        assert received.shape == (len(block_input.ids),)
        if layer not in self.layers:
            return super().__call__(
                tokens, block_input=block_input, attention=attention, dictionary=dictionary, layer=layer, norm=norm
            )
        row = torch.arange(len(tokens.ids), dtype=torch.int32, device=tokens.device)
        goes = (tokens.ids % 4 == 2) & ~tokens.protected
        left, merged = tokens.merged(row - goes.int(), proportional=self.proportional_attention, backend=self.backend)
        return left, LayerTrace(tokens.cu_seqlens, left.cu_seqlens, left.ids, rows=merged.rows)


def attended(generator, tokens):
    received = torch.rand(len(tokens.ids), generator=generator).to(DEVICE)
    return Attention(tokens.values, tokens, attention_received=received)


def test_topk_keeps_a_share_of_the_best_and_one_token_of_the_others(generator):
    lengths, width = [12, 1, 5, 30], 8
    tokens = Tokens.start(RaggedBatch(normal(generator, sum(lengths), width), offsets(lengths), 30))
    attention = attended(generator, tokens)
    norm = LayerNorm(width).to(DEVICE)
    left, trace = TopK(0.5)(tokens, block_input=tokens, attention=attention, dictionary=None, layer=2, norm=norm)
    torch.testing.assert_close(
        norm(left), torch.nn.functional.layer_norm(left.values, (width,), norm.weight, norm.bias)
    )
    scores = RaggedBatch(attention.attention_received, tokens.cu_seqlens, 30).to_list()
    ids = RaggedBatch(left.ids, left.cu_seqlens, 30).to_list()
    for x, score, kept, rows in zip(tokens.to_list(), scores, ids, left.to_list(), strict=True):
        count = max(round((len(x) - 1) / 2), 1)
        if len(x) - 1 - count < 2:
            assert kept.tolist() == list(range(len(x)))
            continue
        best = sorted(sorted(range(1, len(x)), key=lambda i: -score[i])[:count])
        gone = [i for i in range(1, len(x)) if i not in best]
        assert kept.tolist() == [0, *best, -3]
        weights, values = score[gone].double(), x[gone].double()
        torch.testing.assert_close(rows[-1].double(), weights @ values / weights.sum(), atol=1e-5, rtol=1e-5)
        assert torch.equal(rows[:-1], x[[0, *best]])
    assert trace.kept.tolist()[0] == 6 and trace.pruned.tolist() == [True, False, True, True]


def test_lots_depend_on_place_layer_and_seed_alone(generator):
    tokens = Tokens.start(RaggedBatch(normal(generator, 40, 4), offsets([25, 15]), 25))
    first = Random(0.5).score(tokens, None, 3)
    assert torch.equal(first[:15], first[25:]) and first.unique().numel() == 25 and 0 <= first.min() <= first.max() <= 1
    assert not torch.equal(first, Random(0.5).score(tokens, None, 4))
    assert not torch.equal(first, Random(0.5, seed=1).score(tokens, None, 3))
    spread = Random(0.5).score(
        Tokens.start(RaggedBatch(torch.zeros(4000, 1, device=DEVICE), offsets([4000]), 4000)), None, 0
    )
    assert abs(float(spread.mean()) - 0.5) < 0.03 and abs(float(spread.std()) - 0.2887) < 0.02


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("rule", [EveryOther(layers=(0, 2)), TopK(0.4), Random(0.4)], ids=lambda rule: rule.name)
def test_rules_without_a_dictionary_run_in_every_task(rule, task, pixels, texts):  # noqa: F811
    """Also where the model's dictionary is none at all; alone and in a batch; sizes change what follows a merge."""
    model = make(task)
    with torch.inference_mode():
        model.space_dict.fill_(torch.nan)
        out = model(pixels, texts, pruning=rule)
        alone = model(pixels[1:2], texts[1:2], pruning=rule)
        weighed = model(pixels, texts, pruning=dataclasses.replace(rule, proportional_attention=True))
    assert all(bool(record.pruned.any()) == (getattr(rule, "layers", (0,)).count(0) > 0) for record in out.vision[:1])
    for record, single in zip(out.vision, alone.vision, strict=True):
        ids = record.ids[record.cu_seqlens[1] : record.cu_seqlens[2]]
        assert torch.equal(ids, single.ids)
    assert [t.lengths_in.tolist() for t in out.vision[:1]] == [t.lengths_in.tolist() for t in weighed.vision[:1]]
    images = {"vqa": "image_embeds"}.get(task, "images")
    assert getattr(out, images).values.isfinite().all()
    assert getattr(out, images).key_bias is None and getattr(weighed, images).key_bias is not None
    assert getattr(weighed, images).sizes.max() > 1


def test_a_rule_prunes_the_streams_it_names(pixels, texts):  # noqa: F811
    model = make("vqa")
    with torch.inference_mode():
        for streams in (("vision",), ("text",), ()):
            for rule in (MADTP(1.0, streams=streams), TopK(0.5, streams=streams)):
                out = model(pixels, texts, pruning=rule)
                found = [any(bool(t.pruned.any()) for t in trace) for trace in (out.vision, out.text)]
                assert found == ["vision" in streams, "text" in streams]
    with pytest.raises(ValueError, match="streams: expected some of vision, text, got \\('audio',\\)"):
        TopK(0.5, streams=("audio",))


def test_the_models_rule_is_the_one_that_runs(pixels, texts):  # noqa: F811
    model = make("caption", temperature=0.0)
    with torch.inference_mode():
        assert not any(t.pruned.any() for t in model(pixels).vision)
        model.pruning = TopK(0.4)
        own = model(pixels)
        assert own.vision[0].pruned.all() and not any(t.pruned.any() for t in model(pixels, pruning=0.0).vision)
        with model.dense():
            assert not any(t.pruned.any() for t in model(pixels).vision)
        assert model.pruning == TopK(0.4)
    with pytest.raises(ValueError, match="temperature: 'topk' has none; see Model.pruning"):
        model.temperature  # noqa: B018
    model.temperature = 1.5
    assert model.pruning == MADTP(1.5) and model.pruning.at(2.0) == MADTP(2.0)


def test_the_keywords_of_the_release_before(pixels, texts):  # noqa: F811
    model = make("retrieval")
    with torch.inference_mode():
        with pytest.warns(DeprecationWarning, match="temperature: renamed to pruning"):
            old = model(pixels, texts, temperature=1.0)
        with pytest.warns(DeprecationWarning, match="use_sizes: renamed to proportional_attention"):
            sizes = type(model)(model.config, 1.0, use_sizes=True)
        new = model(pixels, texts, pruning=1.0)
    assert sizes.pruning == MADTP(1.0, proportional_attention=True)
    assert torch.equal(old.image_embeds, new.image_embeds)
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="^pruning, temperature: .* got both"):
        model(pixels, texts, temperature=1.0, pruning=2.0)
    with pytest.raises(AttributeError, match="^use_sizes: gone; set Model.pruning"):
        model.use_sizes = True
    for word in ("tome", MADTP):
        with pytest.raises(ValueError, match="^pruning: expected a rule or MADTP's temperature, got"):
            model(pixels, texts, pruning=word)
    with pytest.raises(ValueError, match="^pruning: the rule forces backend 'reference', the model None"):
        model(pixels, texts, pruning=MADTP(1.0, backend="reference"))
    with pytest.raises(ValueError, match="^proportional_attention: .* got a rule that says otherwise"):
        type(model)(model.config, MADTP(1.0), proportional_attention=True)


@pytest.mark.parametrize(
    "rule", [MADTP(2.5, proportional_attention=True), TopK(0.25, streams=("vision",)), EveryOther(layers=(1, 3)), Pruning()],
    ids=lambda rule: rule.name,
)  # fmt: skip
def test_a_rule_is_saved_with_its_model(rule, tmp_path):
    assert Pruning.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    model = with_processor(make("caption"), "caption")
    model.pruning = rule
    madtp.save_pretrained(model, tmp_path)
    assert madtp.load(tmp_path).pruning == rule
    assert madtp.load(tmp_path, temperature=0.5).pruning == MADTP(
        0.5, proportional_attention=rule.proportional_attention
    )


def test_models_that_were_saved_before_load(tmp_path):
    model = with_processor(make("caption"), "caption")
    madtp.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["pruning"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "temperature": 3.5, "use_sizes": True}))
    assert madtp.load(tmp_path).pruning == MADTP(3.5, proportional_attention=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "pruning: expected a method of dense, .*, got 'magic'"),
        ({"drop": 0.5}, "pruning: expected a method of dense, .*, got None"),
        ({"method": "topk", "share": 0.5}, "pruning: 'topk' has no setting 'share'; it has .*, drop"),
        ({"method": "topk", "drop": 1.5}, "drop: expected a share from 0 to below 1, got 1.5"),
        ({"method": "madtp", "temperature": -1}, "temperature: expected 0, or a number from 1e-30 to 1e30, got -1"),
    ],
)
def test_settings_that_make_no_rule(settings, message):
    with pytest.raises(ValueError, match=message):
        Pruning.from_dict(settings)


def test_official_settings_refuse_other_rules(pixels, texts):  # noqa: F811
    rule = EveryOther(layers=(0,))
    with torch.inference_mode():
        with pytest.raises(ValueError, match="grouping 'batch' is MADTP's, and cannot be combined .* 'every other'"):
            make("vqa", grouping="batch")(pixels, texts, pruning=rule)
        with pytest.raises(ValueError, match="text_mode 'compat' is MADTP's, and cannot be combined .* 'every other'"):
            make("retrieval", text_mode="compat").encode_text(texts, pruning=rule)
        assert len(make("vqa", grouping="batch")(pixels, texts, pruning=Pruning()).questions) == COUNT


def test_prefix_and_named_tokens_are_protected(generator):
    tokens = Tokens.start(
        RaggedBatch(normal(generator, 17, 4), offsets([9, 0, 3, 5]), 9), prefix=2,
        protected_ids=torch.tensor([8, 0, 1, 3], dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    expected = [[0, 1, 8], [], [0, 1], [0, 1, 3]]
    found = [part.nonzero().flatten().tolist() for part in tokens.with_values(tokens.protected).to_list()]
    assert found == expected
    left, _ = TopK(0.8)(tokens, block_input=tokens, attention=attended(generator, tokens), dictionary=None, layer=0)
    for kept, own in zip(left.with_values(left.ids).to_list(), expected, strict=True):
        assert set(own) <= set(kept.tolist())
    assert not dataclasses.replace(tokens, prefix=0, protected_ids=None).protected.any()
    for others in ({}, {"protected_ids": None}, {"prefix": 0, "protected_ids": None}):
        some = dataclasses.replace(tokens, ids=tokens.ids - 1, **others)  # one of each sample is no token's
        assert torch.equal(some.free, ~some.protected) and some.free[tokens.ids == 0].all()


def test_each_rule_counts_its_own_work():
    config, lengths = madtp.VQAConfig().vision, [577, *[300] * 12]
    plain = flops.vit(config, lengths, pruning=EveryOther(layers=(0,)))
    assert plain.parts.keys() == {"linear", "attention", "norm", "elementwise"}
    topk, own = flops.vit(config, lengths, pruning=TopK(0.5)), flops.vit(config, lengths, pruning=True)
    assert topk.parts.keys() - plain.parts.keys() == {"importance", "merge"}
    assert own == flops.vit(config, lengths, pruning=MADTP(2.0)) and plain.full < topk.full < own.full
    assert flops.vit(config, lengths, pruning=MADTP(2.0, streams=("text",))) == plain


def test_the_registry_knows_every_rule_by_its_name():
    assert {"madtp", "topk", "random", "every other"} <= METHODS.keys()
    assert all(rule.name == name for name, rule in METHODS.items())
    for rule in (MADTP(0.5), TopK(0.5), Random(0.5)):
        assert rule.active and rule.strength == 0.5 and not rule.at(0.0).active and rule.at(0.25).strength == 0.25
