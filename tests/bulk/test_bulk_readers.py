"""Where rows of large runs come from: whatever is wrong with a part of a source is said, and nothing else is lost."""

import bz2
import gzip
import io
import json
import lzma
import os
import resource
import tarfile

import pytest

from madtp.bulk.readers import Source, expand_braces, read_tar
from madtp.inputs import find_images


def tar_of(path, members):
    """A tar of (name, content) pairs."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def rows_of(*sources, **options):
    return [row for shard in Source(sources, **options) for row in shard.rows()]


def content(row):
    return row.image.read() if hasattr(row.image, "read") else row.image


# ---- tars


def test_samples_of_a_tar(tmp_path):
    members = [
        ("./a/0.jpg", b"0"), ("./a/0.txt", b"zero"), ("./a/0.json", b'{"id": 7, "url": "u"}'),
        ("b/0.JPG", b"1"), ("b/._0.jpg", b"mac"), ("b/0.seg.png", b"mask"), ("b/0.txt", b"one"),
        ("v1.2/22.05.png", b"no image field"), ("README", b""), ("__meta__.json", b"{}"), ("c.webp", b"2"),
    ]  # fmt: skip
    rows = list(read_tar(str(tar_of(tmp_path / "x.tar", members))))
    assert [row.key for row in rows] == ["a/0", "b/0", "v1.2/22", "c"]
    assert [row.number for row in rows] == [0, 1, 2, 3]
    assert rows[0].fields == {"id": 7, "url": "u", "caption": "zero"} and content(rows[0]) == b"0"
    assert rows[1].fields == {"caption": "one"} and content(rows[1]) == b"1"
    assert rows[2].error == "no image (there is 05.png)"
    assert content(rows[3]) == b"2" and rows[3].error is None


def test_members_of_a_sample_need_not_be_neighbours(tmp_path):
    path = tar_of(tmp_path / "x.tar", [("0.jpg", b"0"), ("1.jpg", b"1"), ("0.txt", b"zero"), ("1.txt", b"one")])
    assert [(row.key, row.fields["caption"]) for row in read_tar(str(path))] == [("0", "zero"), ("1", "one")]


def test_a_key_that_is_there_twice_and_samples_that_are_not_clear(tmp_path):
    members = [
        ("0.jpg", b"0"), ("1.jpg", b"1"), ("0.jpg", b"other"), ("2.jpg", b"2"), ("2.png", b"2"), ("3.txt", b"3"),
        ("4.jpg", b"4"), ("4.json", b"{"), ("5.jpg", b"5"), ("5.txt", b"\xff"), ("6.jpg", b"6"),
    ]  # fmt: skip
    path = str(tar_of(tmp_path / "x.tar", members))
    rows = {row.key: row for row in read_tar(path)}
    assert [key for key, row in rows.items() if row.error is None] == ["1", "6"]
    assert "duplicate key: 0.jpg is there twice" in rows["0"].error
    assert "several images (jpg, png); --image-key" in rows["2"].error
    assert "no image" in rows["3"].error and "its json is none" in rows["4"].error and "utf-8" in rows["5"].error
    assert content({row.key: row for row in read_tar(path, "png")}["2"]) == b"2"


def test_members_that_are_no_plain_files(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("0.jpg", tarfile.LNKTYPE), ("1.jpg", tarfile.SYMTYPE), ("d", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "2.jpg"
            tar.addfile(info)
        info = tarfile.TarInfo("d/2.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"two"))
    first, second, third = read_tar(str(tmp_path / "x.tar"))
    assert first.error == second.error == "its jpg is a link or a sparse file; only plain ones are read"
    assert third.key == "d/2" and content(third) == b"two"


def damaged(whole, place):
    return whole[:place] + bytes(255 - byte for byte in whole[place : place + 100]) + whole[place + 100 :]


@pytest.mark.parametrize("number", [0, 2, 5])
def test_a_damaged_header_costs_its_member_only(tmp_path, number):
    path = tar_of(tmp_path / "x.tar", [(f"{n}.jpg", bytes([n + 1]) * 700) for n in range(6)])
    path.write_bytes(damaged(path.read_bytes(), number * 3 * 512))  # a header and two blocks each
    *good, broken = read_tar(str(path))
    assert [row.key for row in good] == [str(n) for n in range(6) if n != number]
    assert all(content(row) == bytes([int(row.key) + 1]) * 700 for row in good)
    assert broken.key == "x.tar" and f"damaged archive: bytes {number * 1536} to " in broken.error


def test_a_tar_that_ends_too_early(tmp_path):
    path = tar_of(tmp_path / "x.tar", [(f"{n}.jpg", bytes([n + 1]) * 700) for n in range(6)])
    path.write_bytes(path.read_bytes()[: 3 * 1536 + 512 + 300])
    rows = list(read_tar(str(path)))
    assert [row.key for row in rows] == ["0", "1", "2", "3", "x.tar"]
    assert [content(row)[0] for row in rows[:3]] == [1, 2, 3]
    with pytest.raises(ValueError, match="truncated: 300 of 700 bytes"):
        rows[3].image.read()
    assert "damaged archive" in rows[4].error


@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open])
@pytest.mark.parametrize("cut", [False, True])
def test_compressed_tars(tmp_path, opener, cut):
    plain = tar_of(tmp_path / "x.tar", [(f"{n}.jpg", os.urandom(3000)) for n in range(6)])
    with opener(tmp_path / "y.tar.gz", "wb") as file:
        file.write(plain.read_bytes())
    path = tmp_path / "y.tar.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if cut else path.read_bytes())
    expected = [(row.key, content(row)) for row in read_tar(str(plain))]
    rows = list(read_tar(str(path)))
    if cut:
        assert rows[-1].key == "y.tar.gz" and "damaged archive" in rows[-1].error
    else:
        assert [(row.key, content(row)) for row in rows] == expected


@pytest.mark.parametrize("start", [b"", b"<html>" + b"x" * 5000, bytes(10240)])
def test_what_is_no_archive_is_an_error_of_its_shard(tmp_path, start):
    (tmp_path / "x.tar").write_bytes(start)
    good = tar_of(tmp_path / "y.tar", [("0.jpg", b"0")])
    rows = rows_of(tmp_path / "x.tar", good)
    assert [row.error is None for row in rows] == [False, True]


# ---- tables


def test_json_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"image": "a.jpg", "id": 1}\n\n{"image": \n{"image": ""}\n{"id": 2}\n{"image": "s3://b/c.jpg"}\n'
        b'{"image": 7}\n'
    )
    rows = rows_of(path)
    assert rows[0].image == str(tmp_path / "a.jpg") == rows[0].key and rows[0].fields == {"id": 1}
    reasons = [
        "not JSON",
        "no image: the field is empty",
        "no image in this row (it has id)",
        "not fetched",
        "must be a path",
    ]
    for row, reason in zip(rows[1:], reasons, strict=True):
        assert reason in row.error
    assert rows[1].key == "rows.jsonl:3"


@pytest.mark.parametrize("suffix, comma", [("csv", ","), ("tsv", "\t")])
def test_tables_of_text(tmp_path, suffix, comma):
    lines = [
        "\ufeffimage,caption", 'a.jpg,"two\r\nlines, one field"', 'b.jpg,"stray', 'c.jpg,in the "middle"', "d.jpg", "",
        'e.jpg,"said ""so"""',
    ]  # fmt: skip
    path = tmp_path / f"rows.{suffix}"
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(
            "\r\n".join(
                line.replace(",", comma) if n != 1 else line.replace(',"', comma + '"') for n, line in enumerate(lines)
            )
        )
    rows = rows_of(path)
    assert [row.image and os.path.basename(row.image) for row in rows] == ["a.jpg", None, "c.jpg", None, "e.jpg"]
    captions = [row.fields.get("caption") for row in rows]
    assert captions[0] == "two\r\nlines, one field" and captions[2] == 'in the "middle"' and captions[4] == 'said "so"'
    assert rows[1].key == f"rows.{suffix}:4" and "not a row of this table" in rows[1].error
    assert rows[3].key == f"rows.{suffix}:6" and "1 fields, 2 are expected" in rows[3].error


