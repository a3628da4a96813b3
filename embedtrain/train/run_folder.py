"""The run folder: the names in it, and reading and writing of all files except checkpoints."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from embedtrain import storage
from embedtrain.data.row_names import FEATURES_NAME, VOCABULARY_NAME
from embedtrain.data.vocabulary import Vocabulary
from embedtrain.errors import UserError
from embedtrain.schema import Count, parse
from embedtrain.train import kept_data
from embedtrain.train.kept_data import KEPT_DATA_NAME, KeptData

T = TypeVar("T")

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"
STATUS_NAME = "status.json"
RUN_ID_NAME = "run-id.txt"
STARTS_NAME = "starts.jsonl"
CHECKPOINTS_NAME = "checkpoints"
TENSORBOARD_NAME = "tensorboard"
PROFILE_NAME = "profile"
SPLIT_NAME = "split"

_FILES = (CONFIG_NAME, METRICS_NAME, STATUS_NAME, RUN_ID_NAME, STARTS_NAME)
_FILE = re.compile(rf"({'|'.join(map(re.escape, _FILES))}|\w+\.tsv)(\.tmp|\.partial)?")
_TRACE = re.compile(rf"{METRICS_NAME}|{STATUS_NAME}|{CHECKPOINTS_NAME}|owner-")
"""Matches the beginning of names that any start of a run writes in addition to its configuration."""
_FOLDERS = (CHECKPOINTS_NAME, KEPT_DATA_NAME, FEATURES_NAME, TENSORBOARD_NAME, PROFILE_NAME, SPLIT_NAME)

_MAX_STARTS = 100
"""Largest number of starts that are recorded."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Record:
    """Declares what every line of `metrics.jsonl` must contain."""

    step: Count


