"""An object store on loopback whose requests can be made to fail: moto's S3 behind a handler of our own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Environ = dict[str, Any]

ERROR = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>injected</Message>'
    b"<RequestId>1</RequestId></Error>"
)


class ObjectStore:
    """A server of S3; enter it to start and leave it to stop.

    Attributes:
        url: its endpoint.
        num_failures: requests that were made to fail.
    """

    def __init__(self) -> None:
        self.num_failures = 0
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._handle, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._lock = threading.Lock()
        self._fault: tuple[Callable[[Environ], bool], str, int] | None = None
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> ObjectStore:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fail(self, kind: str, times: int, method: str = "", part: str = "") -> None:
        """Makes the next requests fail.

        Args:
            kind: "InternalError" or "SlowDown" (an answer of 500 or 503), "dropped" (the connection), "slow"
                (three seconds), "unheard" (done, and the connection dropped), "half" (half of what is put is kept).
            times: how many of the requests.
            method: only those of this method.
            part: only those with this in their path or query.
        """

        def concerns(environ: Environ) -> bool:
            target = f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
            return environ["REQUEST_METHOD"].startswith(method) and part in target

        self.num_failures = 0
        self._fault = (concerns, kind, times)

    def mend(self) -> None:
        """Lets requests succeed again."""
        self._fault = None

    def _handle(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        kind = self._kind_of(environ)
        if kind in ("InternalError", "SlowDown"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status = "500 Internal Server Error" if kind == "InternalError" else "503 Slow Down"
            start_response(status, [("Content-Type", "application/xml")])
            return [ERROR % kind.encode()]
        if kind == "dropped":
            return self._drop(environ)
        if kind == "slow":
            time.sleep(3)
        if kind == "half":
            environ = half(environ)
        answer = self._application(environ, start_response)
        return self._drop(environ) if kind == "unheard" else answer

    def _kind_of(self, environ: Environ) -> str:
        with self._lock:
            if self._fault is None or not self._fault[0](environ) or self.num_failures >= self._fault[2]:
                return ""
            self.num_failures += 1
            return self._fault[1]

    def _drop(self, environ: Environ) -> Iterable[bytes]:
        with suppress(OSError):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError("dropped on purpose")


def half(environ: Environ) -> Environ:
    """Returns a request to put the first half of what it was to put, with nothing that would tell."""
    import io

    data = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    told = ("HTTP_X_AMZ_CHECKSUM", "HTTP_CONTENT_MD5", "HTTP_X_AMZ_DECODED", "HTTP_X_AMZ_SDK", "HTTP_X_AMZ_TRAILER")
    kept = {key: value for key, value in environ.items() if not key.startswith(told)}
    shorter = data[: len(data) // 2]
    return {**kept, "wsgi.input": io.BytesIO(shorter), "CONTENT_LENGTH": str(len(shorter))}
