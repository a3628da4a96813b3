"""What a run keeps of its data: its own files and no others are written, removed and trusted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from embedtrain import storage
from embedtrain.errors import CorruptCheckpointError, UserError
from embedtrain.train import kept_data
from embedtrain.train.run_folder import RunFolder


@dataclass(frozen=True)
class Facts:
    name: str


FACTS = {"name": "x"}


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    made = tmp_path / "entry"
    made.mkdir()
    (made / "rows.bin").write_bytes(bytes(range(100)))
    (made / "empty.bin").write_bytes(b"")
    (made / "seal.json").write_text("of the cache")
    return made


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


@pytest.fixture
def kept(folder: RunFolder, entry: Path) -> Path:
    """The folder of a run that keeps the entry."""
    folder.keep_data(FACTS, str(entry))
    return Path(folder.kept_data_path)


def read(folder: RunFolder) -> dict[str, bytes]:
    with folder.open_data(Facts) as found:
        assert found is not None and found.facts == Facts("x")
        return {path.name: path.read_bytes() for path in Path(found.path).glob("*.bin")}


def test_what_is_kept_is_opened_and_not_written_again(folder: RunFolder, kept: Path, entry: Path) -> None:
    assert {path.name for path in kept.iterdir()} == {"kept.json", "rows.bin", "empty.bin"}
    assert read(folder) == {"rows.bin": bytes(range(100)), "empty.bin": b""}
    times = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    folder.keep_data(FACTS, str(entry))
    assert {path.name: path.stat().st_mtime_ns for path in kept.iterdir()} == times


@pytest.mark.parametrize("facts", [{}, FACTS])
def test_only_its_own_files_are_removed(folder: RunFolder, kept: Path, facts: dict[str, str]) -> None:
    (kept / "mine.txt").write_text("mine")
    folder.keep_data(facts)
    assert {path.name for path in kept.iterdir()} == {"mine.txt"} | ({"kept.json"} if facts else set())
    assert (kept / "mine.txt").read_text() == "mine"


def test_a_folder_of_which_nothing_is_left_is_removed(folder: RunFolder, kept: Path) -> None:
    folder.keep_data({})
    assert not kept.exists()


@pytest.mark.parametrize("facts", [{}, FACTS])
def test_files_of_the_user_are_refused_and_not_touched(folder: RunFolder, entry: Path, facts: dict[str, str]) -> None:
    mine = Path(folder.kept_data_path)
    mine.mkdir(parents=True)
    (mine / "rows.bin").write_text("mine")
    for action in (folder.require_writable_names, lambda: folder.keep_data(facts, str(entry) if facts else None)):
        with pytest.raises(UserError, match=r"kept_data holds files that no run has written, such as rows\.bin"):
            action()
    assert (mine / "rows.bin").read_text() == "mine"


def test_a_file_of_the_user_beside_its_own_is_not_written_over(folder: RunFolder, kept: Path, entry: Path) -> None:
    (kept / "more.bin").write_text("mine")
    (entry / "more.bin").write_text("of the run")
    with pytest.raises(UserError, match=r"more\.bin is not a file of this run"):
        folder.keep_data(FACTS, str(entry))
    assert (kept / "more.bin").read_text() == "mine"


@pytest.mark.parametrize("name", ["rows.bin", "empty.bin"])
@pytest.mark.parametrize("content", [None, b"short", bytes(100)], ids=["missing", "size", "checksum"])
def test_damage_is_found_and_mended(folder: RunFolder, kept: Path, entry: Path, name: str, content: bytes) -> None:
    (kept / name).unlink()
    if content is not None:
        (kept / name).write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=f"kept_data/{name} (is missing|has|is damaged)"):
        read(folder)
    with pytest.raises(CorruptCheckpointError, match=name):
        folder.verify_data()
    folder.keep_data(FACTS, str(entry))
    assert folder.verify_data()
    assert read(folder) == {"rows.bin": bytes(range(100)), "empty.bin": b""}


def test_damage_on_another_file_system_is_found(entry: Path) -> None:
    folder = RunFolder("memory://kept-data/run")
    folder.keep_data(FACTS, str(entry))
    assert read(folder) == {"rows.bin": bytes(range(100)), "empty.bin": b""}
    storage.write(f"{folder.kept_data_path}/rows.bin", [bytes(100)])
    for check in (lambda: read(folder), folder.verify_data):
        with pytest.raises(CorruptCheckpointError, match=r"memory://kept-data/run/kept_data/rows\.bin is damaged"):
            check()
    folder.keep_data({})


def test_keeping_that_was_interrupted_is_told_and_done_again(
    folder: RunFolder, entry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(storage, "write", fail)
        with pytest.raises(OSError, match="killed"):
            folder.keep_data(FACTS, str(entry))
    with pytest.raises(CorruptCheckpointError, match="is missing"):
        read(folder)
    folder.require_writable_names()
    folder.keep_data(FACTS, str(entry))
    assert read(folder)["rows.bin"] == bytes(range(100))


FILE = {"bytes": 1, "xxh3": "0" * 32}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        "{}",
        "[" * 100_000,
        json.dumps({"facts": {}}),
        json.dumps({"files": {"../evil.txt": FILE}, "facts": FACTS}),
        json.dumps({"files": {"/evil.txt": FILE}, "facts": FACTS}),
        json.dumps({"files": ["rows.bin"], "facts": FACTS}),
        json.dumps({"files": {"rows.bin": {"bytes": -1, "xxh3": "x"}}, "facts": FACTS}),
        json.dumps({"files": {}, "facts": []}),
    ],
)
def test_a_table_of_contents_that_is_none_is_one_sentence(folder: RunFolder, kept: Path, content: str) -> None:
    evil = kept.parent / "evil.txt"
    evil.write_text("mine")
    (kept / "kept.json").write_text(content)
    for action in (
        lambda: read(folder),
        folder.verify_data,
        folder.require_writable_names,
        lambda: folder.keep_data({}),
    ):
        with pytest.raises(UserError, match=r"kept\.json is damaged \(.*\): remove .*kept_data, and give"):
            action()
    assert evil.read_text() == "mine"
    assert (kept / "rows.bin").exists()


@pytest.mark.parametrize("facts", [{"other": 1}, {"name": 1}])
def test_facts_that_are_not_declared_are_refused(folder: RunFolder, facts: dict[str, int]) -> None:
    folder.keep_data(facts)
    with pytest.raises(UserError, match=r"kept\.json is damaged \(name"):
        read(folder)


def test_more_than_a_run_may_keep_is_not_copied(
    folder: RunFolder, kept: Path, entry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_data, "MAX_KEPT_BYTES", 99)
    folder.keep_data(FACTS, str(entry))
    assert not kept.exists()
    folder.keep_data(FACTS, str(entry), leave_out=frozenset({"rows.bin"}))
    assert {path.name for path in kept.iterdir()} == {"kept.json", "empty.bin"}