def test_names_that_are_there_twice(tmp_path):
    """Which image is meant, nobody can tell: the first was left out without a word."""
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"image": "a.jpg", "image": "b.jpg"}\n{"image": "c.jpg", "more": [{"id": 1, "id": 1}]}\n{"image": "d.jpg"}\n'
    )
    rows = rows_of(path)
    assert [row.error for row in rows] == [
        f"not JSON: the name {name!r} is there twice" for name in ("image", "id")
    ] + [None]
    tar = tar_of(tmp_path / "x.tar", [("0.jpg", b"0"), ("0.json", b'{"id": 1, "id": 2}')])
    assert rows_of(tar)[0].error == "its json is none: the name 'id' is there twice"
    for suffix, comma in (("csv", ","), ("tsv", "\t")):
        path = tmp_path / f"rows.{suffix}"
        path.write_text("image,id,image\na.jpg,1,b.jpg\n".replace(",", comma))
        with pytest.raises(ValueError, match=f"rows.{suffix}: two of its columns are called 'image'"):
            rows_of(path)
        path.write_text("image,,\na.jpg,,\n".replace(",", comma))  # as spreadsheets leave them
        assert rows_of(path)[0].image == str(tmp_path / "a.jpg")


def test_parquet_columns_of_one_name(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table([["a.jpg"], ["b.jpg"]], names=["image", "image"]), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="rows.parquet: two of its columns are called 'image'"):
        Source([tmp_path / "rows.parquet"])


