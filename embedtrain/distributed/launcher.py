"""What a process owes to torchrun, which launched it: the reason of its failure, and a clean exit."""

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
"""How long a rank whose collective failed waits to hear from the others: they fail at about the same time."""


def tell_launcher(text: str, *, is_fault: bool = True) -> None:
    """Writes the reason of this rank's failure to the file that torchrun reads for the summary at its end.

    Of several failed ranks, torchrun blames the earliest, in whole seconds. So a rank that failed because of another
    rank reports a later time than a rank that failed by itself.

    Args:
        text: the reason.
        is_fault: whether the reason is more than the absence of another rank.

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

    In that teardown, a Gloo thread that still releases its last tensor would abort the process, and torchrun would
    count a complete run as failed.
    """
    if "RANK" not in os.environ:
        sys.exit(status)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
