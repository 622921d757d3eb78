"""Which images and texts a run is about: files, folders, patterns of names, lines of a file."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence

from .files import read_text

__all__ = ["IMAGE_SUFFIXES", "find_images", "read_texts", "stream_images"]

_log = logging.getLogger("madtp")

IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
"""Names of files that a folder's images have; case does not matter."""
_OTHER_PICTURES = frozenset(
    ".arw .cr2 .cr3 .dng .exr .hdr .heic .heif .hif .ico .jxl .nef .orf .psd .raf .rw2 .svg .tga".split()
)


def find_images(sources: Sequence[str | os.PathLike]) -> list[str]:
    """Paths of images, each once: in the order of the sources, those of a folder sorted by name.

    Args:
        sources: files; folders, which are searched with all their subfolders for files with an image's
            suffix, hidden ones left out; or patterns with ``*``, ``?``, ``[...]`` and ``**`` for any depth.

    Symbolic links to folders are followed; each folder is searched once, under its own name where it has one there. A
    subfolder that cannot be read is among the paths, so that whoever opens it is told why. Pictures in formats that are
    not read (HEIC, SVG, ...) are left out, with a warning.

    Raises:
        FileNotFoundError: a source that is neither there nor matches anything.
        ValueError: no images in a folder.
        OSError: a folder among the sources that cannot be read.
    """
    found: dict[str, str] = {}
    for source in map(os.fspath, sources):
        for path in _files(source):
            found.setdefault(os.path.abspath(path), path)
    return list(found.values())


def _files(source: str) -> list[str]:
    paths = list(stream_images([source]))
    if not os.path.isdir(source):
        return paths
    if not paths:
        raise ValueError(f"{source}: no images in this folder")
    # Folders behind links, too, are where their name belongs.
    depth = len(os.path.join(source, ""))
    return sorted(paths, key=lambda path: _place(path[depth:].split(os.sep)))


def _place(parts: Sequence[str]) -> list[tuple[bool, str]]:
    """Sorts files before folders, each by name."""
    return [*((True, part) for part in parts[:-1]), (False, parts[-1])]


def stream_images(sources: Sequence[str | os.PathLike], seen: set[tuple[int, int]] | None = None) -> Iterator[str]:
    """The same paths one by one, for folders and patterns of any size, of which the names in one folder are in memory:
    files are in the same order, but those of folders behind links come after all others of their source, and what two
    sources have in common comes twice where a file is named before its folder.

    Args:
        seen: folders (device and inode) that are left out; those that are visited are added.

    Raises:
        FileNotFoundError, OSError: as above, when the source's turn comes; a folder may have no images.
    """
    seen = set() if seen is None else seen
    for source in map(os.fspath, sources):
        if os.path.isdir(source):
            os.scandir(source).close()  # one that is named has to be readable
            yield from _images_below(source, seen)
        elif os.path.lexists(source):
            yield source
        else:
            path = None
            for path in _matching(source, seen):
                yield path
            if path is None:
                raise FileNotFoundError(f"{source}: no such file or folder, and no pattern that matches any")


def _images_below(folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Files before subfolders, each sorted by name."""
    skipped: Counter[str] = Counter()
    for parts, names, readable in _walk(folder, seen):
        if not readable:
            yield os.path.join(folder, *parts)
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                yield os.path.join(folder, *parts, name)
            elif suffix in _OTHER_PICTURES:
                skipped[suffix] += 1
    if skipped:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items()))
        _log.warning("%s: left out pictures in formats that are not read: %s", folder, kinds)


def _matching(pattern: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Files that match a pattern, and the images below folders that do.

    `glob` would collect all of them, and follow links that lead back forty times over, in all combinations.
    """
    before, deep, after = f"/{pattern}/".partition("/**/")
    if not deep:
        for path in _listed(pattern):
            if os.path.isdir(path):
                yield from _images_below(path, seen)
            else:
                yield path
        return
    wanted = ("**", *filter(None, after.split("/")))
    for folder in sorted(glob.glob(os.path.join(before[1:], "") or ("/" if pattern.startswith("/") else "./"))):
        shown = folder if before else ""
        for parts, names, readable in _walk(folder, seen):
            inside = any(_fits(parts[:depth], wanted) for depth in range(len(parts) + 1))
            if inside and not readable:
                yield os.path.join(shown, *parts)
            for name in names:
                path = (*parts, name)
                if _fits(path, wanted) or (inside and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES):
                    yield os.path.join(shown, *path)


def _listed(pattern: str) -> Iterator[str]:
    """What a pattern without ``**`` stands for, sorted folder by folder."""
    folders, name = os.path.split(pattern)
    if not glob.has_magic(name):
        yield from sorted(glob.glob(pattern))
        return
    for folder in sorted(glob.glob(folders)) if folders else [""]:
        with contextlib.suppress(OSError):
            for found in sorted(fnmatch.filter(os.listdir(folder or "."), name)):
                if not found.startswith(".") or name.startswith("."):
                    yield os.path.join(folder, found)


def _fits(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_fits(path[skipped:], pattern[1:]) for skipped in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])


def _walk(folder: str, seen: set[tuple[int, int]]) -> Iterator[tuple[tuple[str, ...], list[str], bool]]:
    """Each folder from this one down once, in the order of names: its place below, names of its files, whether it can
    be read. Folders in ``seen`` are left out, and those that were visited are added.

    Links to folders are followed last: by then all that were there under their own names have been seen.
    """
    waiting, links = [()], []
    while waiting or links:
        parts = waiting.pop() if waiting else links.pop(0)
        place = os.path.join(folder, *parts)
        try:
            facts = os.stat(place)
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            names, below, behind = [], [], []
            for entry in os.scandir(place):
                if not entry.name.startswith("."):
                    kind = names if not _is_folder(entry) else behind if entry.is_symlink() else below
                    kind.append(entry.name)
        except OSError:
            yield parts, [], False
            continue
        waiting += ((*parts, name) for name in sorted(below, reverse=True))
        links += ((*parts, name) for name in sorted(behind))
        yield parts, sorted(names), True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Of a link that leads nowhere (to itself, or into a folder that is locked) it cannot be said: whoever opens it is told why."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def read_texts(path: str | os.PathLike) -> list[str]:
    """Texts of a UTF-8 file, a pipe or standard input ("-"): the lines that are not blank, without the white space around
    them, or a JSON list of strings. A line ends at a line feed, nowhere else.

    Raises:
        ValueError: there are none, JSON of another form, or the file is not UTF-8.
        OSError: the file cannot be read.
    """
    text, name = read_text(path), os.fspath(path).lower()
    try:
        value = json.loads(text) if text.lstrip()[:1] in ("[", "{") or name.endswith(".json") else None
    except (ValueError, RecursionError) as error:
        if name.endswith(".json"):
            raise ValueError(f"{path}: not JSON: {error}") from error
        value = None  # lines may begin with a bracket too
    if name.endswith(".jsonl") or value is not None:
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{path}: expected one text per line, or a JSON list of strings")
        return value
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path}: no lines in this file")
    return lines
