"""Weights in files: what is in a file is told from its content, and nothing but tensors and plain values is ever unpickled."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..files import open_regular

__all__ = ["CheckpointError", "naming", "read_file", "read_json", "read_parts"]

CONFIG, PREPROCESSOR, TOKENIZER = "config.json", "preprocessor_config.json", "tokenizer"
WEIGHTS, OPEN_CLIP = "model.safetensors", "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_MOST_TENSORS = 50_000  # the largest models that are loaded here have 2,000

# What a file begins with that somebody took for a checkpoint.
_OTHERS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the weights themselves: fetch them with `git lfs pull`"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG\r\n", "a PNG picture"),
    (b"GIF8", "a GIF picture"),
    (b"RIFF", "a WebP picture, or sound"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"BZh", "compressed with bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive: unpack it first"),
    (b"\x89HDF", "HDF5, which Keras writes"),
    (b"GGUF", "GGUF, which llama.cpp reads"),
    (b"\x7fELF", "a program"),
)


class CheckpointError(ValueError):
    """A file that cannot be loaded; the message says which and why."""


@contextlib.contextmanager
def naming(what: object, errors: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """Turns errors of a block, by default ValueError, into CheckpointError with the name of what is wrong in front."""
    try:
        yield
    except errors as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{what}: {reason}") from error


def read_file(path: Path) -> tuple[dict[str, Tensor], float | None]:
    """State dict and temperature (None if it has none) of a safetensors file or a torch checkpoint, whatever its name.

    Raises:
        CheckpointError: unreadable, something else than a checkpoint, a pickle that holds more than tensors and plain values,
            or a file that would unpack to more than it holds.
    """
    kind = _kind(path)
    try:
        if kind == "safetensors":
            state = safetensors.torch.load_file(path)
            return _counted(state, path), None
        if kind == "archive":
            _check_archive(path)
        with open_regular(path) as file:  # given the path, torch would go by the name
            content = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, because it holds objects other than tensors and plain values, and unpickling those could run "
            f"code. Convert it to safetensors where you trust it. ({_first_line(error)})"
        ) from error
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise CheckpointError(f"{path}: damaged or cut off: {_first_line(error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a state dict or {{'model': state dict}}, got {type(content).__name__}")
    state = content.get("model", content)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected tensors under 'model', found other values")
    try:
        temperature = None if content.get("temperature") is None else float(content["temperature"])
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: temperature: expected a number, got {content['temperature']!r}") from error
    return _counted(dict(state), path), temperature


def _kind(path: Path) -> str:
    """ "safetensors", "archive" (torch since 1.6) or "pickle" (before).

    Raises:
        CheckpointError: nothing there, nothing that can be read, or something else.
    """
    try:
        with open_regular(path) as file:
            head, size = file.read(512), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if not head:
        raise CheckpointError(f"{path}: an empty file")
    header = int.from_bytes(head[:8], "little")
    # First of all, since the length of a header may look like another format's sign. The bound is the format's own.
    if head[8:9] == b"{" and header < 100_000_000:
        if 8 + header > size:
            raise CheckpointError(f"{path}: damaged or cut off: its header alone should have {header} of {size} bytes")
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "archive"
    if head.startswith(b"\x80"):
        return "pickle"
    raise CheckpointError(f"{path}: not a checkpoint, but {_described(head)}")


def _described(head: bytes) -> str:
    for beginning, what in _OTHERS:
        if head.startswith(beginning):
            return what
    try:
        text = head.decode("utf-8-sig", "strict" if len(head) < 512 else "ignore")
    except UnicodeDecodeError:
        text = "\0"
    if not all(letter.isprintable() or letter.isspace() for letter in text):
        return "in no format that is known here; expected a file of torch.save or safetensors"
    if text.lstrip().startswith("<"):
        return "a web page, perhaps an error where the download should have been"
    beginning = " ".join(text.split())
    return f"a text file that begins {beginning[:40] + ('...' if len(beginning) > 40 else '')!r}"


def _check_archive(path: Path) -> None:
    """torch.save never compresses. An archive that does can unpack to any size, and so can one whose parts share bytes."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    if not any(part.filename.endswith(("/data.pkl", "/constants.pkl")) for part in parts):
        raise CheckpointError(f"{path}: a ZIP archive, but not one that torch.save wrote")
    if any("/code/" in part.filename for part in parts):
        raise CheckpointError(
            f"{path}: refused, because it is a TorchScript archive, which holds code. Save its state dict instead, where "
            "you trust it: torch.save(torch.jit.load(path, 'cpu').state_dict(), ...)"
        )
    if len(parts) > _MOST_TENSORS:
        raise CheckpointError(f"{path}: {len(parts)} parts; at most {_MOST_TENSORS} are accepted")
    size = sum(part.file_size for part in parts)
    if size > path.stat().st_size:
        raise CheckpointError(
            f"{path}: refused, because its {path.stat().st_size} bytes would unpack to {size}; torch.save does not compress"
        )


def _counted(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    if len(state) > _MOST_TENSORS:
        raise CheckpointError(f"{path}: {len(state)} tensors; at most {_MOST_TENSORS} are accepted")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        CheckpointError: not there, not readable, not JSON, or not an object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {_first_line(error)}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings


def read_parts(directory: Path, names: Sequence[str] = (WEIGHTS, "pytorch_model.bin")) -> dict[str, Tensor]:
    """Weights in the first of these files that is there, or in several that its index lists; by default transformers' files.

    Raises:
        CheckpointError: none there, or one that cannot be read.
    """
    for name in names:
        if (directory / name).exists():
            return read_file(directory / name)[0]
        index = directory / f"{name}.index.json"
        if not index.exists():
            continue
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(part == Path(str(part)).name for part in places.values()):
            raise CheckpointError(f"{index}: expected 'weight_map', from keys to files of the same directory")
        state = {}
        for part in sorted(set(places.values())):
            state |= read_file(directory / part)[0]
        lost = sorted(set(places) - set(state))
        if lost:
            raise CheckpointError(f"{index}: its files lack {', '.join(lost)}")
        return state
    raise CheckpointError(f"{directory}: no weights; expected {' or '.join(names)}, or the index of their parts")
