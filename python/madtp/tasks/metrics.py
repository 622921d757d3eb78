"""Accuracy, VQA accuracy and retrieval recall, from predictions that are already there.

All of them are fractions from 0 to 1 (papers print them times 100). Every example counts once: a prediction
that is missing or belongs to no example is an error. Captioning metrics are in `caption_metrics`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Recall", "accuracy", "normalise_vqa_answer", "recall", "vqa_accuracy", "vqa_score"]


def accuracy(predictions: Sequence, labels: Sequence) -> float:
    """Fraction of `predictions` that equal the label at the same position; any values that can be compared.

    Raises ValueError if the two differ in length or are empty.
    """
    if len(predictions) != len(labels) or len(labels) == 0:
        raise ValueError(f"expected one prediction for each label, got {len(predictions)} for {len(labels)}")
    return sum(bool(prediction == label) for prediction, label in zip(predictions, labels)) / len(labels)


# VQA: the rule of the official evaluation code, github.com/GT-Vision-Lab/VQA,
# PythonEvaluationTools/vqaEvaluation/vqaEval.py, described at visualqa.org/evaluation.html (Antol et al.,
# "VQA: Visual Question Answering", ICCV 2015). Where the description and the code differ, the code counts: it
# made the published numbers.

_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WORDS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")

# A word that lacks exactly one of its apostrophes gets it back.
_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _APOSTROPHES for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the official table has this one the wrong way round


def normalise_vqa_answer(answer: str) -> str:
    """An answer as the official VQA evaluation compares it.

    Punctuation other than apostrophes and colons becomes a space; where it stands at a space already, or the
    answer has a comma between digits, it is deleted (100,978 is 100978). Periods go unless a digit follows.
    Then lower case, number words to ten (and "none") as digits, articles deleted, missing apostrophes of
    contractions put back.
    """
    text = _without_line_breaks(answer)
    grouped_digits = re.search(r"\d,\d", text) is not None
    spaced = text
    for mark in _VQA_PUNCTUATION:
        deleted = grouped_digits or mark + " " in text or " " + mark in text
        spaced = spaced.replace(mark, "" if deleted else " ")
    words = re.sub(r"\.(?!\d)", "", spaced).lower().split()
    words = [_NUMBER_WORDS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_line_breaks(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def vqa_score(answer: str, annotators: Sequence[str]) -> float:
    """Official VQA score of one answer: min(number of annotators who gave it / 3, 1), averaged over all ways
    of leaving out one annotator. Of ten annotators 1, 2, 3 and 4 who agree give 0.3, 0.6, 0.9 and 1.

    `annotators` holds each one's answer, normally ten. Both sides are normalised (`normalise_vqa_answer`),
    but, as in the official code, only if the annotators differ; where they are unanimous the answer has to
    match to the letter. Raises ValueError for fewer than two annotators.
    """
    if len(annotators) < 2:
        raise ValueError(f"the answers of at least two annotators are needed, got {len(annotators)}")
    answer, *annotators = (_without_line_breaks(text) for text in (answer, *annotators))
    if len(set(annotators)) > 1:
        answer, *annotators = (normalise_vqa_answer(text) for text in (answer, *annotators))
    agree, total = annotators.count(answer), len(annotators)
    # Leaving out one who agrees leaves agree - 1 others; leaving out another one leaves them all.
    return (agree * min((agree - 1) / 3, 1) + (total - agree) * min(agree / 3, 1)) / total


def vqa_accuracy(predictions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> float:
    """Mean `vqa_score` over all questions.

    predictions: question id -> answer. references: question id -> the answers of all annotators. Raises
    ValueError if their question ids differ, or as `vqa_score` does.
    """
    check_same_keys(predictions, references, "question")
    return sum(vqa_score(predictions[key], answers) for key, answers in references.items()) / len(references)


def check_same_keys(predictions: Mapping, references: Mapping, noun: str) -> None:
    """Raise ValueError unless both mappings have the same keys, one at least; ``noun`` is what the keys stand for."""
    missing = [key for key in references if key not in predictions]
    unknown = [key for key in predictions if key not in references]
    if missing or unknown or not references:
        raise ValueError(
            f"expected one prediction for each {noun}, at least one: of {len(references)} {noun}s "
            f"{len(missing)} have none (first {missing[:3]}), and {len(unknown)} predictions are for others "
            f"(first {unknown[:3]})"
        )


@dataclass(frozen=True)
class Recall:
    """Recall at K, from 0 to 1, in both directions of retrieval.

    image_to_text[K]: fraction of images of which one caption at least is among the first K texts.
    text_to_image[K]: fraction of captions whose image is among the first K images.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]

    @property
    def r_mean(self) -> float:
        """Mean over both directions of the mean over K."""
        means = [sum(by_k.values()) / len(by_k) for by_k in (self.image_to_text, self.text_to_image)]
        return sum(means) / 2


def recall(image_to_text, image_of_text: Sequence[int], text_to_image=None, ks: Sequence[int] = (1, 5, 10)) -> Recall:
    """Recall at each of `ks`, for images that may have several captions each.

    A tie counts against the model: a wrong candidate with the same score as the right one is ranked before
    it. So a model that gives all candidates one score gets no credit, and candidates that re-ranking left
    out, which share one low score, are not found by accident.

    Args:
        image_to_text: [I, T] tensor or array, score of each text for each image; higher is better.
        image_of_text: [T] index of the image that each text belongs to. Every image has one text at least.
        text_to_image: [T, I] scores of each image for each text, where they are not the transpose of
            `image_to_text` (re-ranking gives two different ones).
        ks: the values of K.

    Raises ValueError if shapes, indices or `ks` do not fit, or a score is NaN.
    """
    image_to_text = torch.as_tensor(image_to_text).detach().cpu()
    if image_to_text.ndim != 2 or 0 in image_to_text.shape:
        raise ValueError(f"image_to_text: expected [images, texts], got {tuple(image_to_text.shape)}")
    images, texts = image_to_text.shape
    text_to_image = image_to_text.T if text_to_image is None else torch.as_tensor(text_to_image)
    text_to_image = text_to_image.detach().cpu()
    if text_to_image.shape != (texts, images):
        raise ValueError(f"text_to_image: expected [{texts}, {images}], got {tuple(text_to_image.shape)}")
    if image_to_text.isnan().any() or text_to_image.isnan().any():
        raise ValueError("scores: some are NaN")
    if len(image_of_text) != texts:
        raise ValueError(f"image_of_text: expected {texts} image indices, got {len(image_of_text)}")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: expected numbers from 1, got {tuple(ks)}")
    texts_of_image: list[list[int]] = [[] for _ in range(images)]
    for text, image in enumerate(map(int, image_of_text)):
        if not 0 <= image < images:
            raise ValueError(f"image_of_text[{text}]: expected an index below {images}, got {image}")
        texts_of_image[image].append(text)
    if [] in texts_of_image:
        raise ValueError(f"image_of_text: image {texts_of_image.index([])} has no text")
    images_of_text = [[int(image)] for image in image_of_text]
    return Recall(_recall(image_to_text, texts_of_image, ks), _recall(text_to_image, images_of_text, ks))


def _recall(scores: torch.Tensor, right: list[list[int]], ks: Sequence[int]) -> dict[int, float]:
    """scores [queries, candidates]; `right` lists each query's right candidates."""
    ahead = []  # wrong candidates ranked before the best right one
    for row, indices in zip(scores, right):
        own = row[indices]
        ahead.append(int((row >= own.max()).sum() - (own >= own.max()).sum()))
    return {k: sum(count < k for count in ahead) / len(ahead) for k in ks}
