"""Sinks that write metrics to a JSON lines file, TensorBoard or the console. Only rank 0 has sinks."""

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
from embedtrain.errors import UserError, counted
from embedtrain.metrics.names import as_words, is_progress, quality_names, split_name

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_logger = logging.getLogger(__name__)

Record = Mapping[str, float | int | str]
T = TypeVar("T")

RunEnd = Literal["finished", "failed", "preempted"]
"""How a run ended: completely, by an error, or by a request to stop. A failed or preempted run may be resumed."""


@dataclass(frozen=True)
class Histogram:
    """Holds the number of values per bin.

    Attributes:
        edges: [n + 1], rising; bounds of the bins.
        counts: [n]; number of values in each bin.
    """

    edges: Sequence[float]
    counts: Sequence[float]


class MetricSink(Protocol):
    """Receives the records of a run; a record is a mapping of names to values that includes `step`."""

    def log(self, record: Record) -> None:
        """Receives one record."""

    def flush(self) -> None:
        """Writes buffered records; called before each checkpoint."""

    def close(self, end: RunEnd) -> None:
        """Writes buffered records and reports how the run ended."""


class JsonlSink:
    """Appends each record to a file as one line of JSON; numbers that are not finite become null.

    A local file gets each line at once. Object stores cannot append, so there the whole file is rewritten: at most
    every 30 seconds, and by `flush` and `close`. A killed process loses the lines after the last write.

    If a write fails, for example because the disk is full, training continues: a warning is logged, and the lines are
    written with the next record.

    Args:
        path: the file, any fsspec URL.
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
        """Appends a record."""
        line = json.dumps({name: _finite(value) for name, value in record.items()}, allow_nan=False)
        self._pending += line.encode() + b"\n"
        if self._local_path or time.monotonic() - self._uploaded_at >= self._UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the buffered lines."""
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
            _logger.warning(f"cannot write metrics; {counted(count, 'record')} kept for the next attempt: {error}")
        else:
            self._pending = b""
        self._uploaded_at = time.monotonic()

    def truncate_after(self, step: int) -> None:
        """Removes the lines after `step`, which a resumed run logs again, and an incomplete last line."""
        self.flush()
        text = self._read()
        kept = b"".join(line for line in text.splitlines(keepends=True) if _is_up_to(step, line))
        if kept != text:
            storage.replace(self._url, kept, f"{self._url}.partial")
        self._uploaded = b"" if self._local_path else kept

    def close(self, end: RunEnd = "finished") -> None:
        """Writes the buffered lines."""
        self.flush()

    def _read(self) -> bytes:
        try:
            return storage.read(self._url)
        except FileNotFoundError:
            return b""


class Guarded(Generic[T]):
    """Holds the writer of a tracker, and drops it with a warning after its first error, so that the run continues.

    Args:
        tracker: name of the tracker in the warning.
        make: creates the writer.
        close: closes the writer.
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
        except Exception as error:  # the writer's thread may raise any type of error
            self._warn(error)
            writer, self._writer = self._writer, None
            with suppress(Exception):
                self._close(writer)

    def close(self) -> None:
        """Closes the writer."""
        self.use(self._close)

    def _warn(self, error: Exception) -> None:
        text = " ".join(str(error).split())
        _logger.warning(f"{self._tracker} gets no more records of this run: {type(error).__name__}: {text}")


def board_tag(name: str, names: Collection[str]) -> str:
    """Returns the tag of a number in TensorBoard.

    TensorBoard sorts groups alphabetically, capitals first. So the groups `Loss` and `Quality` come first, and those
    of internals and progress follow.

    Args:
        name: name of the number.
        names: names of all numbers in the record; counters are recognised by them.
    """
    if name not in quality_names(names):
        return f"progress/{name}" if is_progress(name) or "/" not in name else name
    return f"{'Loss' if split_name(name)[0] == 'loss' else 'Quality'}/{name}"


class TensorBoardSink:
    """Writes the numbers of records as TensorBoard scalars; values that are texts are left out.

    TensorBoard shows the losses and the measures of the model first; see `board_tag`.

    Args:
        folder: a local folder.
        purge_step: TensorBoard hides values that were written earlier for this step or later steps. For a resumed run
            this is its first step; None hides nothing.

    Raises:
        UserError: the folder is not local.
    """

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        path = storage.local_path(folder)
        if path is None:
            raise UserError(f"TensorBoard appends to its files and needs a local folder, got {folder!r}")
        from torch.utils.tensorboard import SummaryWriter  # the import takes a second, and few runs need it

        self._writer = Guarded(
            "TensorBoard", lambda: SummaryWriter(path, purge_step=purge_step), lambda writer: writer.close()
        )

    def log(self, record: Record) -> None:
        """Writes the numbers of a record at its step."""

        def use(writer: SummaryWriter) -> None:
            for name, value in record.items():
                if name != "step" and not isinstance(value, str):
                    writer.add_scalar(board_tag(name, record), value, record["step"])

        self._writer.use(use)

    def flush(self) -> None:
        """Writes the buffered events."""
        self._writer.use(lambda writer: writer.flush())

    def log_settings(self, run: str, settings: Mapping[str, Any], measures: Sequence[str]) -> None:
        """Writes the settings for TensorBoard's HPARAMS table, and charts with training and held-out data together.

        Args:
            run: name of the run in the table.
            settings: settings by name; nested mappings become dotted names, lists become texts.
            measures: names of the numbers to show beside the settings.
        """
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

        tags = {name: board_tag(name, measures) for name in measures}
        charts: dict[str, list[str]] = {}
        for name, tag in tags.items():
            charts.setdefault(as_words(split_name(name)[0]), []).append(f"^{re.escape(tag)}$")

        def use(writer: SummaryWriter) -> None:
            experiment, start, end = hparams(dict(flat(settings)), dict.fromkeys(tags.values(), 0.0))
            # The table names a run by its group. torch sets no group name, and then a hash of the settings is shown.
            told = start.value[0].metadata.plugin_data
            named = HParamsPluginData.FromString(told.content)
            named.session_start_info.group_name = run
            told.content = named.SerializeToString()
            for part in (experiment, start, end):
                writer._get_file_writer().add_summary(part)
            writer.add_custom_scalars({"Quality": {name: ["Multiline", found] for name, found in charts.items()}})

        self._writer.use(use)

    def log_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Writes a histogram, if it has any values."""
        filled = [place for place, count in enumerate(histogram.counts) if count]
        if not filled:
            return
        # TensorBoard draws all bins from the lowest edge on: empty bins at both ends would only widen the chart.
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
        """Writes the buffered events and closes the writer."""
        self._writer.close()


