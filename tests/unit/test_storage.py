"""What checkpoints need of a file system, on a disk and in memory."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from embedtrain import storage
from embedtrain.errors import UserError


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "a" / "b") if request.param == "local" else f"memory://{tmp_path.name}/b"


def test_files_and_folders_are_listed(root: str) -> None:
    assert storage.list_files(root) == {}
    assert storage.list_folders(root) == []
    storage.make_folder(storage.join(root, "folder"))
    storage.make_folder(storage.join(root, "folder"))
    storage.write(storage.join(root, "file"), [b"abc", b"", memoryview(b"de")])
    assert storage.list_files(root) == {"file": 5}
    assert storage.list_folders(root) == ["folder"]
    storage.remove(storage.join(root, "file"))
    storage.remove(storage.join(root, "file"))
    storage.remove_empty_folder(root)
    assert storage.list_folders(root) == ["folder"]
    storage.remove_empty_folder(storage.join(root, "folder"))
    assert storage.list_folders(root) == []


def test_ranges_are_read(root: str, tmp_path: Path) -> None:
    url = storage.join(root, "file")
    storage.make_folder(root)
    storage.write(url, [b"0123456789"])
    assert storage.read(url) == b"0123456789"
    reader = storage.RangeReader(url)
    for start, length, expected in ((0, 10, b"0123456789"), (3, 4, b"3456"), (8, 4, b"89"), (10, 1, b"")):
        data = bytearray(length)
        assert reader.read_into(start, memoryview(data)) == len(expected)
        assert data[: len(expected)] == expected
    reader.close()
    storage.download(url, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == b"0123456789"
    with pytest.raises(FileNotFoundError):
        storage.read(storage.join(root, "other"))


def create(root: str, data: bytes, temporary_name: str = "m.tmp") -> None:
    storage.create(storage.join(root, "m"), data, storage.join(root, temporary_name))


def test_one_of_many_creates_a_file(root: str) -> None:
    storage.make_folder(root)
    refused = []

    def try_to_create(number: int) -> None:
        try:
            create(root, b"%d" % number, f"{number}.tmp")
        except FileExistsError:
            refused.append(number)

    create(root, b"0")
    threads = [threading.Thread(target=try_to_create, args=(number,)) for number in range(1, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(refused) == list(range(1, 8))
    assert storage.read(storage.join(root, "m")) == b"0"
    assert storage.list_files(root) == {"m": 1}


def test_creating_again_what_is_there_is_a_success(root: str) -> None:
    storage.make_folder(root)
    create(root, b"same")
    create(root, b"same")
    with pytest.raises(FileExistsError):
        create(root, b"other")


@pytest.mark.parametrize("error_number", [errno.EPERM, errno.ENOTSUP])
def test_a_disk_without_hard_links(error_number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: str, target: str) -> None:
        raise OSError(error_number, os.strerror(error_number))

    monkeypatch.setattr(os, "link", no_links)
    create(str(tmp_path), b"first")
    with pytest.raises(FileExistsError):
        create(str(tmp_path), b"second")
    assert storage.list_files(str(tmp_path)) == {"m": 5}


def test_a_large_file_goes_to_the_disk_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    send = storage._send_to_disk

    def spy(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        send(descriptor)

    monkeypatch.setattr(storage, "_send_to_disk", spy)
    monkeypatch.setattr(storage, "_HELD_BYTES", 10_000)
    chunks = [bytes([number]) * 3000 for number in range(20)]
    storage.write(str(tmp_path / "file"), chunks)
    assert sizes == [12_000, 24_000, 36_000, 48_000, 60_000]
    assert storage.read(str(tmp_path / "file")) == b"".join(chunks)


def test_names_are_made_durable_before_and_after_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acts: list[str] = []
    fsync, link = os.fsync, os.link

    def spy_fsync(descriptor: int) -> None:
        acts.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).relative_to(tmp_path)}")
        fsync(descriptor)

    def spy_link(source: str, target: str) -> None:
        acts.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "link", spy_link)
    root = str(tmp_path / "x" / "y")
    storage.make_folder(root)
    assert sorted(acts) == ["sync .", "sync x"]
    acts.clear()
    create(root, b"data")
    assert acts == ["sync x/y/m.tmp", "sync x/y", "link", "sync x/y", "sync x"]


def test_a_listing_shows_what_another_process_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    invalidated = []

    def invalidate_cache(self: MemoryFileSystem, path: str | None = None) -> None:
        invalidated.append(path)

    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", invalidate_cache)
    storage.list_files("memory://some/folder")
    assert invalidated


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "nosuch://"])
def test_an_unknown_protocol_is_the_users_mistake(url: str) -> None:
    with pytest.raises(UserError, match="Protocol not known: nosuch"):
        storage.list_files(url)
