"""Which images and texts a run is about: files, folders, patterns of names, lines of a file."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["IMAGE_SUFFIXES", "find_images", "read_lines"]

IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
"""Names of files that a folder's images have; case does not matter."""


def find_images(sources: Sequence[str | os.PathLike]) -> list[str]:
    """Paths of images, each once: in the order of the sources, those of a folder sorted by name.

    Args:
        sources: files; folders, which are searched with all their subfolders for files with an image's
            suffix, hidden ones left out; or patterns with ``*``, ``?``, ``[...]`` and ``**`` for any depth.

    Raises:
        FileNotFoundError: a source that is neither there nor matches anything.
        ValueError: no images in a folder.
        OSError: a folder that cannot be read.
    """
    found: dict[str, str] = {}
    for source in map(os.fspath, sources):
        for path in _files(source):
            found.setdefault(os.path.abspath(path), path)
    return list(found.values())


def _files(source: str) -> list[str]:
    if os.path.isdir(source):
        paths = list(_images_below(source))
        if not paths:
            raise ValueError(f"{source}: no images in this folder")
        return paths
    if os.path.exists(source):
        return [source]
    matches = sorted(glob.glob(source, recursive=True))
    if not matches:
        raise FileNotFoundError(f"{source}: no such file or folder, and no pattern that matches any")
    # `**` lists folders and also what is in them; folders by themselves stand for their images.
    return [path for match in matches for path in (_images_below(match) if os.path.isdir(match) else [match])]


def _images_below(folder: str) -> Iterator[str]:
    def unreadable(error: OSError):
        raise error

    for place, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield os.path.join(place, name)


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a UTF-8 text file that are not blank, without the white space around them.

    Raises:
        ValueError: there are none, or the file is not UTF-8.
        OSError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path}: no lines in this file")
    return lines