class RunFolder:
    """Reads and writes the files of a run folder. Their names are a public format.

    Args:
        path: any fsspec URL; writing the first file creates the folder.

    Raises:
        UserError: the path is empty, the root of a disk, or a chain of file systems.
    """

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/")
        if not self.path:
            raise UserError(f"expected the path of a run folder, such as runs/x, got {path!r}")
        if "::" in path:
            raise UserError(f"a run folder cannot be at {path!r}: paths with `::` can be read but not written")

    def join(self, name: str) -> str:
        """Returns the URL of a file in the folder."""
        return f"{self.path}/{name}"

    @property
    def checkpoints_path(self) -> str:
        """Path of the folder of checkpoints."""
        return self.join(CHECKPOINTS_NAME)

    @property
    def kept_data_path(self) -> str:
        """Path of the folder of kept data, which evaluation and recommendation need."""
        return self.join(KEPT_DATA_NAME)

    @property
    def metrics_path(self) -> str:
        """Path of the file of metrics, with one JSON object per line."""
        return self.join(METRICS_NAME)

    def require_writable_names(self) -> None:
        """Checks that the run can write its files without overwriting anything of the user's.

        Raises:
            UserError: the folder is a file or a dangling link; a folder, pipe or link has the name of a file of the
                run; a file has the name of a folder of the run; the folder of kept data holds files of the user's; or
                the folder holds a configuration but no other file of a run, so that it may be the user's.
        """
        storage.require_folder(self.path)
        names = storage.list_names(self.path)
        for name in names:
            what = storage.oddity(self.join(name))
            if _FILE.fullmatch(name) and what is not None:
                raise UserError(f"{self.join(name)} is {what}, and a run writes a file of that name: move it away")
            path = storage.local_path(self.join(name))
            if name in _FOLDERS and path is not None and not os.path.isdir(path):
                raise UserError(
                    f"{self.join(name)} is {what or 'a file'}, and a run keeps a folder of that name: move it away"
                )
        kept_data.require_own(self.kept_data_path)
        if CONFIG_NAME in names and not any(_TRACE.match(name) for name in names):
            raise UserError(
                f"{self.join(CONFIG_NAME)} exists without any other file of a run, and a run would overwrite it with "
                "its own configuration. Give another run.path"
            )

    def read_config(self) -> str | None:
        """Returns the configuration that the run was started with, as YAML; None if there is no run."""
        try:
            return storage.read(self.join(CONFIG_NAME)).decode()
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise UserError(f"{self.join(CONFIG_NAME)} is not UTF-8: {error}") from error

    def read_metrics(self) -> Iterator[Mapping[str, Any]]:
        """Yields the records of `metrics.jsonl`, each with its step; skips bad lines and logs a warning about them."""
        bad = []
        with suppress(FileNotFoundError):
            for number, line in enumerate(storage.read_lines(self.metrics_path), start=1):
                try:
                    record = json.loads(line)
                    parse(_Record, record)
                except (ValueError, RecursionError):
                    bad.append(number)
                else:
                    yield record
        if bad:
            _logger.warning(f"{self.metrics_path}: skipped {len(bad):,} lines without a record, such as line {bad[0]}")

    def read_status(self) -> Mapping[str, Any]:
        """Returns how the run ended; empty if it still runs, was killed, or the file cannot be read."""
        try:
            status = json.loads(storage.read(self.join(STATUS_NAME)))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            _logger.warning(f"{self.join(STATUS_NAME)} is damaged and is ignored: {error}")
            return {}
        return status if isinstance(status, dict) else {}

    def read_starts(self) -> list[Mapping[str, Any]]:
        """Returns the facts of each start and resumption of the run, in order; see `start_facts`."""
        try:
            lines = storage.read(self.join(STARTS_NAME)).splitlines()
        except FileNotFoundError:
            return []
        starts = []
        for line in lines:
            with suppress(ValueError, RecursionError):
                starts.append(json.loads(line))
        return [start for start in starts if isinstance(start, dict)]

    def add_start(self, facts: Mapping[str, Any], *, is_new: bool) -> None:
        """Records the facts of a start of the run.

        Args:
            facts: JSON.
            is_new: whether the run is new. Then the starts of an earlier run in this folder are dropped.
        """
        starts = [*([] if is_new else self.read_starts()[1 - _MAX_STARTS :]), facts]
        self._write(STARTS_NAME, "".join(f"{json.dumps(start)}\n" for start in starts))

    def run_id(self, *, is_new: bool) -> str:
        """Returns the id of the run for trackers; a new run draws it at random and stores it in the folder.

        Args:
            is_new: whether the run is new. Then the id of an earlier run in this folder is replaced.
        """
        with suppress(FileNotFoundError):
            found = storage.read(self.join(RUN_ID_NAME)).decode(errors="replace").strip()
            if found.isalnum() and not is_new:
                return found
        drawn = secrets.token_hex(8)
        self._write(RUN_ID_NAME, f"{drawn}\n")
        return drawn

    def write_config(self, text: str) -> None:
        """Writes the configuration, as YAML."""
        self._write(CONFIG_NAME, text)

    def write_vocabulary(self, vocabulary: Vocabulary, name: str = VOCABULARY_NAME) -> None:
        """Writes the words or raw ids of a table's rows, which readers need to name the vectors."""
        storage.make_folder(self.path)
        vocabulary.save(self.join(name))

    def keep_data(
        self, facts: Mapping[str, Any], entry_path: str | None = None, leave_out: frozenset[str] = frozenset()
    ) -> None:
        """Copies the prepared data that evaluation and recommendation need, replacing an earlier copy.

        Unchanged files are not written again. Nothing is kept if there are neither facts nor files, or if the files
        take more than `MAX_KEPT_BYTES`.

        Args:
            facts: JSON.
            entry_path: local folder of prepared data, whose files are copied; None copies none.
            leave_out: names of files to leave out, because the run folder has them elsewhere.

        Raises:
            UserError: the destination holds files that no run has written.
        """
        kept_data.keep(self.kept_data_path, facts, entry_path, leave_out)

    def write_split(self, paths: Sequence[str]) -> None:
        """Copies the files of a split, which hold raw ids, into the folder for other programs."""
        if paths:
            storage.make_folder(self.join(SPLIT_NAME))
        for path in paths:
            kept_data.copy_file(path, self.join(f"{SPLIT_NAME}/{os.path.basename(path)}"))

    def open_data(self, kind: type[T]) -> AbstractContextManager[KeptData[T] | None]:
        """Yields the data that `keep_data` kept, after verifying each file; None if nothing was kept.

        The files of a remote run folder are copied to a temporary folder, which is removed on exit.

        Args:
            kind: dataclass that declares the facts.

        Raises:
            UserError: the facts do not match `kind`.
            CorruptCheckpointError: a file is missing or has changed.
        """
        return kept_data.open_kept(self.kept_data_path, kind)

    def verify_data(self) -> bool:
        """Verifies the checksums of the data that `keep_data` kept; returns whether there are any.

        Raises:
            UserError: the table of contents is damaged.
            CorruptCheckpointError: a file is missing or has changed.
        """
        return kept_data.verify(self.kept_data_path)

    def write_status(self, state: str, exit_status: int, **details: Any) -> None:
        """Writes how the run ended, because torchrun's exit status hides it."""
        self._write(STATUS_NAME, json.dumps({"state": state, "exit_status": exit_status, **details}) + "\n")

    def write_profile(self, rank: int, trace: bytes, table: str) -> None:
        """Writes a rank's trace and its table of stages."""
        storage.make_folder(self.join(PROFILE_NAME))
        for name, content in ((f"rank-{rank}.json", trace), (f"rank-{rank}.txt", table.encode() + b"\n")):
            path = self.join(f"{PROFILE_NAME}/{name}")
            storage.replace(path, content, f"{path}.tmp")

    def _write(self, name: str, text: str) -> None:
        storage.make_folder(self.path)
        storage.replace(self.join(name), text.encode(), self.join(f"{name}.tmp"))
