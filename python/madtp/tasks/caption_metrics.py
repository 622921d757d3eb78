"""Captioning metrics as the COCO evaluation computes them, by pycocoevalcap, an optional dependency.

BLEU, ROUGE-L and CIDEr are Python. The tokeniser they are published with (Stanford's PTB tokeniser), METEOR
and SPICE are Java programs, and SPICE needs models that are not in the package. Whatever cannot run is
reported with the reason.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .metrics import check_same_keys

__all__ = ["CaptionScores", "caption_scores"]

# What a program in another language that fails, or that is not there, shows as.
_FAILURES = (OSError, RuntimeError, ValueError, subprocess.SubprocessError)


@dataclass(frozen=True)
class CaptionScores:
    """Captioning metrics of a set of captions, by the names the COCO evaluation gives them.

    scores: Bleu_1 to Bleu_4, ROUGE_L, CIDEr, and METEOR and SPICE where they ran; mostly 0 to 1, CIDEr to 10.
    skipped: what did not run ("METEOR", "SPICE", "PTBTokenizer") -> why.
    tokenizer: "ptb", or "plain" where that could not run: runs of letters, digits and inner apostrophes and
        hyphens, in lower case. Numbers from "plain" cannot be compared with published ones.
    """

    scores: dict[str, float]
    skipped: dict[str, str]
    tokenizer: str


def caption_scores(captions: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]]) -> CaptionScores:
    """Score one caption per image against the captions that people wrote for it.

    captions: image id -> caption. references: image id -> one caption or more. CIDEr weighs words by how many
    images of this set they occur with: it says nothing about a handful of images, and is 0 for a single one.

    Raises:
        ImportError: pycocoevalcap is not installed.
        ValueError: the image ids of the two differ, or an image has no reference.
        TypeError: a caption is not a string.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ImportError(
            "captioning metrics need the package pycocoevalcap: pip install 'madtp[caption-metrics]'"
        ) from error
    check_same_keys(captions, references, "image")
    for image, texts in references.items():
        if isinstance(texts, str) or not texts:
            raise ValueError(f"references of image {image!r}: expected one caption or more, got {texts!r}")
        for text in (captions[image], *texts):
            if not isinstance(text, str):
                raise TypeError(f"captions of image {image!r}: expected strings, got {text!r}")

    skipped = {}
    sentences = [captions[image] for image in references]
    sentences += [text for texts in references.values() for text in texts]
    try:
        tokenised, tokenizer = iter(_ptb(sentences)), "ptb"
    except _FAILURES as error:
        tokenised, tokenizer = map(_plain, sentences), "plain"
        skipped["PTBTokenizer"] = _reason(error)
    # The package wants both by the same keys, SPICE keys that can be sorted and written as JSON.
    candidates = {n: [next(tokenised)] for n in range(len(references))}
    gold = {n: [next(tokenised) for _ in texts] for n, texts in enumerate(references.values())}

    bleu, _ = Bleu(4).compute_score(gold, candidates, verbose=0)
    scores = {f"Bleu_{n}": float(value) for n, value in enumerate(bleu, 1)}
    scores["ROUGE_L"] = float(Rouge().compute_score(gold, candidates)[0])
    scores["CIDEr"] = float(Cider().compute_score(gold, candidates)[0])
    for name, score in (("METEOR", _meteor), ("SPICE", _spice)):
        try:
            scores[name] = float(score(gold, candidates))
        except _FAILURES as error:
            skipped[name] = _reason(error)
    return CaptionScores(scores, skipped, tokenizer)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _plain(sentence: str) -> str:
    return " ".join(re.findall(r"\w+(?:['’-]\w+)*", sentence.lower()))


def _ptb(sentences: list[str]) -> list[str]:
    """Sentences as words of the Penn Treebank, lower case, without punctuation."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    _require_java()
    # The program reads a sentence a line, and Unicode knows more line ends than "\n".
    lines = {n: [{"caption": " ".join(sentence.split())}] for n, sentence in enumerate(sentences)}
    words = [texts[0] for texts in PTBTokenizer().tokenize(lines).values()]
    # Where the program fails the package gives back what there is, without an error.
    if len(words) != len(sentences) or (not any(words) and any(map(_plain, sentences))):
        raise RuntimeError(f"gave {len(words)} of {len(sentences)} sentences back; its Java program failed")
    return words


def _meteor(gold: dict, candidates: dict) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    _require_java()
    meteor = Meteor()
    try:
        return meteor.compute_score(gold, candidates)[0]
    except (OSError, ValueError) as error:  # of the pipe, or of an empty line where a number should be
        process = meteor.meteor_p
        process.kill()
        with contextlib.suppress(OSError):
            process.stdin.close()
        lines = process.stderr.read().decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"its Java program failed: {lines[-1] if lines else error}") from error
    finally:
        # An error leaves the lock held, and the object would wait for it for ever when it is deleted.
        if meteor.lock.locked():
            meteor.lock.release()


def _spice(gold: dict, candidates: dict) -> float:
    from pycocoevalcap.spice import get_stanford_models as models
    from pycocoevalcap.spice.spice import Spice

    _require_java()
    # Looked for here, because the package would download hundreds of megabytes unasked.
    folder = Path(models.SPICEDIR) / models.SPICELIB
    if not all((folder / f"{models.JAR}{part}.jar").is_file() for part in ("", "-models")):
        raise RuntimeError(f"needs {models.JAR}, which is not installed; python -m {models.__name__} downloads it")
    return Spice().compute_score(gold, candidates)[0]


def _require_java() -> None:
    if shutil.which("java") is None:
        raise RuntimeError("needs Java, and there is no command `java`")
