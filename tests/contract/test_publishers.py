"""Publishers that meet another one, or whose store fails them; and how stores in Redis are named and laid out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedtrain import storage
from embedtrain.errors import UserError
from embedtrain.serve import publication_sinks, published, redis_sink
from embedtrain.serve.publication import publish, require_reachable
from embedtrain.serve.published import Gone
from tests.stores import Consumer, save, some_rows


def sink_of(kind: str) -> Any:
    return publication_sinks.FolderSink if kind == "folder" else redis_sink.RedisSink


def save_three(folder: Path) -> dict[str, Any]:
    """Saves three runs of a table `shop`; returns their rows by the names of the runs."""
    rows = {name: some_rows(seed=seed) for seed, name in enumerate(("first", "second", "third"))}
    for name, each in rows.items():
        save(folder / name, 1, {"shop": each})
    return rows


@pytest.mark.parametrize("kind", ["folder", "redis"])
def test_one_of_two_publishers_at_once_is_refused(
    kind: str, place: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sink = place(kind), sink_of(kind)
    rows = save_three(tmp_path)
    publish(str(tmp_path / "first"), url)
    begin = sink.begin

    def after_another(self: object, number: int) -> None:
        monkeypatch.setattr(sink, "begin", begin)
        if kind == "folder":
            begin(self, number)  # type: ignore[arg-type]
        publish(str(tmp_path / "third"), url)
        if kind == "redis":
            begin(self, number)  # type: ignore[arg-type]

    monkeypatch.setattr(sink, "begin", after_another)
    with pytest.raises(UserError, match="another publisher wrote version 2"):
        publish(str(tmp_path / "second"), url)
    Consumer(url).require("shop", rows["third"])
    publish(str(tmp_path / "second"), url)
    Consumer(url).require("shop", rows["second"])


@pytest.mark.parametrize("kind", ["folder", "redis"])
def test_a_publisher_begins_again_if_another_was_quicker(
    kind: str, place: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sink = place(kind), sink_of(kind)
    rows = save_three(tmp_path)
    publish(str(tmp_path / "first"), url)
    newest = sink.newest

    def before_another(self: Any) -> Any:
        found = newest(self)
        monkeypatch.setattr(sink, "newest", newest)
        publish(str(tmp_path / "third"), url)
        return found

    monkeypatch.setattr(sink, "newest", before_another)
    assert publish(str(tmp_path / "second"), url).number == 3
    Consumer(url).require("shop", rows["second"])


def test_a_folder_that_has_lost_the_cursor_is_refused(place: Callable[[str], str], tmp_path: Path) -> None:
    run, url = tmp_path / "run", place("folder")
    for step in (1, 2):
        save(run, step, {"shop": some_rows(seed=step)})
        if step == 2:
            next(Path(url).glob("part-*/*-digests")).unlink()
            with pytest.raises(UserError, match=r"lacks part-.*-digests, .* delete the folder"):
                publish(str(run), url)
        else:
            publish(str(run), url)


@pytest.mark.parametrize("kind", ["folder", "redis"])
def test_a_version_that_is_complete_is_published_whatever_fails_then(
    kind: str,
    place: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url, is_folder = place(kind), kind == "folder"
    sink: Any = publication_sinks.FolderSink if is_folder else redis_sink.RedisSink
    commit = sink.commit

    def no_answer(self: Any, manifest: Any) -> None:
        commit(self, manifest)
        raise OSError("no answer")

    def failing(self: Any, manifest: Any) -> None:
        if manifest is not None and manifest["number"] == self_number:
            raise UserError("the lock expired")

    for step, name, stand_in in ((1, "commit", no_answer), (2, "_sweep", failing)):
        self_number = step
        save(tmp_path / "run", step, {"shop": some_rows(seed=step)})
        with monkeypatch.context() as patched:
            patched.setattr(sink, name, stand_in)
            assert publish(str(tmp_path / "run"), url).number == step
        Consumer(url).require("shop", some_rows(seed=step))
    assert [each.getMessage() for each in caplog.records if each.levelname == "WARNING"] == [
        "version 1 is published, but cleaning up failed: no answer",
        "version 2 is published, but data of older versions was not removed: the lock expired",
    ]


@pytest.mark.parametrize(("holder", "expected"), [(None, ""), ("x", ", and another publisher holds it now")])
def test_a_publisher_whose_lock_has_expired_says_so(
    holder: str | None,
    expected: str,
    place: Callable[[str], str],
    tmp_path: Path,
    server: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = place("redis")
    import redis

    client, prefix = redis.Redis.from_url(str(server)), url.partition("prefix=")[2]
    open_table = redis_sink.RedisSink.open_table

    def after_a_while(self: Any, table: str, dim: int, *, is_whole: bool) -> Any:
        client.delete(f"{prefix}:lock")
        if holder is not None:
            client.set(f"{prefix}:lock", holder)
        return open_table(self, table, dim, is_whole=is_whole)

    monkeypatch.setattr(redis_sink.RedisSink, "open_table", after_a_while)
    save(tmp_path / "run", 1, {"shop": some_rows()})
    with pytest.raises(UserError, match=f"expired after 30 seconds without a write{expected}: publish again"):
        publish(str(tmp_path / "run"), url)
    client.close()


def test_the_password_of_redis_is_that_of_a_variable(
    place: Callable[[str], str], tmp_path: Path, server: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = place("redis")
    import redis

    save(tmp_path / "run", 1, {"shop": some_rows()})
    client = redis.Redis.from_url(str(server))
    client.config_set("requirepass", "secret")
    try:
        with pytest.raises(UserError, match=f"the variable {published.PASSWORD_VARIABLE}$"):
            require_reachable(url)
        monkeypatch.setenv(published.PASSWORD_VARIABLE, "secret")
        require_reachable(url)
        publish(str(tmp_path / "run"), url)
        Consumer(url).require("shop", some_rows())
    finally:
        client.config_set("requirepass", "")
        client.close()


def test_files_in_redis_lie_in_chunks(
    place: Callable[[str], str], tmp_path: Path, server: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = place("redis")
    import redis

    monkeypatch.setattr(published, "CHUNK_BYTES", 64)
    dense = {"a": np.arange(100.0).tolist()}
    for step in (1, 2):
        save(tmp_path / "run", step, {"shop": some_rows(seed=step)}, dense=dense)
        publish(str(tmp_path / "run"), url)
    assert Consumer(url).dense() == dense
    client = redis.Redis.from_url(str(server))
    keys = {key.decode() for key in client.keys(f"{url.partition('prefix=')[2]}:file:*")}
    assert len(keys) >= 8 and not any(":file:1:" in key and "digests" in key for key in keys), "older ones are gone"
    client.delete(sorted(key for key in keys if "dense" in key)[-1])
    with pytest.raises(Gone, match="the network was replaced during each of"):
        Consumer(url).dense()
    client.close()


@pytest.mark.parametrize(
    ("url", "address", "shown"),
    [
        ("redis://host:1/2?prefix=x", ("redis://host:1/2", "x"), "redis://host:1/2?prefix=x"),
        (
            "rediss://me:a/b@c@host?prefix=x&db=3",
            ("rediss://me:a/b@c@host?db=3", "x"),
            "rediss://me@host?prefix=x&db=3",
        ),
        ("unix:///run/redis.sock?db=1&prefix=x", ("unix:///run/redis.sock?db=1", "x"), None),
        (
            "unix:///run/redis.sock?password=c",
            ("unix:///run/redis.sock?password=c", "embedtrain"),
            "unix:///run/redis.sock",
        ),
        ("s3://bucket/a:b@c?d", None, None),
        ("ftp://me:you@host/a", None, "ftp://me@host/a"),
        ("folder?", None, None),
    ],
)
def test_urls_of_redis_are_read_and_shown(
    url: str, address: tuple[str, str] | None, shown: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert storage.shown(url) == (shown or url) and storage.has_password(url) == (shown not in (None, url))
    if address is not None:
        assert published.split_prefix(url) == address
    if url.startswith("unix:"):
        pytest.importorskip("redis")
        monkeypatch.setenv(published.PASSWORD_VARIABLE, "of the variable")
        client, _ = published.connect(url)
        options = client.get_connection_kwargs()
        assert options["path"] == "/run/redis.sock"
        assert options["password"] == ("c" if "password" in url else "of the variable")


def test_redis_that_has_lost_the_cursor_is_refused(
    place: Callable[[str], str], tmp_path: Path, server: str | None
) -> None:
    url = place("redis")
    import redis

    save(tmp_path / "run", 1, {"shop": some_rows()})
    publish(str(tmp_path / "run"), url)
    client = redis.Redis.from_url(str(server))
    prefix = url.partition("prefix=")[2]
    for key in client.keys(f"{prefix}:file:*"):
        client.delete(key)
    save(tmp_path / "run", 2, {"shop": some_rows(seed=4)})
    with pytest.raises(UserError, match=rf"lacks the key {prefix}:file:.* delete the keys that begin with {prefix}:"):
        publish(str(tmp_path / "run"), url)
    Consumer(url).require("shop", some_rows())
    # As for somebody who is killed and leaves the lock behind.
    client.delete(*client.keys(f"{prefix}:*"))
    client.set(f"{prefix}:lock", "another", px=50)
    publish(str(tmp_path / "run"), url)
    Consumer(url).require("shop", some_rows(seed=4))
    client.close()
