"""20,000 images in 20 tars, embedded by two processes that are stopped twice: are the files those of a run that was
not?

    python benchmarks/bulk_stopped.py FOLDER [--images 20000]

Makes the tars (small JPEGs with captions; some members damaged, one header, one key twice) and a tiny model with random
weights in FOLDER, runs `madtp embed` once without a stop and once with SIGINT and SIGKILL at random moments, compares
the folders byte by byte, and shows the largest memory of any process at each tenth of the run.
"""

import argparse
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / folder) for folder in ("", "cli")]
from small_models import CONFIGS  # noqa: E402
from test_cli_batch import picture  # noqa: E402

import madtp  # noqa: E402
from madtp.bulk.writers import read_records  # noqa: E402

TARS = 20
DAMAGED = (7, 9)
"""Tars with a header that is none, and with a key that is there twice."""


def make(folder, images):
    """The tars and the model; what is there is left."""
    if not (folder / "model").exists():
        madtp.save_pretrained(madtp.load("random:base", config=CONFIGS["clip"], temperature=2.0), folder / "model")
    rng = random.Random(0)
    for t in range(TARS):
        path, place = folder / f"{t:05d}.tar", None
        if path.exists():
            continue
        with tarfile.open(folder / "part", "w") as tar:
            for n in range(images // TARS):
                key, file = f"{t:05d}{n:04d}", io.BytesIO()
                picture(rng).save(file, "JPEG")
                content = file.getvalue()
                if n % 97 == 13:
                    content = content[: len(content) // 3]
                if (t, n) == (DAMAGED[0], 55):
                    place = tar.offset
                for name, data in ((f"{key}.jpg", content), (f"{key}.txt", f"caption of {key}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                if (t, n) == (DAMAGED[1], 200):
                    tar.addfile(info, io.BytesIO(data))  # twice
        if place is not None:
            with open(folder / "part", "r+b") as tar:
                tar.seek(place)
                tar.write(b"\xff" * 200)
        os.replace(folder / "part", path)


def start(folder, output):
    command = [sys.executable, "-m", "madtp", "embed", "--model", str(folder / "model"), "--backend", "reference"]
    command += [str(folder / f"{{00000..{TARS - 1:05d}}}.tar"), "--output", f"{folder / output}/"]
    return subprocess.Popen(
        [*command, "--devices", "cpu,cpu", "--workers", "1", "--quiet"], stderr=subprocess.PIPE, preexec_fn=listening
    )


def listening():
    """A shell's background processes are told to ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def memory(pid):
    """Largest resident memory, in MB, of a process and those below it."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid,rss"], capture_output=True, text=True).stdout.split("\n")[1:]
    rows = [tuple(map(int, line.split())) for line in listing if line.strip()]
    family, found = {pid}, 0
    for _ in range(4):
        family |= {child for child, parent, _ in rows if parent in family}
    for process, _, size in rows:
        if process in family:
            found = max(found, size)
    return found / 1024


def watched(process, done, peaks):
    while process.poll() is None:
        shards = len(list(done.glob("*.json"))) if done.exists() else 0
        peaks[shards] = max(peaks.get(shards, 0), memory(process.pid))
        time.sleep(0.5)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    make(args.folder, args.images)

    began, peaks = time.time(), {}
    whole = start(args.folder, "whole")
    threading.Thread(target=watched, args=(whole, args.folder / "whole/stats", peaks), daemon=True).start()
    _, errors = whole.communicate()
    print(f"uninterrupted: exit code {whole.returncode}, {time.time() - began:.0f} s")
    print(errors.decode()[-1500:])
    steps = [max(v for k, v in peaks.items() if k // 2 == step) for step in sorted({k // 2 for k in peaks})]
    print("largest process at each tenth, MB:", " ".join(f"{size:.0f}" for size in steps))

    rng, stats = random.Random(), args.folder / "stopped/stats"
    for number in (signal.SIGINT, signal.SIGKILL):
        before = len(list(stats.glob("*.json")))
        process = start(args.folder, "stopped")
        until = before + rng.randint(2, 5)
        while len(list(stats.glob("*.json"))) < until and process.poll() is None:
            time.sleep(rng.random())
        process.send_signal(number)
        process.communicate()
        print(f"{number.name} with {len(list(stats.glob('*.json')))} shards done: exit code {process.returncode}")
    last = start(args.folder, "stopped")
    last.communicate()
    expected, found = contents(args.folder / "whole"), contents(args.folder / "stopped")
    print(f"resumed: exit code {last.returncode}; {len(found)} files, identical: {found == expected}")

    rows = [row for path in sorted((args.folder / "whole/metadata").iterdir()) for row in read_records(path)]
    vectors = sum(len(np.load(path, mmap_mode="r")) for path in (args.folder / "whole/img_emb").iterdir())
    failed = [row for path in sorted((args.folder / "whole/errors").iterdir()) for row in read_records(path)]
    print(f"{vectors} vectors, {len(failed)} failures, {len({row['image_path'] for row in rows})} keys")


if __name__ == "__main__":
    main()
