"""Which files a path means, and files that can be read from their beginning only."""

from __future__ import annotations

import gzip
import http.server
import io
import logging
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedtrain.data.click_schema import CategoricalColumn, ClickSchema
from embedtrain.data.columns import read_columns
from embedtrain.data.prepare import CorpusOptions, prepare_corpus
from embedtrain.data.readers import suffixes_of
from embedtrain.data.sources import expand_sources, refuse_changes, take_sources
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import UserError
from tests.unit.data.click_example import prepared


def below(path: object, suffixes: tuple[str, ...] = (".txt", "")) -> list[str]:
    sources = expand_sources(str(path), suffixes)
    root = str(path).partition("*")[0].rstrip("/")
    return [source.url.removeprefix(root).lstrip("/") for source in sources]


def num_words(path: object, tmp_path: Path) -> int:
    options = CorpusOptions(path=str(path), tokenizer="whitespace", min_count=1)
    return prepare_corpus(options, str(tmp_path / "cache"), ONE_PROCESS, part_bytes=1000).num_tokens


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    for number in (1, 2, 3):
        (folder / f"part{number}.txt").write_text(f"alpha{number} beta{number} gamma{number} delta\n" * 200)
    return folder


def test_symbolic_links_are_followed(store: Path, tmp_path: Path) -> None:
    for folder in ("links", "mixed", "sub"):
        (tmp_path / folder).mkdir()
    for number in (1, 2, 3):
        (tmp_path / "links" / f"part{number}.txt").symlink_to(f"../store/part{number}.txt")
        if number > 1:
            (tmp_path / "mixed" / f"part{number}.txt").symlink_to(f"../store/part{number}.txt")
    for folder in ("mixed", "sub"):
        (tmp_path / folder / "part1.txt").write_bytes((store / "part1.txt").read_bytes())
    (tmp_path / "sub" / "more").symlink_to("../store")
    for path in ("links", "links/*.txt", "mixed", "mixed/*.txt", "*ed/*.txt"):
        assert num_words(tmp_path / path, tmp_path) == 2400, path
    assert num_words(tmp_path / "sub", tmp_path) == 3200
    assert num_words(tmp_path / "sub" / "**" / "*.txt", tmp_path) == 3200


