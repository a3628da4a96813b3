"""The folder of a run: what lies where, and the files that are not checkpoints."""

from __future__ import annotations

import json
from typing import Any

from embedtrain import storage
from embedtrain.data.row_names import VOCABULARY_NAME
from embedtrain.data.vocabulary import Vocabulary
from embedtrain.errors import UserError

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"
STATUS_NAME = "status.json"
CHECKPOINTS_NAME = "checkpoints"
TENSORBOARD_NAME = "tensorboard"
PROFILE_NAME = "profile"


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
