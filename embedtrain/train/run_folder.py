"""The folder of a run: what lies where, and the files that are not checkpoints."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedtrain import storage
from embedtrain.data.vocabulary import Vocabulary
from embedtrain.errors import UserError

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"
STATUS_NAME = "status.json"
VOCABULARY_NAME = "vocabulary.tsv"
FEATURES_NAME = "features"
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


class RunFolder:
    """A run's folder on any file system; other programs rely on the names in it.

    Args:
        path: any fsspec URL; the folder is made by the first file that is written.

    Raises:
        UserError: the path is empty, or the root of a disk.
    """

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/")
        if not self.path:
            raise UserError(f"expected the path of a run folder, such as runs/x, got {path!r}")

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

    def read_config(self) -> str | None:
        """Returns the configuration that the run was started with, as YAML; None where there is no run."""
        try:
            return storage.read(self.join(CONFIG_NAME)).decode()
        except FileNotFoundError:
            return None

    def write_config(self, text: str) -> None:
        """Keeps the configuration, as YAML."""
        self._write(CONFIG_NAME, text)

    def write_vocabulary(self, vocabulary: Vocabulary, name: str = VOCABULARY_NAME) -> None:
        """Keeps the words or raw ids of a table's rows: without them nobody knows whose vectors they are."""
        storage.make_folder(self.path)
        vocabulary.save(self.join(name))

    def read_names(self, table: str, num_rows: int) -> Sequence[str] | None:
        """Returns what the rows of a table stand for: words, raw ids or values; None where nobody kept that.

        Args:
            table: its name.
            num_rows: its rows; the words of another number of rows are not its own.

        Raises:
            UserError: a file of words or ids cannot be read as one.
        """
        for name in (f"{table}s.tsv", VOCABULARY_NAME):
            try:
                words = Vocabulary.load(self.join(name)).words
            except FileNotFoundError:
                continue
            if len(words) == num_rows:
                return words
        try:
            data = storage.read(self.join(f"{FEATURES_NAME}/{table}.parquet"))
        except FileNotFoundError:
            return None
        # The first row is that of all values that have none of their own.
        values = ["(any other value)", *pq.read_table(pa.BufferReader(data))["value"].to_pylist()]
        return values if len(values) == num_rows else None

    def write_feature(self, name: str, values: pa.Table) -> None:
        """Keeps which value of a categorical feature each row of its table stands for, as a Parquet file."""
        storage.make_folder(self.join(FEATURES_NAME))
        buffer = pa.BufferOutputStream()
        pq.write_table(values, buffer)
        path = self.join(f"{FEATURES_NAME}/{name}.parquet")
        storage.replace(path, buffer.getvalue().to_pybytes(), f"{path}.tmp")

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
