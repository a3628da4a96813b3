from __future__ import annotations

import bz2
import gzip
import io
import itertools
import logging
import lzma
import os
import uuid
import zipfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st

from embedtrain.data.readers.blocks import read_chunks
from embedtrain.data.sources import Source, expand_sources, suffix_of, take_sources
from embedtrain.errors import UserError


def content_of(source: Source, chunk_bytes: int = 16) -> bytes:
    return b"".join(read_chunks(source, 0, source.size_bytes, chunk_bytes=chunk_bytes))


def names(sources: list[Source]) -> list[str]:
    return [os.path.basename(source.url) for source in sources]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "notes.md", "deep/c.txt", "deep/er/d.txt.gz", "deep/e.zst", "f.txt.bz2"):
        (tmp_path / name).write_bytes(b"text\n")
    return tmp_path


def test_a_file_several_and_globs(folder: Path) -> None:
    assert expand_sources(str(folder / "a.txt"))[0].url == str(folder / "a.txt")
    assert names(expand_sources(str(folder / "*.txt"))) == ["a.txt", "b.txt"]
    assert names(expand_sources(str(folder / "**" / "*.txt.gz"))) == ["d.txt.gz"]
    assert names(expand_sources([str(folder / "notes.md"), str(folder / "*.txt")])) == [
        "notes.md",
        "a.txt",
        "b.txt",
    ]
    assert names(expand_sources([str(folder / "b.txt"), str(folder / "*.txt")])) == ["b.txt", "a.txt"]


def test_a_folder_means_the_texts_in_it(folder: Path) -> None:
    assert names(expand_sources(str(folder))) == ["a.txt", "b.txt", "c.txt", "e.zst", "d.txt.gz", "f.txt.bz2"]


def test_a_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert expand_sources("deep")[0].url == str(folder / "deep" / "c.txt")


def test_another_file_system() -> None:
    root = f"memory://{uuid.uuid4().hex}"
    for name in ("x.txt", "sub/y.txt.gz"):
        with fsspec.open(f"{root}/{name}", "wb", compression="infer") as file:
            file.write(b"one\ntwo\n")
    assert names(expand_sources(f"{root}/*.txt")) == ["x.txt"]
    sources = expand_sources(root)
    assert [source.url for source in sources] == [
        f"memory:///{root.removeprefix('memory://')}/{name}" for name in ("sub/y.txt.gz", "x.txt")
    ]
    assert [content_of(source) for source in sources] == [b"one\ntwo\n"] * 2


def test_identity_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = expand_sources(str(path))[0].identity
    assert expand_sources(str(path))[0].identity == first
    os.utime(path, (1, 1))
    assert expand_sources(str(path))[0].identity != first


def test_identity_is_a_hash_where_the_file_system_tells_only_a_size() -> None:
    url = f"memory://{uuid.uuid4().hex}/a.txt"
    fs = fsspec.filesystem("memory")
    identities = []
    for content in (b"one", b"two", b"one"):
        fs.pipe(url, content)
        identities.append(expand_sources(url)[0].identity)
    assert identities[0] == identities[2] != identities[1]