def test_a_changed_file_is_found_through_its_link(store: Path, tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to("store/part1.txt")
    identities = [source.identity for source in expand_sources(str(tmp_path / "link.txt"))]
    refuse_changes(str(tmp_path / "link.txt"), (), identities)
    (store / "part1.txt").write_text("other\n")
    with pytest.raises(UserError, match=r"link\.txt: changed while the run trained on it"):
        refuse_changes(str(tmp_path / "link.txt"), (), identities)


def test_a_file_that_is_reached_twice_comes_once(store: Path) -> None:
    (store / "z.txt").symlink_to("part1.txt")
    (store / "folder").symlink_to(store.parent / "other")
    (store.parent / "other").mkdir()
    (store.parent / "other" / "x.txt").symlink_to("../store/part2.txt")
    assert below(store) == ["folder/x.txt", "part1.txt", "part3.txt"]


def test_links_in_circles_or_to_nowhere_are_refused(store: Path, tmp_path: Path) -> None:
    (store / "up").symlink_to(store)
    with pytest.raises(UserError, match=f"{store}/up: a symbolic link to {store}, which is a folder that it lies in"):
        expand_sources(str(store))
    assert below(store / "*.txt") == ["part1.txt", "part2.txt", "part3.txt"]
    (store / "up").unlink()
    (store / "gone.txt").symlink_to("nothing.txt")
    for path in (store, store / "*.txt", store / "gone.txt"):
        with pytest.raises(UserError, match=r"gone.txt: a symbolic link to nothing.txt, which does not exist"):
            expand_sources(str(path))
    (tmp_path / "self.txt").symlink_to("self.txt")
    with pytest.raises(UserError, match=r"self.txt: a symbolic link to self.txt, which leads back to the link"):
        expand_sources(str(tmp_path / "self.txt"))


def test_hidden_files_are_left_out_and_the_rest_goes_by_suffix(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["a.txt", "B.TXT", "wiki_00", "part-00000.gz", ".h.txt", "_SUCCESS", "notes.md", "t.csv", "day.csv.gz"]
    names += [".ipynb_checkpoints/a.txt", "_temporary/0/b.txt", "sub.d/c.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("words of text\n")
    with caplog.at_level(logging.INFO, "embedtrain"):
        taken = take_sources(str(tmp_path))
    assert [source.url.removeprefix(f"{tmp_path}/") for source in taken] == [
        "B.TXT",
        "a.txt",
        "day.csv.gz",
        "part-00000.gz",
        "sub.d/c.txt",
        "wiki_00",
    ]
    (message,) = caplog.messages
    assert message.startswith(f"reading 6 files of 0.0 MB: {tmp_path}/B.TXT, ")
    assert "left out hidden files: .h.txt, .ipynb_checkpoints/a.txt, _SUCCESS and 1 more" in message
    assert "left out files of other suffixes than .txt: notes.md, t.csv" in message
    assert below(tmp_path / "*.txt") == ["a.txt"]
    assert below(tmp_path / "**" / "*.txt") == ["a.txt", "sub.d/c.txt"]
    assert below(tmp_path / ".*.txt") == ["h.txt"]  # without what stands before the "*"
    in_csv = ["B.TXT", "a.txt", "day.csv.gz", "part-00000.gz", "sub.d/c.txt", "t.csv", "wiki_00"]
    assert below(tmp_path, suffixes_of("csv")) == in_csv
    assert below(tmp_path, suffixes_of("auto")) == ["B.TXT", "a.txt", "day.csv.gz", "sub.d/c.txt", "t.csv"]


def test_hidden_files_of_another_file_system() -> None:
    fs = pytest.importorskip("fsspec").filesystem("memory")
    for name in ("a.txt", ".b.txt", "_c/d.txt"):
        fs.pipe(f"/selection/{name}", b"x\n")
    assert [source.url for source in expand_sources("memory://selection")] == ["memory:///selection/a.txt"]
    assert [source.url for source in expand_sources("memory://selection/**")] == ["memory:///selection/a.txt"]
    fs.rm("/selection", recursive=True)


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    text = b"alpha beta gamma\n" * 100
    table = io.BytesIO()
    pq.write_table(pa.table({"user": [1, 2], "item": ["x", "y"]}), table)
    content = {"corpus.txt": text, "sub/b.txt.gz": gzip.compress(text), "t.parquet": table.getvalue(), ".h.txt": text}
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return tmp_path


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_chained_urls(kind: str, archives: Path, tmp_path: Path) -> None:
    archive = archives / f"c.{kind}"
    assert num_words(f"{kind}://corpus.txt::{archive}", tmp_path) == 300
    assert num_words(f"{kind}://*.txt::{archive}", tmp_path) == 300
    assert num_words(f"{kind}://::{archive}", tmp_path) == 600
    urls = [source.url for source in expand_sources(f"{kind}://**/*.gz::{archive}")]
    assert urls == [f"{kind}://sub/b.txt.gz::{archive}"]
    rows = read_columns(expand_sources(f"{kind}://t.parquet::file://{archive}"), ["user", "item"])
    assert [[column.to_pylist() for column in each.columns] for each in rows] == [[["1", "2"], ["x", "y"]]]
    with pytest.raises(UserError, match="no such file or folder"):
        expand_sources(f"{kind}://none.txt::{archive}")


def test_a_cache_of_files_is_a_chain_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two\n" * 1000)
    assert num_words(f"simplecache::file://{tmp_path}/a.txt", tmp_path) == 2000
    (source,) = expand_sources(f"simplecache::file://{tmp_path}/*.txt")
    assert source.url == f"simplecache::file://{tmp_path}/a.txt"


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files whole: it knows no ranges."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "web").mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: _Handler(*args, directory=str(tmp_path / "web"))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_web_server_without_ranges(web: str, tmp_path: Path) -> None:
    text = "".join(f"w{n % 50} x y z\n" for n in range(6000))
    (tmp_path / "web" / "w.txt").write_text(text)
    (tmp_path / "web" / "w.gz").write_bytes(gzip.compress(text.encode()))
    pq.write_table(pa.table({"y": [n % 2 for n in range(100)], "u": ["a"] * 100}), tmp_path / "web" / "t.parquet")
    (tmp_path / "web" / "t.csv").write_text("y,u\n" + "1,a\n0,b\n" * 5000)
    (source,) = expand_sources(f"{web}/w.txt")
    assert not source.is_divisible
    assert num_words(f"{web}/w.txt", tmp_path) == num_words(f"{web}/w.gz", tmp_path) == 24_000
    for format, num in (("parquet", 100), ("csv", 10_000)):
        schema = ClickSchema(file_format=format, label="y", categorical=(CategoricalColumn(name="u"),))
        log = prepared(f"{web}/t.{format}", schema, tmp_path / "clicks", part_bytes=1000)
        assert log.num_examples == num
