"""Rules that merge tokens: each against its formula in float64, sample by sample; their limits; their calibration."""

import inspect
import itertools
import math
from dataclasses import replace

import pytest
import rules
import torch
import torch.nn.functional as F
from helpers import backends_here, missing, spare_rows
from pretended_gpu import PretendedGPU

from madtp import flops
from madtp.config import VisionConfig
from madtp.layers import LayerNorm, self_attention
from madtp.pruning import (
    ATM,
    METHODS,
    PER_TOKEN,
    EViT,
    MADTPNearest,
    MergingPruning,
    PiToMe,
    Pruning,
    RankedNovelty,
    Tokens,
    ToMe,
    TopK,
    calibrate,
    original_tokens,
)  # fmt: skip
from madtp.vision import VisionTransformer
from madtp_kernels import RaggedBatch

HEADS, DIM = 3, 8
WIDTH = HEADS * DIM
LENGTHS = [17, 1, 2, 40, 3]


def lengths_for(rule):
    """Of a batch for whose samples a rule has one answer: PiToMe orders by energy, where two tokens alone are equal."""
    return [17, 1, 40, 9] if rule.name == "pitome" else LENGTHS


every_backend = pytest.mark.parametrize("backend", [b for b in backends_here() if b.values[0] in ("reference", "cpu")])