def test_shards_of_lists(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"image": f"{n}.jpg"}) + "\n" for n in range(25)))
    shards = list(Source([path], shard_size=10))
    assert [len(list(shard.rows())) for shard in shards] == [10, 10, 5]
    assert [shard.number for shard in shards] == [0, 1, 2] and len({shard.digest for shard in shards}) == 3
    again = list(Source([path], shard_size=10))
    assert [shard.digest for shard in shards] == [shard.digest for shard in again]
    path.write_text(path.read_text().replace("12.jpg", "x.jpg"))
    changed = [a.digest != b.digest for a, b in zip(shards, Source([path], shard_size=10), strict=True)]
    assert changed == [False, True, False]


@pytest.mark.parametrize("kind", ["path", "bytes", "struct", "dictionary"])
def test_parquet(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    paths = ["a.jpg", "b c.jpg", None, "é.jpg"]
    values = {
        "path": paths,
        "bytes": [path and path.encode() for path in paths],
        "struct": [path and {"bytes": path.encode(), "path": path} for path in paths],
        "dictionary": pa.array(paths).dictionary_encode(),
    }[kind]
    table = pa.table({"image": values, "caption": ["1", "2", "3", None], "thumb": [b"x"] * 4, "scores": [[1.5]] * 4})
    pq.write_table(table, tmp_path / "rows.data", row_group_size=2)  # found out by its first bytes
    shards = list(Source([tmp_path / "rows.data"], shard_size=3))
    rows = [row for shard in shards for row in shard.rows()]
    assert len(shards) == 2 and Source([tmp_path / "rows.data"], shard_size=3).total == 2
    expected = [path and (path.encode() if kind in ("bytes", "struct") else str(tmp_path / path)) for path in paths]
    assert [row.image for row in rows] == expected
    assert rows[0].fields == {"caption": "1", "scores": [1.5]} and "empty" in rows[2].error
    with pytest.raises(ValueError, match="column 'scores': expected paths, bytes or a struct"):
        Source([tmp_path / "rows.data"], image_key="scores")
    with pytest.raises(ValueError, match="no column 'picture', only image, caption"):
        Source([tmp_path / "rows.data"], image_key="picture")
    whole = (tmp_path / "rows.data").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    (row,) = rows_of(tmp_path / "cut.parquet")
    assert "without its end" in row.error
    pq.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    assert Source([tmp_path / "empty.parquet"]).total == 0


# ---- files


def test_folders_are_listed_as_a_stream(tmp_path):
    for name in "a/1.jpg a/1.txt b/1.jpg c/2.JPG c/d/x.png c/d/x.jpg c/a.png z ü.webp .h/1.png y+w.gif".replace(
        "+", "\N{NO-BREAK SPACE}"
    ).split(" "):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    rows = rows_of(tmp_path, shard_size=2)
    assert [row.image for row in rows] == find_images([tmp_path]) and len(rows) == 8
    assert all(row.key == row.image for row in rows)


@pytest.mark.parametrize("pattern", ["*/*.jpg", "**/*.jpg", "*", "[0-9]/**"])
def test_patterns_are_listed_as_a_stream(tmp_path, pattern, monkeypatch):
    for folder in range(5):
        (tmp_path / str(folder)).mkdir()
        for n in range(4):
            (tmp_path / f"{folder}/{n}.jpg").touch()
    (tmp_path / "2/gone.jpg").symlink_to("nothing")
    tar_of(tmp_path / "5.tar", [("0.jpg", b"0")])
    listed, scan, read = [], os.scandir, os.listdir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(os.path.basename(path)) or scan(path))
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(os.path.basename(path)) or read(path))
    shards = iter(Source([tmp_path / pattern], shard_size=3))
    first = next(shards)
    assert "4" not in listed  # what comes late is not looked at early
    rows = [row.image for shard in (first, *shards) for row in shard.rows()]
    expected = [str(tmp_path / f"{folder}/{n}.jpg") for folder in range(5) for n in range(4)]
    expected.insert(12, str(tmp_path / "2/gone.jpg"))
    names = [row for row in rows if isinstance(row, str)]
    assert names == expected == [name for name in find_images([tmp_path / pattern]) if name.endswith("jpg")]
    assert len(rows) == 21 + (pattern == "*")  # the tar's
    source = Source([tmp_path / "*.tar"])
    assert source.total == 1 and Source([tmp_path / pattern]).total is None


