"""Accuracy, VQA accuracy and recall against values worked out by hand, and against plain definitions."""

import math
from itertools import combinations

import pytest
import torch

from madtp.tasks.metrics import Recall, accuracy, normalise_vqa_answer, recall, vqa_accuracy, vqa_score


def test_accuracy():
    assert accuracy([True, False, True, True], [1, 1, 1, 0]) == 0.5
    assert accuracy(["cat", "dog", "cat"], ["cat", "dog", "bird"]) == 2 / 3
    assert accuracy(torch.tensor([3, 1, 2]), torch.tensor([3, 1, 2])) == 1


@pytest.mark.parametrize(("predictions", "labels"), [([], []), ([1], []), ([1, 2], [1])])
def test_accuracy_wants_one_prediction_for_each_label(predictions, labels):
    with pytest.raises(ValueError, match="one prediction for each label"):
        accuracy(predictions, labels)


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("The red\tcar\n", "red car"),
        ("a", ""),
        ("two", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("2.5", "2.5"),
        ("2. 5", "2 5"),
        (".5", ".5"),
        ("no. 7", "no 7"),
        ("100,978", "100978"),
        ("100,978-5", "1009785"),  # a comma between digits: all punctuation is deleted
        ("red,green", "red green"),
        ("red, green", "red green"),
        ("yes/no", "yes no"),
        ("black-white", "black white"),
        ("semi- automatic", "semi automatic"),
        ("t-shirt -", "tshirt"),  # one of the hyphens is at a space: all are deleted
        ("what?!", "what"),
        ("2:50 pm", "2:50 pm"),
        ("girl's", "girl's"),
        ("dont", "don't"),
        ("Wont", "won't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("twas", "'twas"),
        ("its", "its"),
        ("well", "well"),
        ("somebody'd", "somebodyd"),
        ("an answer to the question", "answer to question"),
    ],
)
def test_vqa_answers_are_normalised_as_the_official_code_does(answer, normalised):
    assert normalise_vqa_answer(answer) == normalised


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_score_of_ten_annotators(agreeing, score):
    annotators = ["mug"] * agreeing + ["cup"] * (10 - agreeing)
    assert vqa_score("mug", annotators) == pytest.approx(score)


@pytest.mark.parametrize("total", [2, 3, 5, 10])
def test_vqa_score_is_the_mean_over_all_sets_that_leave_one_annotator_out(total):
    for agreeing in range(total + 1):
        annotators = ["yes"] * agreeing + ["no"] * (total - agreeing)
        sets = list(combinations(annotators, total - 1))
        expected = sum(min(others.count("yes") / 3, 1) for others in sets) / len(sets)
        assert vqa_score("yes", annotators) == pytest.approx(expected)


def test_vqa_answers_and_annotators_are_both_normalised_where_annotators_differ():
    assert vqa_score("the two", ["2", "Two", "two.", "a two", "three"]) == 1
    assert vqa_score("mug ", ["mug\n", "\tmug", "mug", "mug", "cup"]) == 1


def test_unanimous_annotators_are_matched_to_the_letter():
    assert vqa_score("two", ["2"] * 10) == 0
    assert vqa_score("Yes", ["Yes\n"] * 10) == 1
    assert vqa_score("yes", ["Yes"] * 10) == 0


@pytest.mark.parametrize("annotators", [[], ["yes"]])
def test_vqa_score_wants_two_annotators(annotators):
    with pytest.raises(ValueError, match="at least two annotators"):
        vqa_score("yes", annotators)


def test_vqa_accuracy_counts_each_question_once():
    references = {1: ["yes"] * 10, 2: ["2"] * 3 + ["3"] * 7, 3: ["red", "blue"] * 5}
    assert vqa_accuracy({3: "red", 2: "two", 1: "no"}, references) == pytest.approx((0 + 0.9 + 1) / 3)


@pytest.mark.parametrize("predictions", [{}, {1: "yes"}, {1: "yes", 2: "no", 3: "no"}])
def test_vqa_accuracy_wants_the_same_questions(predictions):
    with pytest.raises(ValueError, match="one prediction for each question"):
        vqa_accuracy(predictions, {1: ["yes"] * 10, 2: ["no"] * 10})
    with pytest.raises(ValueError, match="one prediction for each question"):
        vqa_accuracy({}, {})