def case(generator, dtype=torch.float64, lengths=LENGTHS, prefix=1, sizes=True):
    """Tokens after attention, those that entered, q, k, v in one row, and a dictionary."""
    total = sum(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Keys in groups of likes, as in pictures.
    qkv = normal(total, 3, HEADS, DIM)
    qkv[:, 1] = normal(6, HEADS, DIM)[torch.arange(total) * 7 % 6] + 0.5 * normal(total, HEADS, DIM)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    batch = RaggedBatch(normal(total, WIDTH).to(dtype), cu_seqlens, max(lengths))
    tokens = Tokens.start(batch, prefix=prefix)
    if sizes:
        counts = torch.randint(1, 4, (total,), generator=generator).float()
        tokens = tokens.survivors(batch, tokens.ids, counts, proportional=True)
    return tokens, tokens.with_values(normal(total, WIDTH).to(dtype)), qkv.to(dtype), (normal(5, WIDTH).to(dtype), None)


def run(rule, tokens, entering, qkv, dictionary, layer=0):
    _, attention = self_attention(qkv.flatten(1), entering, HEADS, rule, entering.with_values)
    return rule(tokens, block_input=entering, attention=attention, dictionary=dictionary, layer=layer)


# ---- formulas, one sample at a time


def probabilities(qkv, sizes):
    q, k = qkv[:, 0].transpose(0, 1), qkv[:, 1].transpose(0, 1)
    return (q @ k.mT * DIM**-0.5 + sizes.log()).softmax(-1)  # [H, L, L]


def cosines(keys):
    unit = F.normalize(keys.flatten(1), dim=1)
    return unit @ unit.mT


def novelty_among_greater(cosine, order, others):
    """1 - the largest cosine to a token of higher order among ``others`` (indices), earlier ones first among equals."""
    result = {}
    for j in others:
        greater = [i for i in others if (order[i], -i) > (order[j], -j)]
        result[j] = 2.0 if not greater else 1 - max(float(cosine[i, j]) for i in greater)
    return result


def ranked_novelty(rule, x, entering, qkv, sizes, dictionary, prefix, threshold=None, gone=None):
    """Which tokens go, and into which."""
    length, p = len(x), probabilities(qkv, sizes)
    others = list(range(prefix, length))
    received = p.amax(0)[prefix:].sum(0)
    orders = {"attention": received, "norm": x.norm(dim=1), "index": 1 / (1 + torch.arange(length))}
    value = p @ qkv[:, 2].transpose(0, 1)
    norms = value.norm(dim=2)
    orders["cls"] = (p[:, 0] * norms).sum(0) / (norms.sum(0) + 1e-8)
    keys = {"averaged": qkv[:, 1].mean(1), "concatenated": qkv[:, 1], "per_head": F.normalize(qkv[:, 1], dim=2)}[
        rule.keys
    ]
    cosine, order = cosines(keys), orders[rule.order]
    new = novelty_among_greater(cosine, order, others)
    mean = sum(float(order[j]) for j in others) / max(len(others), 1)
    factor = {
        j: (float(order[j]) / mean) ** rule.attention_exponent * float(sizes[j]) ** rule.size_exponent for j in others
    }
    score = {j: factor[j] * new[j] ** rule.novelty_exponent for j in others}
    most = math.floor(len(others) * rule.most + 1e-4)
    ascending = sorted(others, key=lambda j: (score[j], -j))
    number = most if gone is None else min(gone, most)
    goes = [j for j in ascending[:number] if threshold is None or score[j] <= threshold]
    stays = [j for j in others if j not in goes]
    into = {j: max(stays, key=lambda i: (float(cosine[i, j]), -i)) for j in goes}
    if rule.second_look and threshold is not None:
        look = rule.second_look * threshold
        into = {j: i for j, i in into.items() if factor[j] * (1 - float(cosine[i, j])) ** rule.novelty_exponent <= look}
    return into


def tome(rule, x, entering, qkv, sizes, dictionary, prefix, threshold=None, gone=None):
    cosine = cosines(qkv[:, 1].mean(1) if rule.keys == "averaged" else qkv[:, 1])
    sources = [j for j in range(prefix, len(x)) if j % 2 == 0]
    targets = [j for j in range(prefix, len(x)) if j % 2 == 1]
    partner = {j: max(targets, key=lambda i: (float(cosine[i, j]), -i)) for j in sources} if targets else {}
    ascending = sorted(partner, key=lambda j: (1 - float(cosine[partner[j], j]), j))[: (len(x) - prefix) // 2]
    if threshold is None:
        return {j: partner[j] for j in ascending[:gone]}
    return {j: partner[j] for j in ascending if 1 - float(cosine[partner[j], j]) <= threshold}


def pitome(rule, x, entering, qkv, sizes, dictionary, prefix, threshold=None, gone=None):
    cosine, others = cosines(qkv[:, 1].mean(1)), list(range(prefix, len(x)))
    value = {j: float(F.elu(cosine[j, others] - rule.margin).mean()) for j in others}
    ranked = sorted(others, key=lambda j: (-value[j], j))
    if rule.form == "protect":
        chosen = ranked[: 2 * gone]
        sources, targets = chosen[::2], chosen[1::2]
        return {j: max(targets, key=lambda i: (float(cosine[i, j]), -i)) for j in sources if targets}
    sources = [j for i, j in enumerate(ranked) if (i + prefix) % 2 == 0]
    targets = [j for j in ranked if j not in sources]
    partner = {j: max(targets, key=lambda i: float(cosine[i, j])) for j in sources} if targets else {}
    gone = min(gone, (len(x) - prefix) // 2)
    return {j: partner[j] for j in sorted(partner, key=lambda j: 1 - float(cosine[partner[j], j]))[:gone]}


def merged(x, sizes, into):
    """Rows, ids and sizes after merging by sizes."""
    stays = [j for j in range(len(x)) if j not in into]
    members = {j: [j, *(i for i, target in into.items() if target == j)] for j in stays}
    weight = sizes.double()
    rows = [sum(weight[i] * x[i] for i in members[j]) / sum(weight[i] for i in members[j]) for j in stays]
    return torch.stack(rows), stays, [float(sum(sizes[i] for i in members[j])) for j in stays]


RULES = {
    "ranked_novelty": (RankedNovelty(), ranked_novelty),
    "second look": (RankedNovelty(second_look=1.0), ranked_novelty),
    "averaged": (RankedNovelty(keys="averaged", second_look=0.5), ranked_novelty),
    "concatenated, norm": (RankedNovelty(keys="concatenated", order="norm", novelty_exponent=2.0), ranked_novelty),
    "cls": (RankedNovelty(order="cls", attention_exponent=1.0, size_exponent=0.0, most=0.4), ranked_novelty),
    "index": (RankedNovelty(order="index", attention_exponent=0.0), ranked_novelty),
    "tome": (ToMe(), tome),
    "atm": (ATM(keys="concatenated"), tome),
    "pitome": (PiToMe(layers=12), pitome),
    "pitome, protect": (PiToMe(form="protect", margin=0.5, layers=12), pitome),
}
THRESHOLD = {"ranked_novelty": 0.35, "tome": 0.8, "atm": 0.8}


@every_backend
@pytest.mark.parametrize("prefix", [1, 0, 3])
@pytest.mark.parametrize("limit", ["threshold", "count"])
@pytest.mark.parametrize("name", RULES)
def test_rule_is_its_formula(name, limit, prefix, backend, generator):
    rule, oracle = RULES[name]
    if limit == "threshold" and rule.name not in THRESHOLD:
        pytest.skip("its authors choose a number of tokens")
    if prefix != 1 and getattr(rule, "order", None) == "cls":
        pytest.skip("the attention of CLS needs one")
    dtype = torch.float64 if backend == "reference" else torch.float32
    tokens, entering, qkv, dictionary = inputs = case(generator, dtype, lengths_for(rule), prefix=prefix)
    threshold = THRESHOLD.get(rule.name)
    rule = replace(
        rule, backend=backend, **({"thresholds": (threshold,)} if limit == "threshold" else {"counts": (5,)})
    )
    left, trace = run(rule, *inputs)
    went = 0
    for b, (start, stop) in enumerate(itertools.pairwise(tokens.cu_seqlens.tolist())):
        part = slice(start, stop)
        gone = None if limit == "threshold" else min(5, math.floor((max(stop - start - prefix, 0)) * rule.most + 1e-4))
        x, sizes = tokens.values[part].double(), tokens.sizes[part].double()
        into = oracle(
            rule, x, entering.values[part].double(), qkv[part].double(), sizes, dictionary, prefix,
            threshold=threshold if limit == "threshold" else None, gone=gone,
        )  # fmt: skip
        rows, stays, counts = merged(x, sizes, into)
        went += len(into)
        ours = slice(*left.cu_seqlens[b : b + 2].tolist())
        assert left.ids[ours].tolist() == stays, f"sample {b}"
        assert left.sizes[ours].tolist() == counts
        torch.testing.assert_close(left.values[ours].double(), rows, atol=1e-5, rtol=1e-5)
        expected = {j: stays.index(into.get(j, j)) + ours.start for j in range(stop - start)}
        assert trace.rows[part].tolist() == list(expected.values())
    assert went > 2  # the case says something
    torch.testing.assert_close(left.key_bias, left.sizes.to(left.key_bias.dtype).log())


def test_tome_in_the_order_of_its_authors(generator):
    inputs = tokens, *_ = case(generator, torch.float32)
    left, trace = run(ToMe(counts=(5,)), *inputs)
    ours, record = run(ToMe(counts=(5,), authors_order=True), *inputs)
    for start, stop in itertools.pairwise(left.cu_seqlens.tolist()):
        ids = left.ids[start:stop].tolist()
        assert ours.ids[start:stop].tolist() == [i for i in ids if i % 2 == 0] + [i for i in ids if i % 2]
        # The same tokens otherwise.
        assert sorted(ours.values[start:stop, 0].tolist()) == sorted(left.values[start:stop, 0].tolist())
    assert torch.equal(ours.key_bias, ours.sizes.log())
    assert torch.equal(original_tokens(ours, [record]), original_tokens(left, [trace]))
    with_prefix, *_ = run(ToMe(counts=(5,), authors_order=True), *case(generator, torch.float32, prefix=3))
    assert with_prefix.ids[:3].tolist() == [0, 1, 2]


def test_original_tokens_are_those_that_they_were_merged_into(generator):
    tokens, entering, qkv, dictionary = case(generator, torch.float32, [9, 1, 33])
    first, record = run(RankedNovelty(shares=(0.3,)), tokens, entering, qkv, dictionary)
    none = replace(record, cu_seqlens_in=first.cu_seqlens, cu_seqlens=first.cu_seqlens, rows=None)
    qkv = torch.randn(len(first.values), *qkv.shape[1:], generator=generator)
    second, last = run(ToMe(counts=(4,)), first, first, qkv, dictionary)
    whole = original_tokens(second, [record, none, last])
    assert len(whole) == 43
    for old in range(43):
        assert torch.equal(whole[old], second.values[int(last.rows[int(record.rows[old])])])
    with pytest.raises(ValueError, match="layer 1 does not say where tokens went"):
        original_tokens(second, [record, replace(last, rows=None)])


@every_backend
def test_evit_fuses_the_rest_by_its_attention(backend, generator):
    dtype = torch.float64 if backend == "reference" else torch.float32
    tokens, _, qkv, _ = inputs = case(generator, dtype, sizes=False)
    left, trace = run(EViT(shares=(0.3,), backend=backend), *inputs)
    for b, (start, stop) in enumerate(itertools.pairwise(tokens.cu_seqlens.tolist())):
        x, p = tokens.values[start:stop].double(), probabilities(qkv[start:stop].double(), torch.ones(stop - start))
        weight = p[:, 0].mean(0)
        gone = sorted(range(1, stop - start), key=lambda j: float(weight[j]))[: round((stop - start - 1) * 0.3)]
        gone = gone if len(gone) > 1 else []  # one alone would only change its place
        stays = [j for j in range(stop - start) if j not in gone]
        rows = [x[j] for j in stays] + ([sum(weight[j] * x[j] for j in gone)] if gone else [])
        ours = slice(*left.cu_seqlens[b : b + 2].tolist())
        assert left.ids[ours].tolist() == stays + [-1] * bool(gone)
        torch.testing.assert_close(left.values[ours].double(), torch.stack(rows), atol=1e-5, rtol=1e-5)
    assert trace.kept.tolist() == [11, 0, 1, 27, 2]


@every_backend
@pytest.mark.parametrize("weights", ["importance", "sizes"])
def test_madtp_merges_into_the_nearest_survivor(backend, weights, generator):
    dtype = torch.float64 if backend == "reference" else torch.float32
    tokens, entering, qkv, dictionary = inputs = case(generator, dtype)
    rule = MADTPNearest(temperature=3.0, weights=weights, proportional_attention=True, backend=backend)
    left, trace = run(rule, *inputs)
    went = 0
    for b, (start, stop) in enumerate(itertools.pairwise(tokens.cu_seqlens.tolist())):
        x, sizes, length = tokens.values[start:stop].double(), tokens.sizes[start:stop].double(), stop - start
        p, v = probabilities(qkv[start:stop].double(), sizes), qkv[start:stop, 2].double()
        others = range(1, length)
        received, norms = p.amax(0)[1:].sum(0), (p @ v.transpose(0, 1)).norm(dim=2)
        cls = (p[:, 0] * norms).sum(0) / (norms.sum(0) + 1e-8)
        alignment = entering.values[start:stop].double() @ dictionary[0].double().mT
        best = alignment.amax(1)
        importance = torch.zeros(length, dtype=torch.float64)
        if length > 1:
            share = [v[1:] / (v[1:].sum() + 1e-8) for v in (received, best)]
            importance[1:] = (share[0] + share[1] + cls[1:]) / 3
            weight = (alignment[1:] / 3.0).softmax(0)
            theta = float((weight * importance[1:, None]).sum(0).min())
            torch.testing.assert_close(trace.threshold[b].double(), torch.tensor(theta).double(), atol=1e-6, rtol=1e-5)
        goes = [j for j in others if float(importance[j]) <= theta]
        if len(goes) < 2 or len(goes) == length - 1:
            goes = []
        went += len(goes)
        cosine, stays = cosines(qkv[start:stop, 1].double()), [j for j in range(length) if j not in goes]
        into = {j: max((i for i in stays if i), key=lambda i: float(cosine[i, j])) for j in goes}
        factor = importance if weights == "importance" else sizes
        rows = []
        for j in stays:
            members = [j, *(i for i in goes if into[i] == j)]
            total = sum(factor[i] for i in members)
            rows.append(x[j] if len(members) == 1 else sum(factor[i] * x[i] for i in members) / total)
        ours = slice(*left.cu_seqlens[b : b + 2].tolist())
        assert left.ids[ours].tolist() == stays
        torch.testing.assert_close(left.values[ours].double(), torch.stack(rows), atol=1e-4, rtol=1e-4)
    assert went > 5


# ---- what all of them promise

LAYERS = 12  # of a model that these would be part of
EVERY = {name: rule.on("vision", LAYERS) for name, rule in rules.RULES.items()}
every_rule = pytest.mark.parametrize("rule", EVERY.values(), ids=EVERY)


def test_every_rule_of_the_package_is_listed():
    ours = {name for name, rule in METHODS.items() if rule.__module__.startswith("madtp.")}
    assert {rule.name for rule in EVERY.values()} == ours


def alone(tokens, part):
    """The rows of one sample as a batch of its own."""
    length = part.stop - part.start
    batch = RaggedBatch(tokens.values[part].clone(), torch.tensor([0, length], dtype=torch.int32), length)
    return Tokens.start(batch).survivors(batch, tokens.ids[part].clone(), tokens.sizes[part].clone(), proportional=True)


@every_backend
@every_rule
def test_same_sample_alone_and_in_a_batch(rule, backend, generator):
    tokens, entering, qkv, dictionary = inputs = case(generator, torch.float32, [9, 1, 33, 2, 70, 4])
    rule = replace(rule, backend=backend)
    left, _ = run(rule, *inputs)
    for b, (start, stop) in enumerate(itertools.pairwise(tokens.cu_seqlens.tolist())):
        part = slice(start, stop)

        one, _ = run(rule, alone(tokens, part), alone(entering, part), qkv[part].clone(), dictionary)
        ours = slice(*left.cu_seqlens[b : b + 2].tolist())
        assert one.ids.tolist() == left.ids[ours].tolist()
        assert one.sizes.tolist() == left.sizes[ours].tolist()
        if backend == "cpu":
            assert torch.equal(one.values, left.values[ours])
        torch.testing.assert_close(one.values, left.values[ours], atol=1e-5, rtol=1e-5)


@every_rule
def test_nothing_waits_for_a_device(rule):
    tokens, entering, qkv, dictionary = case(torch.Generator().manual_seed(0), torch.float32)

    def off(t):
        fields = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in vars(t).items()}
        return Tokens.unchecked(**{**fields, "bound": True})

    run(rule, off(tokens), off(entering), qkv.to("meta"), (dictionary[0].to("meta"), None))


@pytest.mark.parametrize("prefix", [1, 2])
@every_rule
def test_rows_beyond_the_last_token_decide_nothing(rule, prefix, generator):
    """On a GPU a buffer has more rows than there are tokens, before and after a rule, and they hold any number."""
    inputs = tokens, entering, qkv, dictionary = case(generator, torch.float32, lengths_for(rule), prefix=prefix)
    expected, record = run(rule, *inputs)

    def in_a_larger_buffer(t):
        wide = {name: spare_rows(part, 9) for name in PER_TOKEN if (part := getattr(t, name)) is not None}
        return Tokens.unchecked(**vars(t) | wide | {"bound": True})

    wide = in_a_larger_buffer(tokens), in_a_larger_buffer(entering), spare_rows(qkv, 9), dictionary
    with PretendedGPU():
        left, trace = run(rule, *wide)
        if record.rows is not None:
            whole = original_tokens(left, [trace])
    assert len(left.ids) == len(tokens.ids) + 9
    assert torch.equal(left.cu_seqlens, expected.cu_seqlens)
    count, entered = len(expected.ids), len(tokens.ids)
    for name in PER_TOKEN:
        theirs = getattr(expected, name)
        if theirs is not None:
            torch.testing.assert_close(getattr(left, name)[:count], theirs, atol=1e-5, rtol=1e-5)
    if record.rows is not None:
        assert torch.equal(trace.rows[:entered], record.rows)
        torch.testing.assert_close(whole[:entered], original_tokens(expected, [record]), atol=1e-5, rtol=1e-5)


@every_rule
def test_triton_merges_the_same_tokens(rule, generator):
    if reason := missing("triton"):
        pytest.skip(reason)
    inputs = case(generator, torch.float32, [9, 1, 6])
    expected, trace = run(replace(rule, backend="reference"), *inputs)
    left, record = run(replace(rule, backend="triton"), *inputs)
    count = int(expected.cu_seqlens[-1])
    assert torch.equal(left.cu_seqlens, expected.cu_seqlens)
    assert left.ids[:count].tolist() == expected.ids[:count].tolist()
    assert (record.rows is None) == (trace.rows is None)
    assert record.rows is None or torch.equal(record.rows, trace.rows)
    torch.testing.assert_close(left.values[:count], expected.values[:count], atol=1e-5, rtol=1e-5)


@every_rule
def test_rule_survives_json(rule):
    assert Pruning.from_dict(rule.to_dict()) == rule
    assert METHODS[rule.name] is type(rule)


@pytest.mark.parametrize(
    "rule", [pytest.param(rule, id=name) for name, rule in EVERY.items() if isinstance(rule, MergingPruning)]
)
def test_higher_strength_keeps_no_more(rule, generator):
    inputs = case(generator, torch.float32)
    assert not rule.at(0.0).active
    left = [run(rule.at(s), *inputs)[0].lengths for s in (0.0, 0.3, 0.6, 1.0, 1.5, 3.0)]
    assert left[0].tolist() == LENGTHS
    assert all((after <= before).all() for before, after in itertools.pairwise(left))
    assert (left[-1] < left[0]).any()


def test_a_protected_token_stays(generator):
    tokens, entering, qkv, dictionary = case(generator, torch.float32)
    last = (tokens.lengths - 1).clamp(min=1)
    tokens, entering = (
        Tokens.unchecked(**{**vars(t), "protected_ids": last.int()}) for t in (tokens, entering)
    )  # fmt: skip
    for rule in EVERY.values():
        left, _ = run(rule, tokens, entering, qkv, dictionary)
        for b, n in enumerate(LENGTHS):
            ids = left.ids[slice(*left.cu_seqlens[b : b + 2].tolist())].tolist()
            assert 0 in ids
            assert n < 2 or n - 1 in ids, (rule.name, b)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": (0.1,), "counts": (3,)}, "expected one of them, got shares and counts"),
        ({"shares": (1.5,)}, "shares from 0 to 1"),
        ({"thresholds": (-1.0,)}, "numbers >= 0"),
        ({"strength": -1}, "strength"),
        ({"most": 1.5}, "most"),
        ({"order": "luck"}, "order: expected one of"),
        ({"keys": "none"}, "keys: expected one of"),
        ({"attention_exponent": math.nan}, "attention_exponent: expected a finite number, got nan"),
        ({"size_exponent": "0.3"}, "size_exponent: expected a finite number"),
        ({"second_look": -1.0}, "second_look: expected a number >= 0 or None"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        RankedNovelty(**settings)


def test_too_few_limits_are_named(generator):
    with pytest.raises(ValueError, match="got 2 for layer 2"):
        run(RankedNovelty(shares=(0.1, 0.1)), *case(generator, torch.float32), layer=2)


@pytest.mark.parametrize(
    "rule, message",
    [
        (ToMe(counts=(4,) * 3), "counts: expected one value for each of the 4 layers of vision or one for all, got 3"),
        (ATM(thresholds=(0.4,) * 12), "thresholds: expected one value for each of the 4 layers of vision .*, got 12"),
        (EViT(shares=(0.1,) * 5), "shares: expected one value for each of the 4 layers of vision .*, got 5"),
        (PiToMe(layers=12), "layers: expected 4, as many as the model's vision has, got 12"),
    ],
)
def test_settings_for_another_number_of_layers_are_named(rule, message, vision):
    model, pixels = vision
    with pytest.raises(ValueError, match=message):
        model(pixels, None, rule)
    with pytest.raises(ValueError, match=message):
        flops.vit(model.config, [65] * 5, pruning=rule)
    # In a stream that the rule leaves alone they do not matter.
    model(pixels, None, replace(rule, streams=("text",)))


@pytest.mark.parametrize("rule", [rule for rule in METHODS.values() if rule.__module__.startswith("madtp.")])
def test_only_a_rules_own_numbers_go_without_a_name(rule):
    """`ToMe(4)` would else set something that has nothing to do with a 4."""
    kinds = inspect.signature(rule).parameters.values()
    assert {p.name for p in kinds if p.kind is not p.KEYWORD_ONLY} <= {"temperature", "drop", "seed"}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ToMe(shares=0.1), "^shares: expected a tuple, one number for each layer or one for all, got 0.1"),
        (lambda: ToMe(counts=3), "^counts: expected a tuple"),
        (lambda: ToMe(counts=("3",)), "^counts: expected a tuple"),
        (lambda: ToMe(strength="1"), "^strength: expected a number >= 0, got '1'"),
        (lambda: ToMe(most=True), "^most: expected a share from 0 to 1, got True"),
        (lambda: TopK("a"), "^drop: expected a share from 0 to below 1, got 'a'"),
        (lambda: TopK(0.1, proportional_attention="no"), "^proportional_attention: expected True or False, got 'no'"),
    ],
)
def test_settings_of_another_kind_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_counts_are_whole_numbers():
    with pytest.raises(ValueError, match=r"counts: expected whole numbers, got \(4.0, 2.5\)"):
        ToMe(counts=(4, 2.5))


