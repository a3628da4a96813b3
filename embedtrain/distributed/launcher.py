"""The interface to torchrun: reporting the reason of a failure, and exiting cleanly."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from embedtrain.errors import printable

GRACE_SECONDS = 3.0
"""Seconds that a rank with a failed collective waits for reports of the others, which fail at about the same time."""


def tell_launcher(text: str, *, is_fault: bool = True) -> None:
    """Writes the reason of this rank's failure to the file from which torchrun prints its final summary.

    torchrun blames the failed rank with the earliest time, in whole seconds. So a rank that failed because of another
    rank reports a later time.

    Args:
        text: the reason.
        is_fault: whether this rank itself is at fault; False if it failed only because another rank was missing.

    Source: the file that torch.distributed.elastic.multiprocessing.errors.ErrorHandler writes.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        text = printable(text, keep="\n")
        when = time.time() if is_fault else time.time() + 2 * GRACE_SECONDS
        told = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(when))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": told}), encoding="utf-8")


def leave(status: int) -> NoReturn:
    """Ends this process with an exit status; a rank of a job skips the teardown of the interpreter.

    During the teardown, a Gloo thread that still releases a tensor would abort the process, and torchrun would count a
    complete run as failed.
    """
    if "RANK" not in os.environ:
        sys.exit(status)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
