"""Where metrics go: a file of JSON lines, TensorBoard, the console. They belong to one rank, the first."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TextIO, TypeVar

from tqdm import tqdm

from embedtrain import storage
from embedtrain.errors import UserError
from embedtrain.metrics.names import as_words, is_progress, quality_names, split_name

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_logger = logging.getLogger(__name__)

Record = Mapping[str, float | int | str]
T = TypeVar("T")

RunEnd = Literal["finished", "failed", "preempted"]
"""How a run ended: completely, by an error, or asked to stop; it may be resumed after the latter two."""


@dataclass(frozen=True)
class Histogram:
    """How many values lie between edges.

    Attributes:
        edges: n + 1, rising.
        counts: n.
    """

    edges: Sequence[float]
    counts: Sequence[float]


class MetricSink(Protocol):
    """Takes records: names and values, `step` among them."""

    def log(self, record: Record) -> None:
        """Takes one record."""

    def flush(self) -> None:
        """Writes what a reader of the metrics must not miss; called before each checkpoint."""

    def close(self, end: RunEnd) -> None:
        """Writes what is still held back, and tells a tracker how the run ended."""


class JsonlSink:
    """Appends each record to a file as a JSON object on a line; a number that is not finite becomes null.

    A local file has each line at once. Object stores cannot append: there the whole file is written again, at
    most every 30 seconds and by `flush` and `close`, and a process that is killed loses the lines since. Lines
    that cannot be written are warned of, kept and tried again with the next: a disk that is full, or a store
    that is away, is no reason to stop training.
    """

    _UPLOAD_SECONDS = 30.0

    def __init__(self, path: str) -> None:
        self._url = path
        self._local_path = storage.local_path(path)
        storage.make_folder(path.rpartition("/")[0] or ".")
        self._uploaded = b"" if self._local_path else self._read()
        self._uploaded_at = time.monotonic()
        self._pending = b""

    def log(self, record: Record) -> None:
        """Appends the record."""
        line = json.dumps({name: _finite(value) for name, value in record.items()}, allow_nan=False)
        self._pending += line.encode() + b"\n"
        if self._local_path or time.monotonic() - self._uploaded_at >= self._UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the lines that are held back."""
        if not self._pending:
            return
        try:
            if self._local_path:
                _append(self._local_path, self._pending)
            else:
                storage.replace(self._url, self._uploaded + self._pending, "")
                self._uploaded += self._pending
        except OSError as error:
            count = self._pending.count(b"\n")
            _logger.warning(f"{count} lines of metrics were not written, and are kept to be tried again: {error}")
        else:
            self._pending = b""
        self._uploaded_at = time.monotonic()

    def truncate_after(self, step: int) -> None:
        """Drops the lines of later steps, which a resumed run logs again, and a half-written last one."""
        self.flush()
        text = self._read()
        kept = b"".join(line for line in text.splitlines(keepends=True) if _is_up_to(step, line))
        if kept != text:
            storage.replace(self._url, kept, f"{self._url}.partial")
        self._uploaded = b"" if self._local_path else kept

    def close(self, end: RunEnd = "finished") -> None:
        """Writes the lines that are held back."""
        self.flush()

    def _read(self) -> bytes:
        try:
            return storage.read(self._url)
        except FileNotFoundError:
            return b""


class Guarded(Generic[T]):
    """What a tracker writes with, until it fails: a disk that is full, or a server that is away, must not stop a run.

    Args:
        tracker: what the user calls it.
        make: makes the writer.
        close: ends it.
    """

    def __init__(self, tracker: str, make: Callable[[], T], close: Callable[[T], None]) -> None:
        self._tracker, self._close = tracker, close
        self._writer: T | None = None
        try:
            self._writer = make()
        except Exception as error:
            self._warn(error)

    def use(self, use: Callable[[T], None]) -> None:
        """Calls `use` unless an earlier call failed."""
        if self._writer is None:
            return
        try:
            use(self._writer)
        except Exception as error:  # the writer's thread passes on whatever it failed with
            self._warn(error)
            writer, self._writer = self._writer, None
            with suppress(Exception):
                self._close(writer)

    def close(self) -> None:
        """Ends the writer."""
        self.use(self._close)

    def _warn(self, error: Exception) -> None:
        text = " ".join(str(error).split())
        _logger.warning(f"{self._tracker} gets no more of this run: {type(error).__name__}: {text}")