@pytest.mark.parametrize("make", [ToMe, RankedNovelty])
def test_a_count_beyond_int32_is_all_that_may_go(make, generator):
    operands = case(generator, torch.float32)
    got, want = (run(make(counts=(count,)), *operands)[0].values for count in (2**40, 1000))
    assert len(got) < len(operands[0].values) and torch.equal(got, want)


def test_pitome_knows_the_depth_of_its_model(vision, generator):
    model, pixels = vision
    rule = PiToMe(counts=(9,), margin=0.6)
    assert torch.equal(
        model(pixels, None, rule).tokens.values, model(pixels, None, replace(rule, layers=4)).tokens.values
    )
    with pytest.raises(ValueError, match="layers: expected the model's number"):
        run(rule, *case(generator, torch.float32))


# ---- cost


def test_cost_of_a_rule_is_its_products():
    config, lengths = VisionConfig(32, 4, WIDTH, 4, HEADS, sd_dim=WIDTH), [65, 55, 50, 50, 40]
    dense = flops.vit(config, lengths, pruning=False)
    for rule, products in (
        (ToMe(counts=(5,)), lambda n, m: ((n - 1) / 2) ** 2 * DIM + 2 * (n - m) * WIDTH),
        (
            RankedNovelty(shares=(0.1,)),
            lambda n, m: ((n - 1) ** 2 / 2 + (n - m) * (m - 1) + (n - m)) * WIDTH + 2 * (n - m) * WIDTH,
        ),
    ):
        ours = flops.vit(config, lengths, pruning=rule)
        expected = sum(products(n, m) for n, m in itertools.pairwise(lengths)) / 1e9
        assert ours.official - dense.official == pytest.approx(expected)
        assert ours.parts["similarity"] > 0
    # A layer without a limit costs nothing; importance counts in the whole only.
    first = flops.vit(config, [65, 55, 55, 55, 55], pruning=ToMe(counts=(10, 0, 0, 0)))
    assert first.parts["similarity"] * 1e9 == pytest.approx(32**2 * DIM)
    rule = RankedNovelty(shares=(0.1,))
    assert flops.vit(config, lengths, pruning=rule).full > flops.vit(config, lengths, pruning=rule).official
    assert flops.vit(config, lengths, pruning=replace(rule, streams=("text",))) == dense


