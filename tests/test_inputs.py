"""Which files a command is about: what users name, each image once, in an order that does not change."""

import os

import pytest

from madtp.inputs import find_images, read_lines


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = "b.jpg a.PNG notes.txt .hidden.jpg sub/c.webp sub/deep/d.tiff sub/e.md .cache/f.png empty/x.txt"
    for name in names.split():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def test_a_folder_is_searched_with_its_subfolders_in_the_order_of_names(folder):
    assert find_images(["."]) == ["./a.PNG", "./b.jpg", "./sub/c.webp", "./sub/deep/d.tiff"]
    assert find_images([folder / "sub"]) == [str(folder / "sub/c.webp"), str(folder / "sub/deep/d.tiff")]


@pytest.mark.parametrize(
    "pattern, found",
    [
        ("*.jpg", ["b.jpg"]),
        ("sub/**/*.t*", ["sub/deep/d.tiff"]),
        ("**/*.[wt]*", ["notes.txt", "sub/c.webp", "sub/deep/d.tiff", "empty/x.txt"]),
        ("s?b", ["sub/c.webp", "sub/deep/d.tiff"]),
    ],
)
def test_patterns(folder, pattern, found):
    assert sorted(find_images([pattern])) == sorted(found)


def test_files_are_taken_as_they_are_named(folder):
    assert find_images(["notes.txt", ".hidden.jpg", "b.jpg"]) == ["notes.txt", ".hidden.jpg", "b.jpg"]


def test_an_image_that_is_named_twice_is_taken_once(folder):
    assert find_images(["sub/c.webp", "sub", str(folder / "b.jpg"), "./b.jpg", "*.jpg"]) == [
        "sub/c.webp",
        "sub/deep/d.tiff",
        str(folder / "b.jpg"),
    ]


def test_a_file_whose_name_looks_like_a_pattern(folder):
    (folder / "b[1].jpg").touch()
    assert find_images(["b[1].jpg"]) == ["b[1].jpg"]


@pytest.mark.parametrize("source", ["absent.jpg", "absent/", "*.gif", ""])
def test_what_is_not_there(folder, source):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_images(["b.jpg", source])


def test_a_folder_without_images(folder):
    with pytest.raises(ValueError, match="empty: no images"):
        find_images(["empty"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read(folder):
    (folder / "sub").chmod(0)
    with pytest.raises(PermissionError):
        find_images(["."])
    (folder / "sub").chmod(0o700)


def test_lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffein Hund\r\n\n  a ball \n   \nlast".encode())
    assert read_lines(path) == ["ein Hund", "a ball", "last"]
    path.write_text("\n  \n")
    with pytest.raises(ValueError, match="no lines"):
        read_lines(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="lines.txt: not a UTF-8"):
        read_lines(path)
