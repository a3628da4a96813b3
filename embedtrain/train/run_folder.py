"""The folder of a run: what lies where, and the files that are not checkpoints."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedtrain import storage
from embedtrain.data.row_names import FEATURES_NAME, VOCABULARY_NAME
from embedtrain.data.vocabulary import Vocabulary
from embedtrain.errors import UserError
from embedtrain.schema import Count, parse

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"
STATUS_NAME = "status.json"
CHECKPOINTS_NAME = "checkpoints"
TENSORBOARD_NAME = "tensorboard"
PROFILE_NAME = "profile"
DATA_NAME = "data"
"""What of its data the answers of a run need: `recommend`, `evaluate` and the like read nothing else."""
_KEPT_NAME = "kept.json"


@dataclass(frozen=True)
class KeptData:
    """What of its data a run has in its folder.

    Attributes:
        path: a local folder with the files of prepared data.
        facts: JSON.
    """

    path: str
    facts: Mapping[str, Any]


_FILE = re.compile(
    rf"({re.escape(CONFIG_NAME)}|{re.escape(METRICS_NAME)}|{re.escape(STATUS_NAME)}|\w+\.tsv)(\.tmp|\.partial)?"
)
_FOLDERS = (CHECKPOINTS_NAME, DATA_NAME, FEATURES_NAME, TENSORBOARD_NAME, PROFILE_NAME)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Record:
    """What every line of `metrics.jsonl` has."""

    step: Count


class RunFolder:
    """A run's folder on any file system; other programs rely on the names in it.

    Args:
        path: any fsspec URL; the folder is made by the first file that is written.

    Raises:
        UserError: the path is empty, the root of a disk, or a chain of file systems.
    """

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/")
        if not self.path:
            raise UserError(f"expected the path of a run folder, such as runs/x, got {path!r}")
        if "::" in path:
            raise UserError(f"a run folder cannot lie at {path!r}: `::` chains file systems that are only read")

    def join(self, name: str) -> str:
        """Returns the URL of a file of the folder."""
        return f"{self.path}/{name}"

    @property
    def checkpoints_path(self) -> str:
        """Where the checkpoints lie."""
        return self.join(CHECKPOINTS_NAME)

    @property
    def metrics_path(self) -> str:
        """One JSON object a line."""
        return self.join(METRICS_NAME)

    def require_writable_names(self) -> None:
        """Refuses a folder where something else lies under the names of files and folders that a run writes.

        Raises:
            UserError: a file's name is a folder, a pipe or a link, through which a run would write elsewhere; or a
                folder's name is a file.
        """
        for name in storage.list_names(self.path):
            what = storage.oddity(self.join(name))
            if _FILE.fullmatch(name) and what is not None:
                raise UserError(f"{self.join(name)} is {what}, and a run writes a file of that name: move it away")
            path = storage.local_path(self.join(name))
            if name in _FOLDERS and path is not None and not os.path.isdir(path):
                raise UserError(
                    f"{self.join(name)} is {what or 'a file'}, and a run keeps a folder of that name: move it away"
                )

    def read_config(self) -> str | None:
        """Returns the configuration that the run was started with, as YAML; None where there is no run."""
        try:
            return storage.read(self.join(CONFIG_NAME)).decode()
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise UserError(f"{self.join(CONFIG_NAME)} is not UTF-8: {error}") from error

    def read_metrics(self) -> list[Mapping[str, Any]]:
        """Returns the records of `metrics.jsonl`, each with its step; lines that hold none are left out and told of."""
        try:
            lines = storage.read(self.metrics_path).splitlines()
        except FileNotFoundError:
            return []
        records, bad = [], []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                parse(_Record, record)
                records.append(record)
            except (ValueError, RecursionError):
                bad.append(number)
        if bad:
            _logger.warning(f"{self.metrics_path}: {len(bad):,} lines hold no record, such as line {bad[0]}: left out")
        return records

    def read_status(self) -> Mapping[str, Any]:
        """Returns how the run ended; empty while it is going on, after it was killed, or if that cannot be read."""
        try:
            status = json.loads(storage.read(self.join(STATUS_NAME)))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            _logger.warning(f"{self.join(STATUS_NAME)} says nothing of the run: {error}")
            return {}
        return status if isinstance(status, dict) else {}

    def write_config(self, text: str) -> None:
        """Keeps the configuration, as YAML."""
        self._write(CONFIG_NAME, text)

    def write_vocabulary(self, vocabulary: Vocabulary, name: str = VOCABULARY_NAME) -> None:
        """Keeps the words or raw ids of a table's rows: without them nobody knows whose vectors they are."""
        storage.make_folder(self.path)
        vocabulary.save(self.join(name))

    def keep_data(self, facts: Mapping[str, Any], entry_path: str | None = None) -> None:
        """Keeps what of its data the answers of a run need, in place of what was kept before.

        Args:
            facts: JSON; nothing is kept if they are empty.
            entry_path: local folder of prepared data, whose files are copied; its name says which data they are.
        """
        folder = self.join(DATA_NAME)
        files = {} if entry_path is None else {entry.name: entry.path for entry in os.scandir(entry_path)}
        entry = "" if entry_path is None else os.path.basename(entry_path)
        content = json.dumps({"entry": entry, "files": sorted(files), **facts}, ensure_ascii=False).encode()
        kept = storage.list_files(folder)
        if facts and _KEPT_NAME in kept and storage.read(f"{folder}/{_KEPT_NAME}") == content:
            return
        # What says that all is there goes first and comes last.
        for name in sorted(kept, key=lambda name: name != _KEPT_NAME):
            storage.remove(f"{folder}/{name}")
        if facts:
            storage.make_folder(folder)
            for name, path in files.items():
                storage.write(f"{folder}/{name}", _Chunks(path))
            storage.replace(f"{folder}/{_KEPT_NAME}", content, f"{folder}/{_KEPT_NAME}.tmp")

    @contextmanager
    def open_data(self) -> Iterator[KeptData | None]:
        """Yields what `keep_data` kept; None if that is nothing.

        The files of a run folder that is not local are copied to a temporary folder, which is removed in the end.
        """
        folder = self.join(DATA_NAME)
        if _KEPT_NAME not in storage.list_files(folder):
            yield None
            return
        facts = json.loads(storage.read(f"{folder}/{_KEPT_NAME}"))
        if (local := storage.local_path(folder)) is not None:
            yield KeptData(local, facts)
            return
        with tempfile.TemporaryDirectory(prefix="embedtrain-") as copy:
            for name in facts["files"]:
                Path(copy, name).write_bytes(storage.read(f"{folder}/{name}"))
            yield KeptData(copy, facts)

    def write_status(self, state: str, exit_status: int, **details: Any) -> None:
        """Keeps how the run ended, which torchrun's own exit status hides."""
        self._write(STATUS_NAME, json.dumps({"state": state, "exit_status": exit_status, **details}) + "\n")

    def write_profile(self, rank: int, trace: bytes, table: str) -> None:
        """Keeps a rank's trace and its table of stages."""
        storage.make_folder(self.join(PROFILE_NAME))
        for name, content in ((f"rank-{rank}.json", trace), (f"rank-{rank}.txt", table.encode() + b"\n")):
            path = self.join(f"{PROFILE_NAME}/{name}")
            storage.replace(path, content, f"{path}.tmp")

    def _write(self, name: str, text: str) -> None:
        storage.make_folder(self.path)
        storage.replace(self.join(name), text.encode(), self.join(f"{name}.tmp"))


class _Chunks(Iterable[bytes]):
    """The content of a local file, a few MiB at a time, as often as it is asked for."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __iter__(self) -> Iterator[bytes]:
        with open(self._path, "rb") as file:
            while chunk := file.read(4 << 20):
                yield chunk