# ---- calibration


@pytest.fixture
def vision(generator):
    """A small image tower, and images."""
    torch.manual_seed(generator.initial_seed() % 2**31)
    model = VisionTransformer(VisionConfig(32, 4, WIDTH, 4, HEADS, sd_dim=WIDTH)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "pos" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    images = torch.randn(24, 3, 4, 4, generator=generator)
    return model, F.interpolate(images, size=(32, 32), mode="nearest") + 0.1 * torch.randn(
        24, 3, 32, 32, generator=generator
    )


def first_tokens(output):
    return output.tokens.values[output.tokens.cu_seqlens[:-1].long()]


def forward_of(model, pixels, read=first_tokens):
    def forward(rule):
        with torch.inference_mode():
            output = model(pixels, None, rule)
        return read(output), [
            flops.vit(model.config, row, pruning=rule).official for row in flops.stream_lengths(output.trace)
        ]

    return forward


@pytest.mark.parametrize("method", ["ranked_novelty", "tome", "atm", "pitome"])
def test_calibration_meets_its_target(method, vision):
    model, pixels = vision
    forward = forward_of(model, pixels)
    result = calibrate(forward, method, 0.3, 4, tolerance=0.005)
    assert abs(result.saving - 0.3) <= 0.01
    assert result.rule.name == method
    assert len(result.rule.limit[1]) == 4
    assert result.inputs == len(pixels)
    # What was found is what the rule does.
    dense, costs = forward(Pruning())[0], forward(result.rule)
    assert 1 - sum(costs[1]) / len(pixels) / result.dense_gflops == pytest.approx(result.saving)
    assert F.cosine_similarity(costs[0].double(), dense.double()).mean() == pytest.approx(result.cosine)
    assert max(cosine for saving, cosine in result.tried.values()) >= result.cosine - 0.01
    assert Pruning.from_dict(result.to_dict()["rule"]) == result.rule


def test_calibration_compares_all_tokens_that_are_handed_on(vision):
    model, pixels = vision

    def read(output):
        return original_tokens(output.tokens, output.trace).unflatten(0, (len(pixels), -1))

    forward = forward_of(model, pixels, read)
    result = calibrate(forward, "ranked_novelty", 0.3, 4, schedule="flat", tolerance=0.01)
    dense, whole = forward(Pruning())[0], forward(result.rule)[0]
    assert dense.shape == (24, 65, WIDTH)
    assert F.cosine_similarity(whole.double(), dense.double(), dim=2).mean() == pytest.approx(result.cosine)


def test_calibration_tries_the_first_layers_where_all_depends_on_them(vision):
    """Features that only early merging leaves alone: the search must not end on its way there."""
    model, pixels = vision

    def read(output):
        lengths = torch.tensor(flops.stream_lengths(output.trace)).double()
        late = float((lengths[:, 1] - lengths[:, -1]).mean() / lengths[:, 0].mean())
        return torch.tensor([[1.0, late]]).expand(len(pixels), 2)

    result = calibrate(forward_of(model, pixels, read), "tome", 0.3, 4, tolerance=0.02)
    assert {"flat", "shares", "early"} <= set(result.tried)
    assert result.tried[result.schedule][1] == max(cosine for _, cosine in result.tried.values())


def test_equal_counts_meet_a_target_closely(vision):
    """A whole number for each layer, which may differ by one: all with the same would save 20, 31 or 41 %."""
    result = calibrate(forward_of(*vision), "tome", 0.26, 4, schedule="flat", tolerance=0.005)
    counts = result.rule.counts
    assert all(count == round(count) for count in counts) and max(counts) - min(counts) == 1
    assert abs(result.saving - 0.26) < 0.02 and result.deviation < 1e-9


def test_calibration_decides_on_a_second_look(vision):
    forward = forward_of(*vision)
    result = calibrate(forward, "ranked_novelty", 0.3, 4, schedule="flat", tolerance=0.02)
    assert set(result.tried) == {"flat", "flat, variant 2"}
    errors = {name: (1 - cosine) * 2.4 ** (10 * (0.3 - saving)) for name, (saving, cosine) in result.tried.items()}
    better = min(errors, key=errors.get)
    assert result.rule.second_look == (0.0 if better == "flat" else 1.0)
    asked = calibrate(forward, RankedNovelty(second_look=0.0), 0.3, 4, schedule="flat", tolerance=0.02)
    assert set(asked.tried) == {"flat"} and asked.rule.second_look == 0.0


def test_how_many_inputs_a_target_takes(vision):
    result = calibrate(forward_of(*vision), "ranked_novelty", 0.3, 4, schedule="flat", tolerance=0.02)
    assert result.uncertainty == pytest.approx(2 * result.deviation / 24**0.5)
    enough = replace(result, inputs=result.inputs_for(0.01))
    assert enough.uncertainty <= 0.01 < replace(result, inputs=enough.inputs - 1).uncertainty


def test_thresholds_give_every_image_its_own_number(vision):
    model, pixels = vision
    pixels = pixels.clone()
    pixels[:12] = pixels[:12, :, :4, :4].repeat(1, 1, 8, 8) + 0.01 * pixels[:12]  # one patch, everywhere
    result = calibrate(forward_of(model, pixels), "ranked_novelty", 0.3, 4, schedule="flat", tolerance=0.01)
    costs = torch.tensor(forward_of(model, pixels)(result.rule)[1])
    assert costs[:12].mean() < 0.9 * costs[12:].mean()
    assert result.deviation > 0.03
    equal = calibrate(
        forward_of(model, pixels), "ranked_novelty", 0.3, 4, adaptive=False, schedule="flat", tolerance=0.02
    )
    assert equal.deviation < 1e-6


def test_cost_is_met_over_more_inputs(vision):
    model, pixels = vision
    result = calibrate(
        forward_of(model, pixels[:8]),
        "ranked_novelty",
        0.3,
        4,
        many=forward_of(model, pixels),
        schedule="flat",
        tolerance=0.005,
    )
    assert result.inputs == 24
    assert abs(result.saving - 0.3) <= 0.01


def test_calibration_refuses_what_it_cannot_do(vision):
    forward = forward_of(*vision)
    with pytest.raises(ValueError, match="method: expected one of"):
        calibrate(forward, "best", 0.3, 4)
    with pytest.raises(ValueError, match="'madtp' has no limits"):
        calibrate(forward, "madtp", 0.3, 4)
    with pytest.raises(ValueError, match="target: expected a share"):
        calibrate(forward, "tome", 1.3, 4)
    with pytest.raises(ValueError, match="at the nearest, expected 95"):
        calibrate(forward, "tome", 0.95, 4, schedule="flat")
    with pytest.raises(ValueError, match="expected one pass of 6 layers"):
        calibrate(forward, "ranked_novelty", 0.3, 6, schedule="flat")


# ---- ranked novelty in one call


class StepByStep(RankedNovelty):
    """The same rule, which a replaced step makes go one step after the other."""

    def choose(self, tokens, score, free, layer):
        return super().choose(tokens, score, free, layer)


class KeepsAll(RankedNovelty):
    def into(self, tokens, goes, threshold, **found):
        return super().into(tokens, torch.zeros_like(goes), threshold, **found)


@every_backend
@pytest.mark.parametrize(
    "settings",
    [{"thresholds": (0.6,)}, {"shares": (0.4,)}, {"counts": (3,)}, {"thresholds": (0.9,), "most": 0.3, "order": "norm"},
     {"shares": (0.3,), "weight": "cls", "keys": "per_head"}, {"thresholds": (0.7,), "second_look": 1.0}],
    ids=str,
)  # fmt: skip
def test_one_call_and_its_steps_are_the_same_rule(settings, backend, generator):
    dtype = torch.float32 if backend == "cpu" else torch.float64
    for prefix in (0, 1, 3):
        operands = case(generator, dtype, prefix=prefix)
        (got, record), (want, steps) = (
            run(rule(**settings, backend=backend), *operands) for rule in (RankedNovelty, StepByStep)
        )
        assert len(want.values) < len(operands[0].values)
        for name in ("values", "ids", "sizes", "key_bias", "cu_seqlens"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert torch.equal(record.importance, steps.importance) and torch.equal(record.rows, steps.rows)


def test_the_layer_norm_that_follows_is_applied_where_tokens_merge(generator):
    """On a GPU at inference, unless somebody watches the module; and the steps one by one leave it to the module."""
    norm = LayerNorm(WIDTH, eps=1e-6)
    with PretendedGPU(), torch.no_grad():
        operands = case(generator, torch.float32)

        def left(rule):
            tokens, entering, qkv, dictionary = operands
            _, attention = self_attention(qkv.flatten(1), entering, HEADS, rule, entering.with_values)
            return rule(
                tokens, block_input=entering, attention=attention, dictionary=dictionary, layer=0, norm=norm
            )[0]  # fmt: skip

        together, apart = (left(rule(shares=(0.4,))) for rule in (RankedNovelty, StepByStep))
        number = together.num_tokens
        assert torch.equal(together.cu_seqlens, apart.cu_seqlens)
        for name in ("values", "ids", "sizes", "key_bias"):
            assert torch.equal(getattr(together, name)[:number], getattr(apart, name)[:number]), name
        assert together.normed[0] is norm and norm(together) is together.normed[1] and apart.normed is None
        torch.testing.assert_close(norm(together)[:number], norm(apart)[:number])
        handle = norm.register_forward_hook(lambda *_: None)
        assert left(RankedNovelty(shares=(0.4,))).normed is None
        handle.remove()
        with torch.enable_grad():
            assert left(RankedNovelty(shares=(0.4,))).normed is None
    assert run(RankedNovelty(shares=(0.4,)), *operands)[0].normed is None


class CountsOne(RankedNovelty):
    def chosen(self, tokens, layer):
        return {"count": torch.ones_like(self.prunable(tokens))}


def test_a_replaced_step_is_heard(generator):
    operands = case(generator, torch.float32)
    assert len(run(KeepsAll(shares=(0.4,)), *operands)[0].values) == len(operands[0].values)
    one, _ = run(CountsOne(shares=(0.4,)), *operands)
    before = operands[0].lengths
    assert torch.equal(one.lengths, before - (before > 2).int())  # two thirds at most
