"""What is no regular file is named at once, outputs appear whole where a link points, texts do not depend on the locale."""

import ast
import os
import stat
import threading
from pathlib import Path

import pytest

import madtp
import madtp_kernels
from madtp import files
from madtp.pictures import ImageError, load_image
from madtp.resume import ResumeError, locked


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    return path


def fill(pipe, content):
    """Write to a named pipe, once, beside this thread."""
    writer = threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True)
    writer.start()
    return writer


def test_only_regular_files_are_opened(tmp_path, pipe):
    (tmp_path / "file").write_bytes(b"content")
    os.symlink("file", tmp_path / "link")
    with files.open_regular(tmp_path / "link") as file:
        assert file.read() == b"content"
    for path, kind in ((pipe, "a named pipe"), (tmp_path, "a folder"), ("/dev/zero", "a device")):
        with pytest.raises(OSError, match=kind):
            files.open_regular(path)
    with pytest.raises(FileNotFoundError):
        files.open_regular(tmp_path / "absent")


def test_a_pipe_or_a_folder_among_images_is_named(tmp_path, pipe):
    with pytest.raises(ImageError, match=r"pipe\.png: a named pipe"):
        load_image(pipe)
    with pytest.raises(ImageError, match="a folder"):
        load_image(tmp_path)


def test_a_pipe_may_be_read_once(pipe):
    writer = fill(pipe, b"\xef\xbb\xbfein H\xc3\xbcndchen")
    assert files.read_text(pipe) == "ein Hündchen"
    writer.join(10)
    for path in ("/dev/zero", "/dev", "absent"):
        with pytest.raises(OSError):
            files.read_bytes(path)
    assert files.read_bytes(os.devnull) == b""


def test_what_a_link_points_to_is_replaced(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "target").chmod(0o600)
    os.symlink("target", tmp_path / "link")
    with files.replacing(tmp_path / "link") as file:
        file.write(b"new")
        assert (tmp_path / "target").read_bytes() == b"old"
    assert os.readlink(tmp_path / "link") == "target"
    assert (tmp_path / "target").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_two_that_write_the_same_file_do_so_one_after_the_other(tmp_path):
    """As two processes do whose command is the same; what one of them left when it was killed is in nobody's way."""
    (tmp_path / "file.tmp").write_bytes(b"left over" * 99)
    begun, order = threading.Event(), []

    def second():
        begun.wait(10)
        with files.replacing(tmp_path / "file") as file:
            order.append((tmp_path / "file").read_bytes())
            file.write(b"second")

    thread = threading.Thread(target=second)
    thread.start()
    with files.replacing(tmp_path / "file") as file:
        file.write(b"first")
        begun.set()
        thread.join(0.2)
        file.write(b", whole")
    thread.join(10)
    assert order == [b"first, whole"] and (tmp_path / "file").read_bytes() == b"second"
    with pytest.raises(RuntimeError), files.replacing(tmp_path / "file"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"second"


def test_only_regular_files_are_replaced(tmp_path, pipe):
    os.symlink(os.devnull, tmp_path / "null")
    for path in (pipe, tmp_path, tmp_path / "null"):
        with pytest.raises(OSError, match="not a regular file"), files.replacing(path) as file:
            file.write(b"new")
        with pytest.raises(OSError, match="not a regular file"):
            files.check_output(path)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_outputs_that_cannot_be_written_are_found_out_beforehand(tmp_path):
    files.check_output(tmp_path / "new")
    for path, error in ((tmp_path / "absent" / "new", FileNotFoundError), ("-", ValueError), ("", ValueError)):
        with pytest.raises(error):
            files.check_output(path)
    os.symlink("absent/new", tmp_path / "dangling")
    with pytest.raises(FileNotFoundError, match="absent"):
        files.check_output(tmp_path / "dangling")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        files.check_output(tmp_path / "new")
    tmp_path.chmod(0o700)


def test_a_lock_keeps_others_out(tmp_path):
    with locked(tmp_path / "lock", "shard 3"):
        with pytest.raises(ResumeError, match="shard 3 is being written by another process"):
            locked(tmp_path / "lock", "shard 3").__enter__()
    with locked(tmp_path / "lock", "shard 3"):
        pass


def opens_text_without_encoding(call: ast.Call) -> bool:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
    if name not in ("open", "read_text", "write_text") or any(word.arg == "encoding" for word in call.keywords):
        return False
    if name != "open":
        return isinstance(function, ast.Attribute)
    if isinstance(function, ast.Attribute) and getattr(function.value, "id", None) in ("os", "Image", "Vectors"):
        return False
    modes = [word.value for word in call.keywords if word.arg == "mode"] + call.args[1:2]
    named = [part.value for mode in modes for part in ast.walk(mode) if isinstance(part, ast.Constant)]
    return not named or not all("b" in mode for mode in named if isinstance(mode, str))


@pytest.mark.parametrize("package", [madtp, madtp_kernels], ids=lambda package: package.__name__)
def test_no_text_depends_on_the_locale(package):
    """Every text file is opened with an encoding."""
    places = [
        f"{path.name}:{node.lineno}"
        for path in Path(package.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text_without_encoding(node)
    ]
    assert places == []
