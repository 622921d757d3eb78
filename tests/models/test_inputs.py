"""Which files a command is about: what users name, each image once, in an order that does not change."""

import os

import pytest

from madtp.inputs import find_images, read_texts


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


def test_a_folder_that_cannot_be_read(folder, monkeypatch):
    """One that is named ends the search; a subfolder is one of the paths, for whoever opens it to say why."""
    scan, read = os.scandir, os.listdir

    def refused(function):
        def call(path):
            if os.path.abspath(path) == str(folder / "sub"):
                raise PermissionError(13, "Permission denied", path)
            return function(path)

        return call

    monkeypatch.setattr(os, "scandir", refused(scan))
    monkeypatch.setattr(os, "listdir", refused(read))
    assert find_images(["."]) == ["./a.PNG", "./b.jpg", "./sub"]
    with pytest.raises(PermissionError):
        find_images(["sub"])


def test_folders_behind_links_are_searched_once_and_loops_end(folder, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    (disk / "z.png").touch()
    links = {"train": disk, "aka": "sub", "sub/up": "..", "sub/deep/self": ".", "sub/deep/other": "../.."}
    for name, target in links.items():
        os.symlink(target, folder / name)
    (disk / "back").symlink_to(folder)
    expected = ["./a.PNG", "./b.jpg", "./sub/c.webp", "./sub/deep/d.tiff", "./train/z.png"]
    assert find_images(["."]) == expected
    assert sorted(find_images(["**/*.[tpw]*"])) == ["empty/x.txt", "notes.txt", *(p[2:] for p in expected[2:])]
    below = ["c.webp", "deep/d.tiff", "up/a.PNG", "up/b.jpg", "up/train/z.png"]
    assert find_images(["aka"]) == [f"aka/{name}" for name in below]


def test_a_link_that_leads_nowhere_hides_no_other_picture(folder):
    """Of one that leads back to itself, or into a locked folder, the system does not say what it is."""
    for name, target in {"loop.jpg": "loop.jpg", "sub/loop": "loop", "gone.png": "nothing"}.items():
        os.symlink(target, folder / name)
    expected = ["a.PNG", "b.jpg", "gone.png", "loop.jpg", "sub/c.webp", "sub/deep/d.tiff"]
    assert find_images(["."]) == [f"./{name}" for name in expected]
    assert find_images(["**/*.*g"]) == ["b.jpg", "gone.png", "loop.jpg"]


def test_pictures_of_other_formats_are_named(folder, caplog):
    for name in ("a.HEIC", "sub/b.heic", "sub/c.svg"):
        (folder / name).touch()
    assert len(find_images(["."])) == 4
    assert "2 .heic, 1 .svg" in caplog.text


def test_lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffein Hund\r\n\n  a ball \n   \nlast".encode())
    assert read_texts(path) == ["ein Hund", "a ball", "last"]
    path.write_text("\n  \n")
    with pytest.raises(ValueError, match="no lines"):
        read_texts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="lines.txt: not a UTF-8"):
        read_texts(path)


def test_a_line_ends_at_a_line_feed_only(tmp_path):
    path = tmp_path / "lines.txt"
    lines = ["a\u2028b", "c\x85d", "e\x0cf", "g\x1ch", "i\rj"]
    path.write_bytes("\n".join(lines).encode())
    assert read_texts(path) == lines


@pytest.mark.parametrize(
    "name, content, texts",
    [
        ("a.json", b'["yes", "no"]', ["yes", "no"]),
        ("a.txt", b'\xef\xbb\xbf\n[\n "yes",\n "no"\n]\n', ["yes", "no"]),
        ("a.txt", b"[a dog]\n{a cat}\n", ["[a dog]", "{a cat}"]),
        ("a.txt", b"1\n2\n", ["1", "2"]),
    ],
)
def test_texts_come_in_lines_or_as_a_json_list(tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content)
    assert read_texts(tmp_path / name) == texts


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", b"yes\nno"),
        ("a.json", b"[]"),
        ("a.json", b'["yes", 2]'),
        ("a.txt", b'{"yes": 1}'),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"}'),
    ],
)
def test_json_of_another_form_is_not_taken_for_lines(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_texts(tmp_path / name)