# Three images with two, one and two captions.
IMAGE_OF_TEXT = [0, 0, 1, 2, 2]
SCORES = torch.tensor(
    [
        [0.1, 0.9, 0.8, 0.2, 0.3],  # its second caption is first
        [0.7, 0.6, 0.5, 0.1, 0.2],  # its caption is third
        [0.8, 0.1, 0.9, 0.4, 0.3],  # its first caption is third
    ]
)
# The right image of each caption, by column: third, first; third; first, shares the first place.


def test_recall_by_hand():
    result = recall(SCORES, IMAGE_OF_TEXT, ks=(1, 2, 3))
    assert result.image_to_text == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 1})
    assert result.text_to_image == pytest.approx({1: 2 / 5, 2: 3 / 5, 3: 1})
    assert result.r_mean == pytest.approx(((1 / 3 + 1 / 3 + 1) / 3 + (2 / 5 + 3 / 5 + 1) / 3) / 2)


def test_r_mean_weighs_both_directions_alike():
    assert Recall({1: 0.2, 5: 0.4}, {1: 0.5, 5: 0.9}).r_mean == pytest.approx((0.3 + 0.7) / 2)


def test_default_ks_are_those_of_the_papers():
    result = recall(SCORES, IMAGE_OF_TEXT)
    assert list(result.image_to_text) == list(result.text_to_image) == [1, 5, 10]
    assert result.image_to_text[5] == result.text_to_image[10] == 1


def test_the_two_directions_may_have_scores_of_their_own():
    reranked = torch.eye(3)[IMAGE_OF_TEXT]  # each text has found its image
    result = recall(SCORES, IMAGE_OF_TEXT, reranked, ks=(1, 2))
    assert result.text_to_image == {1: 1, 2: 1}
    assert result.image_to_text == recall(SCORES, IMAGE_OF_TEXT, ks=(1, 2)).image_to_text


def test_a_tie_counts_against_the_model():
    assert recall(torch.zeros(4, 4), range(4), ks=(1, 3)).r_mean == 0
    assert recall(torch.zeros(4, 4), range(4), ks=(4,)).r_mean == 1
    # What re-ranking left out shares one low score; being in that lot is not being found.
    scores = torch.full((12, 12), -100.0)
    scores[:, 0] = 1
    assert recall(scores, range(12), ks=(10,)).image_to_text[10] == 1 / 12


def test_right_captions_do_not_stand_in_each_others_way():
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.4], [0.1, 0.1, 0.2, 0.3]])
    assert recall(scores, [0, 0, 0, 1], ks=(1,)).image_to_text[1] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_recall_equals_its_definition(generator, dtype):
    images, texts = 12, 30
    others = torch.randint(images, (texts - images,), generator=generator)
    image_of_text = [*range(images), *others.tolist()]
    # Few different values: many ties.
    scores = torch.randint(6, (images, texts), generator=generator).to(dtype)
    result = recall(scores, image_of_text)

    def found(right, row, k):
        """Whether a right candidate is among the first k, when wrong ones come first among equals."""
        order = sorted(range(len(row)), key=lambda n: (-float(row[n]), n in right))
        return bool(right & set(order[:k]))

    for k in (1, 5, 10):
        rights = [{t for t in range(texts) if image_of_text[t] == i} for i in range(images)]
        assert result.image_to_text[k] == sum(map(found, rights, scores, [k] * images)) / images
        rights = [{image} for image in image_of_text]
        assert result.text_to_image[k] == sum(map(found, rights, scores.T, [k] * texts)) / texts


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((torch.zeros(3), [0, 0, 0]), "expected .images, texts., got"),
        ((torch.zeros(0, 3), [0, 0, 0]), "expected .images, texts., got"),
        ((torch.zeros(2, 3), [0, 1]), "expected 3 image indices, got 2"),
        ((torch.zeros(2, 3), [0, 1, 2]), r"image_of_text\[2\]: expected an index below 2, got 2"),
        ((torch.zeros(2, 3), [0, 1, -1]), "got -1"),
        ((torch.zeros(2, 3), [0, 0, 0]), "image 1 has no text"),
        ((torch.zeros(2, 3), [0, 1, 1], torch.zeros(2, 3)), r"text_to_image: expected \[3, 2\]"),
        ((torch.full((2, 3), math.nan), [0, 1, 1]), "NaN"),
        ((torch.zeros(2, 3), [0, 1, 1], torch.full((3, 2), math.nan)), "NaN"),
        ((torch.zeros(2, 3), [0, 1, 1], None, ()), "ks"),
        ((torch.zeros(2, 3), [0, 1, 1], None, (0, 5)), "ks"),
    ],
)
def test_recall_refuses_what_does_not_fit(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        recall(*arguments)
