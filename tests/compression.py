"""Tiny models and generated pictures for the tests of `madtp compress` and `madtp calibrate`."""

import json

import numpy as np
from PIL import Image
from small_models import configs

import madtp
from madtp.tasks import TASKS
from madtp.weights import randomize

CONFIGS = configs(32, depth=3, layers=3, sd_num=8, mlp_ratio=4, positions=48)
VISION, TEXT = CONFIGS["caption"].vision, CONFIGS["caption"].text
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}


def tiny(task):
    """A dense model with random weights and the bundled vocabulary."""
    config = CONFIGS[task]
    model = TASKS[task].Model(config)
    randomize(model, seed=3)
    model.space_dict.data.mul_(0.2)  # alignments of order one, so that thresholds are averages of many tokens
    model.processor = TASKS[task].Processor(32, config.text.vocab_size, config.text.max_position_embeddings, "demo")
    return model


def save_tiny(task, directory):
    madtp.save_pretrained(tiny(task), directory)
    return directory


def pictures(folder, number, seed=0):
    """Noisy pictures of one colour each; returns their names and colours."""
    random = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    made = []
    for index in range(number):
        colour = list(COLOURS)[index % len(COLOURS)]
        noise = random.integers(-40, 40, (40, 48, 3))
        name = f"{seed}-{index}.png"
        Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)).save(folder / name)
        made.append((name, colour))
    return made


def annotations(task, folder, number=8, seed=0):
    """An annotation file for a task, with pictures beside it."""
    made = pictures(folder, number, seed)
    rows = []
    for index, (name, colour) in enumerate(made):
        other, other_colour = made[(index + 1) % number]
        if task == "nlvr":
            claimed = colour if index % 2 else other_colour
            sentence = f"the left one is {claimed}" if index % 3 else f"one is {claimed} " * 3
            rows.append({"sentence": sentence, "label": str(claimed == colour), "images": [name, other]})
        elif task == "vqa":
            answers = [colour] * 7 + ["grey"] * 3
            rows.append({"image": name, "question": "which colour?", "question_id": index, "answer": answers})
        else:
            rows.append({"image": name, "image_id": index, "caption": f"{colour} on table {index}"})
    path = folder / f"{task}-{seed}.json"
    path.write_text(json.dumps(rows))
    return path
