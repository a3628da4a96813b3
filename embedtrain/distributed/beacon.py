"""Where each rank is, told to the others through the job's store, for the time when it does not answer any more."""

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
"""How often a rank says where it is. A rank that hangs goes on doing so, as long as its interpreter runs."""

_PREFIX = "where"
_LEAVE_SECONDS = 2.0


class Beacon:
    """While entered, a thread posts where this rank is; a context manager, no collective.

    Args:
        runtime: of the job; one without a store has nobody to tell.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._is_leaving = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Beacon:
        """Begins to post."""
        if self._runtime.store is not None:
            self._thread = threading.Thread(target=self._keep_posting, name="embedtrain-beacon", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ceases to post."""
        self._is_leaving.set()
        if self._thread is not None:
            # Where the way to the store is cut it does not come back; the process is about to end.
            self._thread.join(_LEAVE_SECONDS)

    def _keep_posting(self) -> None:
        assert self._runtime.store is not None
        store = dist.PrefixStore(_PREFIX, self._runtime.store)
        posted = ""
        with suppress(RuntimeError):  # the store ends with the launcher
            while True:
                now = json.dumps([socket.gethostname(), whereabouts()])
                if now != posted:
                    store.set(str(self._runtime.rank), now)
                    posted = now
                if self._is_leaving.wait(POST_SECONDS):
                    return


def read_beacon(store: dist.Store, rank: int) -> tuple[str, str] | None:
    """Returns host and place of a rank as it told them last; None where it never did.

    Raises:
        RuntimeError: the store does not answer.
    """
    posts = dist.PrefixStore(_PREFIX, store)
    if not posts.check([str(rank)]):
        return None
    host, place = json.loads(posts.get(str(rank)))
    return host, place
