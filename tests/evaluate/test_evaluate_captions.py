"""Captioning metrics: those of pycocoevalcap, with all that could not run named."""

import shutil
import stat
import sys

import pytest

from madtp.tasks import caption_metrics
from madtp.tasks.caption_metrics import caption_scores

CAPTIONS = {
    411: "A red bus waits, at the stop.",
    412: "an empty plate on a wooden table",
    "x": "two dogs don't play with a frisbee",
}
REFERENCES = {
    "x": ["Two dogs play with a frisbee!", "The dogs don't share the frisbee."],
    411: ["A bus waits at a stop.", "the red bus stands still", "Some people board a bus."],
    412: ["An empty plate on a table."],
}
# The same without what a tokeniser has to do.
PLAIN_CAPTIONS = {
    1: ["two dogs don't play with a frisbee"],
    2: ["a red bus waits at the stop"],
    3: ["an empty plate on a wooden table"],
}
PLAIN_REFERENCES = {
    1: ["two dogs play with a frisbee", "the dogs don't share the frisbee"],
    2: ["a bus waits at a stop", "the red bus stands still", "some people board a bus"],
    3: ["an empty plate on a table"],
}

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")


@pytest.fixture(autouse=True)
def library():
    return pytest.importorskip("pycocoevalcap.bleu.bleu")


@pytest.fixture
def no_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def by_hand(gold, candidates):
    """Scores of tokenised captions as the package itself gives them."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, _ = Bleu(4).compute_score(gold, candidates)
    scores = {f"Bleu_{n}": value for n, value in enumerate(bleu, 1)}
    return {
        **scores,
        "ROUGE_L": Rouge().compute_score(gold, candidates)[0],
        "CIDEr": Cider().compute_score(gold, candidates)[0],
    }


def test_without_java_the_rest_is_computed_and_the_lack_named(no_java):
    result = caption_scores(CAPTIONS, REFERENCES)
    assert result.tokenizer == "plain"
    assert result.scores == pytest.approx(by_hand(PLAIN_REFERENCES, PLAIN_CAPTIONS), rel=1e-12)
    assert min(result.scores.values()) > 0.1
    assert result.skipped.keys() == {"PTBTokenizer", "METEOR", "SPICE"}
    assert all("needs Java" in reason for reason in result.skipped.values())


def test_bleu_and_rouge_of_one_caption_by_hand(no_java):
    # Of the words a, red, bus, stops three of four are in the reference, of the pairs of words two of three.
    # Both have four words: no brevity penalty. The longest common subsequence has three of them.
    scores = caption_scores({1: "A red bus stops."}, {1: ["a red bus waits"]}).scores
    assert scores["Bleu_1"] == pytest.approx(3 / 4)
    assert scores["Bleu_2"] == pytest.approx((3 / 4 * 2 / 3) ** 0.5)
    assert scores["ROUGE_L"] == pytest.approx(3 / 4)
    assert scores["CIDEr"] == 0  # each word is in every image there is


@needs_java
@pytest.mark.slow
def test_with_java_the_tokenizer_and_meteor_are_those_of_the_package(monkeypatch):
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    compute, calls = Meteor.compute_score, []  # METEOR reads its tables for half a minute: it is asked once

    def computed(self, *arguments):
        calls.append((*arguments, compute(self, *arguments)))
        return calls[-1][-1]

    monkeypatch.setattr(Meteor, "compute_score", computed)
    captions, references = {"empty": "", **CAPTIONS}, {"empty": ["a blank page", ""], **REFERENCES}
    result = caption_scores(captions, references)
    tokenizer = PTBTokenizer()
    gold = tokenizer.tokenize({key: [{"caption": t} for t in texts] for key, texts in references.items()})
    candidates = tokenizer.tokenize({key: [{"caption": captions[key]}] for key in references})
    ((*asked, (meteor, _)),) = calls
    assert [list(part.values()) for part in asked] == [
        list(gold.values()),
        list(candidates.values()),
    ] and 0 < meteor < 1
    expected = by_hand(gold, candidates) | {"METEOR": meteor}
    assert result.tokenizer == "ptb"
    assert {name: result.scores[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert "do n't" in gold["x"][1]
    assert result.scores.keys() | result.skipped.keys() == expected.keys() | {"SPICE"}


@needs_java
def test_spice_does_not_download_its_models(monkeypatch):
    models = pytest.importorskip("pycocoevalcap.spice.get_stanford_models")
    monkeypatch.setattr(models, "JAR", "stanford-corenlp-none")
    monkeypatch.setattr(models, "urlretrieve", lambda *_, **__: pytest.fail("downloads"))
    with pytest.raises(RuntimeError, match="needs stanford-corenlp-none, which is not installed"):
        caption_metrics._spice({1: ["a"]}, {1: ["a"]})


def test_words_without_java():
    words = caption_metrics._plain("The dog’s well-worn, 2 balls - don't   'run'...")
    assert words == "the dog’s well-worn 2 balls don't run"


@pytest.mark.parametrize("output", ["", "echo a red"])
def test_a_java_that_fails_is_named_and_does_not_hang(monkeypatch, tmp_path, output):
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{output}\necho no such virtual machine >&2\nexit 1\n")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    result = caption_scores(CAPTIONS, REFERENCES)
    assert result.tokenizer == "plain"
    assert result.scores == pytest.approx(by_hand(PLAIN_REFERENCES, PLAIN_CAPTIONS), rel=1e-12)
    assert "of 9 sentences" in result.skipped["PTBTokenizer"]
    assert "no such virtual machine" in result.skipped["METEOR"]
    assert "SPICE" in result.skipped


@needs_java
def test_the_tokenizer_gives_each_sentence_its_own_words_back():
    sentences = ["", "A\u2028bus\r\nwaits", " . ", "\x0bat the\x85stop", ""]
    assert caption_metrics._ptb(sentences) == ["", "a bus waits", "", "at the stop", ""]


def test_captions_and_references_are_of_the_same_images(no_java):
    with pytest.raises(ValueError, match="1 have none .first .2.."):
        caption_scores({1: "a dog"}, {1: ["a dog"], 2: ["a bus"]})
    with pytest.raises(ValueError, match="1 predictions are for others .first .2.."):
        caption_scores({1: "a dog", 2: "a bus"}, {1: ["a dog"]})
    with pytest.raises(ValueError, match="one prediction for each image"):
        caption_scores({}, {})


@pytest.mark.parametrize("references", ["a dog", []])
def test_references_are_lists(no_java, references):
    with pytest.raises(ValueError, match="references of image 1"):
        caption_scores({1: "a dog"}, {1: references})


@pytest.mark.parametrize(("caption", "reference"), [(None, "a dog"), ("a dog", None)])
def test_captions_are_strings(no_java, caption, reference):
    with pytest.raises(TypeError, match="captions of image 1"):
        caption_scores({1: caption}, {1: [reference]})


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(ImportError, match=r"pip install 'madtp\[caption-metrics\]'"):
        caption_scores({1: "a"}, {1: ["a"]})