def board_tag(name: str, names: Collection[str]) -> str:
    """Returns the name of a number in TensorBoard, which shows its groups in alphabetical order, capitals first.

    The losses come first, then the other measures of the model, then the groups of the machinery and the progress.

    Args:
        name: of the number.
        names: of all numbers of the record, by which counters are known.
    """
    if name not in quality_names(names):
        return f"progress/{name}" if is_progress(name) or "/" not in name else name
    return f"{'Loss' if split_name(name)[0] == 'loss' else 'Quality'}/{name}"


class TensorBoardSink:
    """Writes each number of a record as a scalar of its step for TensorBoard; texts are left out.

    Losses and measures of the model are the first groups; see `board_tag`.

    Args:
        folder: a local folder.
        purge_step: TensorBoard hides what earlier runs wrote at this step and later; the first step to come
            when a run is resumed.

    Raises:
        UserError: the folder is not local.
    """

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        path = storage.local_path(folder)
        if path is None:
            raise UserError(f"TensorBoard's files are appended to and need a local folder, got {folder!r}")
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and few runs want it

        self._writer = Guarded(
            "TensorBoard", lambda: SummaryWriter(path, purge_step=purge_step), lambda writer: writer.close()
        )

    def log(self, record: Record) -> None:
        """Writes the record's numbers at its step."""

        def use(writer: SummaryWriter) -> None:
            for name, value in record.items():
                if name != "step" and not isinstance(value, str):
                    writer.add_scalar(board_tag(name, record), value, record["step"])

        self._writer.use(use)

    def flush(self) -> None:
        """Writes the events that are held back."""
        self._writer.use(lambda writer: writer.flush())

    def log_settings(self, run: str, settings: Mapping[str, Any], measures: Sequence[str]) -> None:
        """Shows the run among others in TensorBoard's table of hyperparameters, and training beside held-out data.

        Args:
            run: the name of the run in the table.
            settings: by name; mappings become names with dots, and lists texts.
            measures: names of the numbers to show beside them.
        """
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

        tags = {name: board_tag(name, measures) for name in measures}
        charts: dict[str, list[str]] = {}
        for name, tag in tags.items():
            charts.setdefault(as_words(split_name(name)[0]), []).append(f"^{re.escape(tag)}$")

        def use(writer: SummaryWriter) -> None:
            experiment, start, end = hparams(dict(flat(settings)), dict.fromkeys(tags.values(), 0.0))
            # The name of the run in the table is that of its group, which torch leaves to a hash of the settings.
            told = start.value[0].metadata.plugin_data
            named = HParamsPluginData.FromString(told.content)
            named.session_start_info.group_name = run
            told.content = named.SerializeToString()
            for part in (experiment, start, end):
                writer._get_file_writer().add_summary(part)
            writer.add_custom_scalars({"Quality": {name: ["Multiline", found] for name, found in charts.items()}})

        self._writer.use(use)

    def log_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Writes a histogram; nothing where it has no values."""
        filled = [place for place, count in enumerate(histogram.counts) if count]
        if not filled:
            return
        # TensorBoard draws from the lowest edge on: the bins between the outermost filled ones say enough.
        first, last = filled[0], filled[-1] + 1
        counts, edges = histogram.counts[first:last], histogram.edges[first : last + 1]
        middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        self._writer.use(
            lambda writer: writer.add_histogram_raw(
                name,
                min=edges[0],
                max=edges[-1],
                num=int(sum(counts)),
                sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
                sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
                bucket_limits=list(edges[1:]),
                bucket_counts=list(counts),
                global_step=step,
            )
        )

    def close(self, end: RunEnd = "finished") -> None:
        """Writes the events that are held back."""
        self._writer.close()


class ConsoleSink:
    """Shows progress: a bar on a terminal, a line printed every so often elsewhere.

    A training record has the count of what was trained on so far, over all epochs, under the name of its unit,
    `words` for instance, `words_per_second`, `loss` and `learning_rate`. Any other record, such as an evaluation,
    gets a line of its own.

    Args:
        stream: where to print.
        total: how many of the unit to train on in all, over all epochs; None of a stream, whose end is not known.
        unit: what is counted.
        every_seconds: time between two lines of progress where the stream is no terminal.
    """

    def __init__(self, stream: TextIO, total: int | None, unit: str = "words", every_seconds: float = 10.0) -> None:
        self._stream = stream
        self._total = total
        self._unit = unit
        self._every_seconds = every_seconds
        self._bar: _Bar | None = None  # once there is something to show on a terminal
        self._shown_at = -math.inf
        self._held_back = ""  # elsewhere, the newest line that is not printed yet

    def log(self, record: Record) -> None:
        """Shows the record."""
        if self._unit not in record:
            self._print("  ".join(f"{name} {_short(value)}" for name, value in record.items()))
        elif self._stream.isatty():
            self._move_bar(record)
        elif time.monotonic() - self._shown_at >= self._every_seconds:
            self._held_back = ""
            self._print(_progress(record, self._total, self._unit))
            self._shown_at = time.monotonic()
        else:
            self._held_back = _progress(record, self._total, self._unit)

    def flush(self) -> None:
        """Does nothing: what a console shows is not read again."""

    def close(self, end: RunEnd = "finished") -> None:
        """Shows the progress that is held back, and leaves the terminal on a new line."""
        self._print()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _move_bar(self, record: Record) -> None:
        if self._bar is None:
            shape = "{desc}" if self._total is None else "{percentage:5.1f} %|{bar:20}|{desc}"
            self._bar = _Bar(total=self._total, file=self._stream, bar_format=shape, dynamic_ncols=True)
        self._bar.n = int(record[self._unit])
        shown = _progress(record, self._total, self._unit)
        self._bar.set_description_str(shown if self._total is None else shown.partition("%")[2])

    def _print(self, *lines: str) -> None:
        """Prints lines, after the progress that is held back and above the bar."""
        for line in [self._held_back, *lines] if self._held_back else lines:
            if self._bar is not None:
                self._bar.write(line, file=self._stream)
            else:
                self._stream.write(line + "\n")
        self._stream.flush()
        self._held_back = ""


class _Bar(tqdm):  # type: ignore[misc]
    monitor_interval = 0  # no thread: the bar moves when there is something new


def _progress(record: Record, total: int | None, unit: str) -> str:
    done, rate = float(record[unit]), float(record[f"{unit}_per_second"])
    share, left = f"{done:,.0f} {unit}", ""
    if total is not None:
        share = f"{100 * done / max(1, total):5.1f} %"
        left = f"  {timedelta(seconds=round(max(0.0, total - done) / rate)) if rate > 0 else '?'} left"
    loss, lr = float(record["loss"]), float(record["learning_rate"])
    return f"{share}  {rate:,.0f} {unit}/s  loss {loss:.4f}  lr {lr:.3g}{left}"


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    """Yields settings by names with dots: numbers, and texts of everything else; those that are None are left out."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif value is not None:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            yield prefix + name, value if is_number else str(value)


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _append(path: str, data: bytes) -> None:
    """Appends to a file, all of `data` or nothing."""
    with open(path, "ab", buffering=0, opener=_without_following) as file:
        size = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


def _without_following(path: str, flags: int) -> int:
    """Opens a file, and no other that a link in its place leads to."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _finite(value: float | int | str) -> float | int | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_up_to(step: int, line: bytes) -> bool:
    """Tells whether a line of JSON is whole and of no later step than `step`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    logged = record.get("step", 0) if isinstance(record, dict) else None
    return line.endswith(b"\n") and isinstance(logged, int) and logged <= step
