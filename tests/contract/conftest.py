"""Places that runs are published to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.stores import redis_server

_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str | None]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def place(tmp_path: Path, server: str | None) -> Callable[[str], str]:
    """Returns the URL of a new consumer of a kind."""

    def new(kind: str) -> str:
        if kind == "redis" and server is None:
            pytest.skip("no redis-server: install it, on Debian with apt-get install redis-server")
        name = f"{tmp_path.name}-{next(_NUMBERS)}"
        return {"folder": f"{tmp_path}/{name}", "memory": f"memory://{name}", "redis": f"{server}?prefix={name}"}[kind]

    return new