class ConsoleSink:
    """Shows progress on the console: as a bar on a terminal, else as a line every `every_seconds`.

    With the unit `words`, a training record has the keys `words` (the count trained so far, over all epochs),
    `words_per_second`, `loss` and `learning_rate`. Each record without the key `words`, such as an evaluation, is
    printed as a line.

    Args:
        stream: destination of the output.
        total: number of units to train on, over all epochs; None if it is unknown, as for streamed data.
        unit: what is counted, such as "words".
        every_seconds: seconds between two lines of progress if the stream is not a terminal.
    """

    def __init__(self, stream: TextIO, total: int | None, unit: str = "words", every_seconds: float = 10.0) -> None:
        self._stream = stream
        self._total = total
        self._unit = unit
        self._every_seconds = every_seconds
        self._bar: _Bar | None = None  # made with the first progress on a terminal
        self._shown_at = -math.inf
        self._held_back = ""  # without a terminal, the newest line of progress that is not yet printed

    def log(self, record: Record) -> None:
        """Shows a record."""
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
        """Does nothing, because nothing reads the console's output after a crash."""

    def close(self, end: RunEnd = "finished") -> None:
        """Prints the pending line of progress, and closes the bar so that later output begins on a new line."""
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
        """Prints lines, after the pending line of progress and above the bar."""
        for line in [self._held_back, *lines] if self._held_back else lines:
            if self._bar is not None:
                self._bar.write(line, file=self._stream)
            else:
                self._stream.write(line + "\n")
        self._stream.flush()
        self._held_back = ""


class _Bar(tqdm):  # type: ignore[misc]
    monitor_interval = 0  # no monitor thread, because each record moves the bar


def _progress(record: Record, total: int | None, unit: str) -> str:
    done, rate = float(record[unit]), float(record[f"{unit}_per_second"])
    share, left = f"{done:,.0f} {unit}", ""
    if total is not None:
        share = f"{100 * done / max(1, total):5.1f} %"
        left = f"  {timedelta(seconds=round(max(0.0, total - done) / rate)) if rate > 0 else '?'} left"
    loss, lr = float(record["loss"]), float(record["learning_rate"])
    return f"{share}  {rate:,.0f} {unit}/s  loss {loss:.4f}  lr {lr:.3g}{left}"


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    """Yields settings by dotted names: numbers as they are, other values as texts. Values of None are left out."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif value is not None:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            yield prefix + name, value if is_number else str(value)


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _append(path: str, data: bytes) -> None:
    """Appends all of `data` to a file, or nothing if it fails."""
    with open(path, "ab", buffering=0, opener=_without_following) as file:
        size = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


def _without_following(path: str, flags: int) -> int:
    """Opens a file, and fails if the path is a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _finite(value: float | int | str) -> float | int | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_up_to(step: int, line: bytes) -> bool:
    """Returns whether a line of JSON is complete and belongs to `step` or an earlier step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    logged = record.get("step", 0) if isinstance(record, dict) else None
    return line.endswith(b"\n") and isinstance(logged, int) and logged <= step
