"""The same command writes the same bytes in every process, whatever else the machine does meanwhile."""

import numpy as np
import pytest
import torch
from fresh import COMMAND
from PIL import Image
from safetensors.torch import load_file

import madtp
from madtp import NLVRConfig
from madtp.config import CLIPConfig, CLIPTextConfig, TextConfig, VisionConfig
from madtp.tasks import TASKS
from madtp.weights import randomize

# As wide as a layer has to be for libraries to differ in speed, and in rounding.
VISION = VisionConfig(image_size=64, patch_size=8, embed_dim=256, depth=3, num_heads=4, sd_num=20, sd_dim=256)
MODELS_OF = {
    "nlvr": NLVRConfig(VISION, TextConfig(256, 3, 4, 512, 200, 40, 256), merge_from=1),
    "clip": CLIPConfig(
        VisionConfig(64, 8, 256, 3, 4, sd_num=20, sd_dim=64, map_func=True),
        CLIPTextConfig(64, 2, 2, 96, 514, 40),
        embed_dim=64,
    ),
}
RUNS = 4
COMMANDS = {
    f"{name}-{dtype}": [*arguments.split(), "--dtype", dtype, "--threads", "1"]
    for name, arguments in (
        ("answers", "nlvr --model plain.pth --tokenizer demo --temperature 2 --input pairs.jsonl --batch-size 3"),
        ("embeddings", "embed --model clip pictures --batch-size 2"),
    )
    for dtype in ("float32", "bfloat16")
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same")
    random = np.random.default_rng(1)
    (folder / "pictures").mkdir()
    for number in range(5):
        pixels = np.kron(random.integers(0, 256, (6, 7, 3)), np.ones((9 + number, 9, 1)))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "pictures" / f"{number}.png")
    rows = [
        f'{{"images": ["pictures/{i}.png", "pictures/{(i + 1) % 5}.png"], "text": "{"two dogs " * (i + 1)}"}}'
        for i in range(5)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    for task, config in MODELS_OF.items():
        model = TASKS[task].Model(config, temperature=2.0).eval()
        randomize(model, seed=4)
        model.processor = TASKS[task].Processor(64, config.text.vocab_size, 40, "demo")
        madtp.save_pretrained(model, folder / task)
    # A checkpoint without a dictionary: what is made up is the same in all processes, too.
    state = load_file(folder / "nlvr" / "model.safetensors")
    del state["space_dict"]
    torch.save(state, folder / "plain.pth")
    return folder


@pytest.fixture(scope="module")
def written(folder, fresh_command):
    """What each run of each command wrote. Every run is a process of its own, forked before anything was computed, and all are
    each other's load."""
    outputs, processes = {name: [] for name in COMMANDS}, []
    for run in range(RUNS):
        for name, arguments in COMMANDS.items():
            outputs[name].append(f"{name}-{run}{'.jsonl' if name.startswith('answers') else '.npy'}")
            processes.append(fresh_command.start(COMMAND, *arguments, "--output", outputs[name][-1], cwd=folder))
    for process in processes:
        assert process.wait(600) == 0, process.stderr
    return {name: [(folder / output).read_bytes() for output in paths] for name, paths in outputs.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_all_processes_write_the_same(command, written):
    found = written[command]
    assert len(found) == RUNS and len(set(found)) == 1
    least = 5 * 64 * 4 if command.startswith("embeddings") else 5 * len('{"row": 0, "answer": true}')
    assert len(found[0]) > least
