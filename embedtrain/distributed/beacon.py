"""The beacon: each rank posts its current stage to the job's store, for the report when it stops responding."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from types import TracebackType

import torch.distributed as dist

from embedtrain.distributed.runtime import Runtime
from embedtrain.distributed.stages import whereabouts

POST_SECONDS = 0.25
"""Seconds between two posts. A hanging rank continues to post as long as its interpreter runs."""

_PREFIX = "where"
_LEAVE_SECONDS = 2.0


class Beacon:
    """Posts this rank's current stage from a thread while entered. A context manager; not a collective.

    Args:
        runtime: the job's runtime; without a store nothing is posted.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._is_leaving = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Beacon:
        """Starts posting."""
        if self._runtime.store is not None:
            self._thread = threading.Thread(target=self._keep_posting, name="embedtrain-beacon", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops posting."""
        self._is_leaving.set()
        if self._thread is not None:
            # If the store is unreachable the thread never returns; it is abandoned, because the process is ending.
            self._thread.join(_LEAVE_SECONDS)

    def _keep_posting(self) -> None:
        assert self._runtime.store is not None
        store = dist.PrefixStore(_PREFIX, self._runtime.store)
        posted = ""
        with suppress(RuntimeError):  # The store ends with the launcher.
            while True:
                now = json.dumps([socket.gethostname(), whereabouts()])
                if now != posted:
                    store.set(str(self._runtime.rank), now)
                    posted = now
                if self._is_leaving.wait(POST_SECONDS):
                    return


def read_beacon(store: dist.Store, rank: int) -> tuple[str, str] | None:
    """Returns the host and the stage that a rank posted last; None if it never posted.

    Raises:
        RuntimeError: the store does not respond.
    """
    posts = dist.PrefixStore(_PREFIX, store)
    if not posts.check([str(rank)]):
        return None
    host, place = json.loads(posts.get(str(rank)))
    return host, place