COMPRESS = {
    ".gz": gzip.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_of_several_members(tmp_path: Path, suffix: str) -> None:
    path, compress = tmp_path / f"a.txt{suffix}", COMPRESS[suffix]
    path.write_bytes(compress(b"one\ntwo") + compress(b"") + compress(b" more\nthree"))
    assert content_of(expand_sources(str(path))[0]) == b"one\ntwo more\nthree"


def test_zeros_after_a_gzip_are_padding(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one\ntwo") + bytes(512))
    assert content_of(expand_sources(str(path))[0]) == b"one\ntwo"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_follows_a_member_and_is_none_is_refused(tmp_path: Path, suffix: str) -> None:
    path, compress = tmp_path / f"a.txt{suffix}", COMPRESS[suffix]
    member = compress(b"one\ntwo\n")
    for after in (b"garbage", b"g", bytes([member[0] ^ 1]) + member[1:], bytes(4) + b"garbage"):
        path.write_bytes(member + after)
        with pytest.raises(UserError, match=f"^{path} is not a valid "):
            content_of(expand_sources(str(path))[0])


def test_zeros_after_a_member_of_xz_are_padding_in_fours(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.xz"
    one, two = lzma.compress(b"one\n"), lzma.compress(b"two\n")
    for num_zeros in (4, 1 << 16, (1 << 17) + 8):
        path.write_bytes(one + bytes(num_zeros) + two + bytes(num_zeros))
        assert content_of(expand_sources(str(path))[0]) == b"one\ntwo\n"
    for damaged in (one + bytes(3), one + bytes(5) + two):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"^{path} is not a valid xz file: . zeros after a member"):
            content_of(expand_sources(str(path))[0])


@pytest.mark.parametrize("suffix", COMPRESS)
def test_many_members_and_blocks(tmp_path: Path, suffix: str) -> None:
    path, compress = tmp_path / f"a.txt{suffix}", COMPRESS[suffix]
    text = b"".join(b"%d\n" % number for number in range(100_000))
    cuts = [0, 1, 70_000, 70_000, 300_000, len(text)]
    path.write_bytes(b"".join(compress(text[start:stop]) for start, stop in itertools.pairwise(cuts)))
    assert content_of(expand_sources(str(path))[0], 1 << 20) == text


TEXT = st.lists(st.sampled_from([b"a", b"bc ", b"\n", "é".encode(), b"\t", b"long-word"]), max_size=40)


@given(TEXT.map(b"".join), st.integers(1, 20), st.lists(st.integers(0, 200), max_size=4))
def test_byte_ranges_share_out_the_lines(content: bytes, chunk_bytes: int, cuts: list[int]) -> None:
    url = f"memory://{uuid.uuid4().hex}/a.txt"
    fsspec.filesystem("memory").pipe(url, content)
    source = expand_sources(url)[0]
    borders = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    parts = []
    for start, stop in itertools.pairwise(borders):
        chunks = list(read_chunks(source, start, stop, chunk_bytes=chunk_bytes))
        assert all(chunk[-1:] in b"\n \t" for chunk in chunks[:-1])
        parts.append(b"".join(chunks))
        assert parts[-1] == lines_beginning_in(content, start, stop)
    assert b"".join(parts) == content


def lines_beginning_in(content: bytes, start: int, stop: int) -> bytes:
    lines, begin = [], 0
    for line in io.BytesIO(content):
        if start <= begin < stop:
            lines.append(line)
        begin += len(line)
    return b"".join(lines)


def test_progress_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\nthree\n")
    source = expand_sources(str(path))[0]
    read: list[int] = []
    chunks = read_chunks(source, 0, source.size_bytes, chunk_bytes=8, on_read=read.append)
    assert b"".join(chunks) == b"one\ntwo\nthree\n"
    assert sum(read) == source.size_bytes


def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt.gz"):
        (tmp_path / name).touch()
        assert content_of(expand_sources(str(tmp_path / name))[0]) == b""


def test_a_missing_path_says_what_was_meant(folder: Path) -> None:
    with pytest.raises(UserError) as error:
        expand_sources(str(folder / "aa.txt"))
    message = f"{folder}/aa.txt: no such file or folder; did you mean {folder}/a.txt or {folder}/b.txt"
    assert str(error.value).startswith(message)
    with pytest.raises(UserError) as error:
        expand_sources(str(folder / "deeep" / "c.txt"))
    assert str(error.value).endswith(f"did you mean {folder}/deep?")
    with pytest.raises(UserError) as error:
        expand_sources(str(folder / "deep" / "xyz"))
    assert str(error.value) == (f"{folder}/deep/xyz: no such file or folder; {folder}/deep holds c.txt, e.zst, er")
    with pytest.raises(UserError, match="no such file or folder"):
        expand_sources(f"memory://{uuid.uuid4().hex}/nothing/here.txt")
    with pytest.raises(UserError, match=r"a.txt/b: no such file or folder; .*did you mean .*a.txt"):
        expand_sources(str(folder / "a.txt" / "b"))


def test_a_glob_without_a_match_says_what_is_there(folder: Path) -> None:
    with pytest.raises(UserError) as error:
        expand_sources(str(folder / "deep" / "*.csv"))
    assert str(error.value) == f"{folder}/deep/*.csv: no file matches; {folder}/deep holds c.txt, e.zst, er"


def test_a_folder_without_texts_says_what_is_there(tmp_path: Path) -> None:
    expected = f"{tmp_path}: no file (*.txt, names without a suffix) in this folder or below it; {tmp_path}"
    with pytest.raises(UserError) as error:
        expand_sources(str(tmp_path))
    assert str(error.value) == f"{expected} is empty"
    for number in range(10):
        (tmp_path / f"{number}.csv").touch()
    with pytest.raises(UserError) as error:
        expand_sources(str(tmp_path))
    assert str(error.value) == (f"{expected} holds 0.csv, 1.csv, 2.csv, 3.csv, 4.csv, 5.csv, 6.csv, 7.csv and 2 more")


def test_no_path_and_an_unknown_protocol() -> None:
    with pytest.raises(UserError, match="no path was given"):
        expand_sources([])
    with pytest.raises(UserError, match=r"nosuch://a\.txt: Protocol not known: nosuch"):
        expand_sources("nosuch://a.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"some text\n" * 5 + b"ab\0cd", "6: a binary file, not text: NUL at byte 52"),
        (b"some text\n" * 5 + b"ab\xffcd", "6: not UTF-8 text: 0xff at byte 52"),
    ],
)
def test_a_binary_file_is_refused_with_the_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        content_of(expand_sources(str(path))[0])
    assert str(error.value) == f"{path}:{message}"
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(content))
    with pytest.raises(UserError) as error:
        content_of(expand_sources(str(packed))[0])
    assert str(error.value) == f"{packed}:{message} of the decompressed text"


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2", "xz"])
def test_an_archive_goes_by_its_content_not_by_its_name(tmp_path: Path, suffix: str) -> None:
    plain = tmp_path / f"a.txt.{suffix}"
    plain.write_bytes(b"this was never compressed\n" * 10)
    assert content_of(expand_sources(str(plain))[0]) == plain.read_bytes()
    packed = tmp_path / f"{suffix}.txt"
    packed.write_bytes(COMPRESS[f".{suffix}"](b"one\ntwo\n"))
    assert content_of(expand_sources(str(packed))[0]) == b"one\ntwo\n"


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2", "xz"])
def test_a_truncated_or_damaged_archive_is_named(tmp_path: Path, suffix: str) -> None:
    codec = {"gz": "gzip", "zst": "zstd", "bz2": "bz2", "xz": "xz"}[suffix]
    path = tmp_path / f"a.txt.{suffix}"
    whole = COMPRESS[f".{suffix}"]("\n".join(map(str, range(1000))).encode())
    damage = [whole[:-3], whole[: len(whole) // 2], whole[:200] + bytes(20) + whole[220:]]
    # A zstd frame has a checksum of its content only if its writer asks for one.
    for damaged in damage[:2] if suffix == "zst" else damage:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"^{path} is not a valid {codec} file: "):
            content_of(expand_sources(str(path))[0])


def test_permission_denied_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    source = expand_sources(str(path))[0]

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(LocalFileSystem, "_open", refuse)  # A file mode does not stop root.
    with pytest.raises(UserError, match=f"{path}: permission denied: .*Permission denied"):
        content_of(source)
    monkeypatch.setattr(LocalFileSystem, "info", refuse)
    with pytest.raises(UserError, match=f"{path}: permission denied"):
        expand_sources(str(path))


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    source = expand_sources(str(path))[0]
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: the file has vanished since it was listed"):
        content_of(source)


def test_a_failing_disk_is_not_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one"))
    source = expand_sources(str(path))[0]

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(LocalFileSystem, "_open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        content_of(source)


@pytest.mark.parametrize("path", ["", "*.txt"])
def test_links_to_pipes_and_devices_are_left_out_and_named(
    folder: Path, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "pipe.txt")
    (folder / "linked.txt").symlink_to(folder / "pipe")
    (folder / "zeros.txt").symlink_to("/dev/zero")
    with caplog.at_level(logging.INFO):
        sources = take_sources(os.path.join(folder, path))
    assert names(sources)[:2] == ["a.txt", "b.txt"]
    assert "left out devices, pipes and sockets: " in caplog.text
    assert f"{folder}/linked.txt" in caplog.text
    for name in ("linked.txt", "zeros.txt"):
        with pytest.raises(UserError, match=f"{name} is a device, a pipe or a socket"):
            expand_sources(str(folder / name))


def test_links_in_a_circle_are_refused(folder: Path) -> None:
    (folder / "x.txt").symlink_to("y.txt")
    (folder / "y.txt").symlink_to("x.txt")
    for path in (folder, folder / "*.txt", folder / "x.txt"):
        with pytest.raises(UserError, match=r"/x\.txt: a symbolic link to y\.txt, which leads back to the link"):
            expand_sources(str(path))
    with pytest.raises(UserError, match=r"x\.txt/below\.txt: .*Too many levels of symbolic links"):
        expand_sources(str(folder / "x.txt" / "below.txt"))
    for name in ("x.txt", "y.txt"):
        (folder / name).rename(folder / f"_{name}")
    assert names(expand_sources(str(folder / "*.txt"))) == ["a.txt", "b.txt"]  # Hidden ones disturb nobody.


def test_a_url_that_no_file_system_can_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain.csv").write_text("user,item\n")
    with zipfile.ZipFile("x.zip", "w") as archive:
        archive.writestr("a.csv", "user,item\n" * 1000)
    for url in (
        "zip://a.csv::nosuch.zip",
        "zip://a.csv::plain.csv",
        "zip://b.csv::x.zip",
        "tar://a.csv::x.zip",
        "gzip://a.csv::x.zip",
        "blockcache::zip://a.csv::x.zip",
        "data:text/csv,user",
        f"{tmp_path}/{'n' * 300}",
        f"{tmp_path}/a\0b",
    ):
        with pytest.raises(UserError) as error:
            expand_sources(url)
        assert str(error.value).startswith(f"{url}: ")
        assert "\n" not in str(error.value)


def test_a_damaged_member_of_an_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.csv", "user,item\n" * 1000)
    path.write_bytes(path.read_bytes().replace(b"PK\x03\x04", b"PK\x03\x05", 1))
    with pytest.raises(UserError, match=r"^zip://a\.csv::.*x\.zip: "):
        expand_sources(f"zip://a.csv::{path}")


def test_a_local_name_with_colons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a::b.csv").write_text("text\n")
    Path("c::d").mkdir()
    Path("c::d", "e.csv").write_text("below\n")
    for path in ("a::b.csv", "a::*.csv", str(tmp_path / "a::b.csv"), "a*.csv"):
        (source,) = expand_sources(path)
        assert source.url == str(tmp_path / "a::b.csv")
        assert content_of(source) == b"text\n"
    assert [content_of(source) for source in expand_sources(str(tmp_path), (".csv",))] == [b"text\n", b"below\n"]
    assert names(expand_sources("c::d", (".csv",))) == ["e.csv"]
    assert [suffix_of(name) for name in ("/x/a::b.csv", "zip://a.csv::b.zip", "simplecache::s3://x/a.csv")] == [
        ".csv"
    ] * 3


@pytest.mark.parametrize("path", ["", "*.csv"])
def test_empty_parts_are_left_out_and_named(tmp_path: Path, path: str, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("part-0.csv", "part-1.csv"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"^{tmp_path}/?.*: no file with any content; left out {tmp_path}/part-0.csv"):
        expand_sources(os.path.join(tmp_path, path), (".csv",))
    (tmp_path / "part-1.csv").write_text("user,item\n")
    with caplog.at_level(logging.INFO):
        assert names(take_sources(os.path.join(tmp_path, path), (".csv",))) == ["part-1.csv"]
    assert f"left out empty files: {tmp_path}/part-0.csv" in caplog.text
    assert names(expand_sources(str(tmp_path / "part-0.csv"))) == ["part-0.csv"]