def test_more_files_than_may_be_open(tmp_path):
    for n in range(300):
        (tmp_path / f"{n}.jpg").touch()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(128, limits[0]), limits[1]))
    try:
        assert len(rows_of(tmp_path)) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_kinds_may_be_mixed_and_braces_stand_for_names(tmp_path):
    for n in (8, 9, 10):
        tar_of(tmp_path / f"{n:03d}.tar", [(f"{n}.jpg", b"x")])
    (tmp_path / "p.jpg").touch()
    assert [row.key for row in rows_of(tmp_path / "{008..010}.tar", tmp_path / "p.jpg")] == [
        "8",
        "9",
        "10",
        str(tmp_path / "p.jpg"),
    ]
    assert Source([tmp_path / "{008..010}.tar"]).total == 3
    assert expand_braces("a{1..3}") == ["a1", "a2", "a3"] and expand_braces("{x,y}{0..1}") == ["x0", "x1", "y0", "y1"]
    assert expand_braces("{3..1}") == ["3", "2", "1"] and expand_braces("{}") == ["{}"]
    with pytest.raises(FileNotFoundError):
        Source([tmp_path / "{008..011}.tar"])


def test_texts(tmp_path):
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbfa dog\n\n a cat \n\xff\n")
    rows = rows_of(tmp_path / "texts.txt", images=False)
    assert [row.fields.get("text") for row in rows] == ["a dog", "a cat", None] and rows[2].error == "not UTF-8"
