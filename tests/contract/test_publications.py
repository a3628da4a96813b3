"""What every place that a run is published to must do, from the side of those who read there."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embedtrain import cli
from embedtrain.errors import UserError
from embedtrain.serve import published
from embedtrain.serve.changes import row_digests
from embedtrain.serve.publication import TableCounts, open_sink, publish, require_reachable
from embedtrain.serve.published import Folder, Gone, Mirror, RedisRows
from tests.stores import Consumer, save, some_rows

KINDS = ("folder", pytest.param("memory", marks=pytest.mark.slow), "redis")


@pytest.mark.parametrize("kind", KINDS)
def test_what_changed_is_published_by_name(kind: str, place: Callable[[str], str], tmp_path: Path) -> None:
    run, url = tmp_path / "run", place(kind)
    rows, ids = some_rows(), np.arange(12, dtype=np.float32).reshape(4, 3)
    save(run, 1, {"shop": rows}, ids=ids, dense={"a": [1.0, 2.0]})
    done = publish(str(run), url)
    assert (done.number, done.is_new, done.tables["shop"]) == (1, True, TableCounts(30, 0, 0))
    consumer = Consumer(url)
    consumer.require("shop", rows, "nobody")
    assert not publish(str(run), url).is_new

    # Another checkpoint with the same rows is no change.
    save(run, 2, {"shop": rows}, ids=ids, dense={"a": [1.0, 2.0]})
    assert not publish(str(run), url).is_new

    # The rows have moved, one is gone, one is new, one has other values; the same bits with another sign are a change.
    del rows["w3"]
    rows = {"new": [1.0, 0.0, 3.0, 4.0], **dict(reversed(rows.items())), "w9": [0.0, 0.5, -0.0, 1.0]}
    ids[2, 1] = 100
    save(run, 3, {"shop": rows}, ids=ids, dense={"a": [1.0, 3.0]})
    done = publish(str(run), url)
    assert done.tables == {"shop": TableCounts(1, 1, 1), "place": TableCounts(0, 1, 0)}
    consumer.require("shop", rows, "w3")
    consumer.require("place", {str(row): values for row, values in enumerate(ids.tolist())}, "4")
    assert consumer.dense() == {"a": [1.0, 3.0]}
    rows["w9"][2] = 0.0
    save(run, 4, {"shop": rows}, ids=ids, dense={"a": [1.0, 3.0]})
    assert publish(str(run), url).tables["shop"] == TableCounts(0, 1, 0)
    Consumer(url).require("shop", rows, "w3")


@pytest.mark.parametrize("kind", KINDS)
def test_tables_come_go_and_change_their_width(kind: str, place: Callable[[str], str], tmp_path: Path) -> None:
    run, url = tmp_path / "run", place(kind)
    users, items = some_rows(10, seed=1), some_rows(20, seed=2)
    save(run, 1, {"user": users, "item/a:b": items})
    publish(str(run), url)
    consumer = Consumer(url)
    consumer.require("item/a:b", items)
    wider = some_rows(20, dim=6)
    save(run, 2, {"item/a:b": wider})
    publish(str(run), url)
    consumer.require("item/a:b", wider)
    with pytest.raises(ValueError, match="no table 'user'"):
        consumer.rows("user", ["w1"])
    # A table that comes back does not find rows of its own that nobody took away.
    save(run, 3, {"user": {"w1": [1.0, 1.0]}, "item/a:b": wider})
    publish(str(run), url)
    consumer.require("user", {"w1": [1.0, 1.0]}, "w2")


@pytest.mark.parametrize("kind", KINDS)
def test_the_tables_that_were_chosen_stay_chosen(kind: str, place: Callable[[str], str], tmp_path: Path) -> None:
    run, url = tmp_path / "run", place(kind)
    save(run, 1, {"user": some_rows(5), "item": some_rows(6)})
    assert list(publish(str(run), url, tables=["item"]).tables) == ["item"]
    save(run, 2, {"user": some_rows(5, seed=3), "item": some_rows(6, seed=3)})
    assert list(publish(str(run), url).tables) == ["item"]
    with pytest.raises(ValueError, match="no table 'user'"):
        Consumer(url).rows("user", ["w1"])


@pytest.mark.parametrize("kind", ["folder", "redis"])
def test_what_a_consumer_has_is_known_after_many_small_changes(
    kind: str, place: Callable[[str], str], tmp_path: Path
) -> None:
    run, url = tmp_path / "run", place(kind)
    rows = some_rows(40)
    notes = []
    for step in range(1, 9):
        for row in range(step, step + 3):
            rows[f"w{row}"] = [float(step)] * 4
        save(run, step, {"shop": rows})
        done = publish(str(run), url)
        assert done.tables["shop"] == (TableCounts(40, 0, 0) if step == 1 else TableCounts(0, 3, 0))
        sink = open_sink(url)
        newest = sink.newest()
        sink.close()
        assert newest is not None
        notes.append(newest["cursor"]["shop"]["num_noted"])
    # Hashes of changed rows are noted, until half of all rows would be.
    assert notes == [0, 3, 6, 9, 0, 3, 6, 9]
    Consumer(url).require("shop", rows)


def test_two_consumers_get_what_each_of_them_lacks(place: Callable[[str], str], tmp_path: Path) -> None:
    run, often, seldom = tmp_path / "run", place("folder"), place("memory")
    rows = some_rows()
    for step in range(1, 6):
        rows[f"w{step}"] = [float(step)] * 4
        save(run, step, {"shop": rows})
        assert publish(str(run), often).tables["shop"].changed == (0 if step == 1 else 1)
        if step in (1, 5):
            done = publish(str(run), seldom)
    assert done.tables["shop"] == TableCounts(0, 4, 0)
    for url in (often, seldom):
        Consumer(url).require("shop", rows)


def test_readers_are_not_disturbed_by_a_compaction(place: Callable[[str], str], tmp_path: Path) -> None:
    run, url = tmp_path / "run", place("folder")
    rows = some_rows(20)
    mirror: Mirror | None = None
    kept, old = [], None
    for step in range(1, 9):
        for row in range(4):
            rows[f"w{(4 * step + row) % 20}"] = [float(step)] * 4
        save(run, step, {"shop": rows})
        publish(str(run), url)
        if mirror is None:
            mirror, old = Mirror(url), Folder(url).open()
        if step % 3 == 1:
            mirror.update()
            names = list(rows)
            np.testing.assert_array_equal(mirror.vectors("shop", names), np.array(list(rows.values()), np.float32))
        kept.append([part["number"] for part in Folder(url).open().manifest["tables"]["shop"]["parts"]])
    # After as many changed rows as there are rows, all are written.
    assert kept == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [7], [7, 8]]
    assert Folder(url).numbers() == [6, 7, 8]
    # Files of versions that are kept no longer are gone.
    files = {str(path.relative_to(url)) for path in Path(url).glob("part-*/*.parquet")}
    needed = {file for number in (6, 7, 8) for file in Folder(url).open(number).manifest["files"]}
    assert {file for file in files if "rows" in file} == needed
    assert Consumer(url).rows("shop", ["w0"]).shape == (1, 4)
    with pytest.raises(Gone, match=r"version 1 of .* was deleted: open the newest version"):
        Folder(url).open(1)
    assert old is not None
    shutil.rmtree(next(Path(url).glob("part-000000001-*")), ignore_errors=True)
    with pytest.raises(Gone, match=r"version 1 of .* was deleted"):
        list(old.changes("shop"))
    with pytest.raises(ValueError, match=r"since=9 must not be newer than this version of .*, which is 8"):
        list(Folder(url).open().changes("shop", since=9))


def test_a_mirror_begins_anew_if_the_folder_did(place: Callable[[str], str], tmp_path: Path) -> None:
    run, url = tmp_path / "run", place("folder")
    for step in (1, 2):
        save(run, step, {"shop": some_rows(seed=step)})
        publish(str(run), url)
    mirror = Mirror(url)
    mirror.update()
    shutil.rmtree(url)
    save(tmp_path / "other", 1, {"shop": {"a": [1.0, 2.0]}})
    publish(str(tmp_path / "other"), url)
    assert mirror.update()
    assert mirror.names("shop") == ["a"]


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_left_for_the_newest(
    place: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, url = tmp_path / "run", place("folder")
    save(run, 1, {"shop": some_rows()})
    digests = "embedtrain.serve.changes.row_digests"

    def digests_of_deleted(rows: NDArray[np.float32]) -> NDArray[np.uint64]:
        monkeypatch.setattr(digests, row_digests)
        save(run, 2, {"shop": some_rows(seed=5)})
        shutil.rmtree(run / "checkpoints" / "step-000000001")
        raise FileNotFoundError("it is gone")

    monkeypatch.setattr(digests, digests_of_deleted)
    assert publish(str(run), url).step == 2
    Consumer(url).require("shop", some_rows(seed=5))


def test_rows_have_the_same_hash_only_if_they_have_the_same_bytes() -> None:
    rows = np.random.default_rng(0).integers(0, 3, (4000, 5)).astype(np.float32)
    digests = row_digests(rows)
    num_rows = len({row.tobytes() for row in rows})
    assert len(set(digests.tolist())) == num_rows < 4000
    # One bit, that of the sign, in each place; and as many zeros as there are columns.
    ones = np.ones((6, 5), np.float32)
    ones[range(5), range(5)] = -1
    assert len(set(row_digests(ones).tolist())) == 6
    assert row_digests(np.float32([[0.0]])) != row_digests(np.float32([[-0.0]]))
    assert row_digests(np.zeros((1, 2), np.float32)) != row_digests(np.zeros((1, 3), np.float32))


def test_the_reader_needs_no_embedtrain(place: Callable[[str], str], tmp_path: Path) -> None:
    tree = ast.parse(Path(published.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        name.partition(".")[0]
        for node in imports
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }
    assert names - set(sys.stdlib_module_names) == {"numpy", "fsspec", "pyarrow", "redis"}
    url = place("folder")
    save(tmp_path / "run", 1, {"shop": some_rows()})
    publish(str(tmp_path / "run"), url)
    program = Path(url, "published.py")
    assert program.read_text() == Path(published.__file__).read_text()
    program.write_text("of an earlier version")
    save(tmp_path / "run", 2, {"shop": some_rows(seed=1)})
    publish(str(tmp_path / "run"), url)
    assert program.read_text() == Path(published.__file__).read_text()


@pytest.mark.parametrize(
    ("url", "expected", "status"),
    [
        ("kafka://x", "'kafka://x' is not a path that can be opened: Protocol not known: kafka", 2),
        ("redis://127.0.0.1:1/0", "failed: cannot use Redis at 127.0.0.1:1/0: Error 111 connecting", 1),
        ("redis://127.0.0.1:1/0?password=secret", "failed: cannot use Redis at 127.0.0.1:1/0: Error 111", 1),
        ("redis://:pass/word@host", "'redis://@host' is not a valid Redis URL: expected redis://", 2),
        ("redis://host:port", "'redis://host:port' is not a valid Redis URL", 2),
        (
            "redis://127.0.0.1:1/abc",
            "'redis://127.0.0.1:1/abc' is not a valid Redis URL: the database",
            2,
        ),
        (
            "redis://:1/secret@h",
            "'redis://@h' is not a valid Redis URL: the database must be a number",
            2,
        ),
        (
            "redis://127.0.0.1:1/0?prefx=typo",
            "parameter 'prefx' is unknown to redis-py (embedtrain adds 'prefix'): expected",
            2,
        ),
        (
            "unix:///run/x?prefx=typo",
            "parameter 'prefx' is unknown to redis-py (embedtrain adds 'prefix'): expected",
            2,
        ),
        ("redis://127.0.0.1:1?prefix=", "parameter 'prefix' has no value: expected redis://", 2),
        ("redis://127.0.0.1:1?db=x", "is not a valid Redis URL: expected redis://", 2),
        ("newer", "version-000000002.json has format version 2, and this program reads versions up to 1", 2),
        ("damaged", "version-000000001.json is not the manifest of a publication", 2),
        ("other", "other holds 'notes.txt' but no publication: give another folder", 2),
        (
            "memory://x",
            "memory://x is in the memory of this process and is lost when the process ends: give a folder",
            2,
        ),
        ("dangling", "dangling is a link to nowhere, which does not exist; give another path", 2),
        ("linked", "linked is a link to table.csv, not a folder; give another path", 2),
        ("table.csv", "error: table.csv is a file, not a folder; give another path", 2),
        ("table.csv/", "error: table.csv is a file, not a folder; give another path", 2),
        ("table.csv/below", "table.csv/below lies below a file, not a folder; give another path", 2),
    ],
)
def test_a_place_that_cannot_be_used_is_named(
    url: str,
    expected: str,
    status: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "run", 1, {"shop": some_rows()})
    for name in ("newer", "damaged", "other"):
        Path(name).mkdir()
    Path("other/notes.txt").write_text("")
    Path("table.csv").touch()
    Path("linked").symlink_to("table.csv")
    Path("dangling").symlink_to("nowhere")
    Path("damaged/version-000000001.json").write_text("[]")
    facts = {"format": published.FORMAT, "format_version": published.VERSION + 1}
    Path("newer/version-000000002.json").write_text(json.dumps(facts))
    assert cli.main(["publish", "run", "--to", url]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    if url in ("newer", "damaged"):
        with pytest.raises(ValueError, match=expected.removeprefix("version-")):
            Mirror(url).update()
    if "Redis URL" in line:
        with pytest.raises(ValueError, match="expected redis://HOST:PORT/DATABASE") as refusal:
            RedisRows(url)
        assert "secret" not in str(refusal.value) and "word" not in str(refusal.value)


def test_the_choice_of_the_checkpoint_is_said_once_if_the_place_cannot_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "run", 1, {"shop": some_rows()})
    assert cli.main(["publish", str(tmp_path / "run"), "--to", "/proc/x"]) == 2
    assert caplog.messages == [f"{tmp_path}/run: using the newest checkpoint, step 1"]
    (refused,) = capsys.readouterr().err.splitlines()[-1:]
    assert refused == "embedtrain: error: /proc/x: No such file or directory; give another path"


@pytest.mark.parametrize("kind", ["folder", "redis"])
def test_what_vanishes_from_consumers_is_said_and_another_model_is_refused(
    kind: str, place: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, url = tmp_path / "run", place(kind)
    save(run, 1, {"shop": some_rows(), "country": some_rows(1)}, dense={"a": [1.0]}, model="ranking")
    assert cli.main(["publish", str(run), "--to", url]) == 0
    save(tmp_path / "other", 5, {"shop": some_rows(seed=1)}, model="retrieval")
    capsys.readouterr()
    assert cli.main(["publish", str(tmp_path / "other"), "--to", url]) == 2
    said = f"{url} holds a ranking model of {run}, but this run is a retrieval model: publish to another folder"
    assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="holds a ranking model"):
        require_reachable(url, "retrieval")
    require_reachable(url, "ranking")
    Consumer(url).require("country", some_rows(1))
    save(run, 2, {"shop": some_rows()}, model="ranking")
    assert cli.main(["publish", str(run), "--to", url]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  shop: 0 rows added, 0 changed, 0 deleted",
        "  country: gone, 1 row",
        "  the network: gone",
    ]


def test_the_command_says_what_it_published(
    place: Callable[[str], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, url = str(tmp_path / "run"), place("folder")
    save(tmp_path / "run", 1200, {"shop": some_rows()}, dense={"a": [1.0]})
    assert cli.main(["publish", run, "--to", url]) == 0
    assert cli.main(["publish", run, "--to", url]) == 0
    said = [
        f"{url}: version 1, step 1,200",
        "  shop: 30 rows added, 0 changed, 0 deleted",
        "  the network",
        f"{url}: nothing changed since version 1",
    ]
    assert capsys.readouterr().out.splitlines() == said
    for arguments, expected in (
        (["--table", "nothing"], "has no table 'nothing'; it has"),
        (["--table", "shop", "--table", "shop"], "--table: expected different names"),
        (["--step", "7"], "has no complete checkpoint of step 7"),
    ):
        assert cli.main(["publish", run, "--to", url, *arguments]) == 2
        assert expected in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds no publication yet"):
        Mirror(f"{url}-2").update()
    monkeypatch.setitem(sys.modules, "redis", None)
    assert cli.main(["publish", run, "--to", "redis://127.0.0.1:1/0"]) == 2
    assert "needs the package redis: pip install 'embedtrain[redis]'" in capsys.readouterr().err
