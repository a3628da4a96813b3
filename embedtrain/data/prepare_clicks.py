"""Preparation of a click log: the ranks read its files once and write records to a cache folder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from embedtrain.data.click_files import ClickFiles, describe_fault, plan_files, read_rows
from embedtrain.data.click_log import (
    DENSE,
    LABEL,
    ClickLayout,
    ClickLog,
    record_dtype,
    vocabulary_name,
)
from embedtrain.data.click_records import Moments, encode
from embedtrain.data.click_schema import CategoricalColumn, ClickSchema
from embedtrain.data.click_values import Examples, parse_rows
from embedtrain.data.prepared import META_NAME, prepared_entry
from embedtrain.data.readers import Fault, suffixes_of
from embedtrain.data.readers.blocks import Segment
from embedtrain.data.row_names import fingerprint_of
from embedtrain.data.sources import CHUNK_BYTES, Source, take_sources
from embedtrain.data.vocabulary import COUNTS_SCHEMA, WordCounts, WordRows, ordered
from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import UserError

_logger = logging.getLogger(__name__)

PART_BYTES = 8 << 20
_FORMAT_VERSION = 2
_FAULTS_SHOWN = 3
_LARGEST_NARROW = 1 << 31


@dataclass(frozen=True, kw_only=True)
class ClickOptions:
    """Says which click log to prepare and what its columns mean.

    Attributes:
        path: a file, a glob, a folder, or a list of them, on any fsspec URL.
        schema: the columns.
        max_bad_lines: maximum number of bad lines to skip; one more is an error.

    Raises:
        UserError: an option is out of range.
    """

    path: str | Sequence[str]
    schema: ClickSchema
    max_bad_lines: int = 0

    def __post_init__(self) -> None:
        if self.max_bad_lines < 0:
            raise UserError(f"max_bad_lines must be at least 0, got {self.max_bad_lines}")


@dataclass(frozen=True)
class ClickBase:
    """Holds what another run prepared its examples with, so that this run encodes its examples alike.

    Attributes:
        vocabularies: per column its values in row order, from row 1, and counts: `COUNTS_SCHEMA`.
        dense_mean: [num_dense] float64; see `ClickLayout`.
        dense_std: [num_dense] float64.
        takes_new: whether values that are not in the vocabularies get new rows after the existing ones.
    """

    vocabularies: Mapping[str, pa.Table]
    dense_mean: NDArray[np.float64]
    dense_std: NDArray[np.float64]
    takes_new: bool

    @property
    def facts(self) -> tuple[object, ...]:
        """Everything that the prepared examples depend on."""
        digest = xxhash.xxh3_128()
        for name, values in self.vocabularies.items():
            digest.update(f"{name!r} {fingerprint_of(values['word'])}".encode())
            digest.update(np.asarray(values["count"], np.int64).tobytes())
        return self.dense_mean.tolist(), self.dense_std.tolist(), self.takes_new, digest.hexdigest()


@dataclass(frozen=True)
class _Job:
    """Holds what a rank needs to do its part of a preparation in the folder `work_path`."""

    work_path: str
    options: ClickOptions
    files: ClickFiles
    ranks: Ranks
    like: ClickLayout | None
    base: ClickBase | None
    chunk_bytes: int

    @property
    def schema(self) -> ClickSchema:
        return self.options.schema

    @property
    def columns(self) -> tuple[CategoricalColumn, ...]:
        """The categorical columns in the order of a record: single-valued ones first."""
        return self.schema.single + self.schema.bags

    @property
    def with_vocabulary(self) -> dict[int, CategoricalColumn]:
        """The columns with a vocabulary, by their index."""
        return {number: column for number, column in enumerate(self.columns) if column.encoding == "vocabulary"}

    @property
    def my_parts(self) -> dict[int, list[Segment]]:
        """The parts of this rank, by their index."""
        rank, size = self.ranks.rank, self.ranks.size
        return {number: self.files.parts[number] for number in range(rank, len(self.files.parts), size)}

    def path(self, name: str) -> str:
        return os.path.join(self.work_path, name)


def prepare_clicks(
    options: ClickOptions,
    cache_path: str,
    ranks: Ranks,
    *,
    like: ClickLayout | None = None,
    base: ClickBase | None = None,
    part_bytes: int = PART_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
) -> ClickLog:
    """Returns a prepared click log from the cache, or prepares it on all ranks.

    A cache entry is named by a hash of the files' identities and the schema, so a changed file makes a new entry.
    The examples and their order do not depend on the number of ranks.

    Collective: every rank, with the same arguments.

    Args:
        cache_path: local folder that all ranks see, created if missing.
        like: log whose vocabularies, means and variances to reuse: a validation set uses those of the training set.
        base: vocabularies, means and variances of the run that this run starts from; None for a new run.
        part_bytes: minimum size of the parts into which files are divided among the ranks.
        chunk_bytes: approximate amount of text that a rank holds at a time.

    Raises:
        UserError: on every rank; a path or a file cannot be used, a column does not exist, or there are more bad
            lines than `max_bad_lines`.
        RuntimeError: a rank does not see the cache folder of the others.
    """
    schema = options.schema
    if base is not None:
        _require_room(base, schema)
    sources = ranks.run_on_first(lambda: take_sources(options.path, suffixes_of(schema.reader)))

    def prepare(work_path: str) -> None:
        files = plan_files(sources, schema, part_bytes, ranks)
        _prepare(_Job(work_path, options, files, ranks, like, base, chunk_bytes))

    log = prepared_entry(cache_path, _entry_name(sources, schema, like, base), ClickLog, prepare, ranks)
    if log.num_faults > options.max_bad_lines:
        # The entry was prepared when `max_bad_lines` was larger.
        raise UserError(
            f"{options.path} has {log.num_faults} bad lines, which exceeds data.max_bad_lines={options.max_bad_lines}"
        )
    return log


def _require_room(base: ClickBase, schema: ClickSchema) -> None:
    """Checks that no table has fewer rows than in the run that this run starts from."""
    for column in schema.categorical:
        if column.name in base.vocabularies and column.num_rows is not None:
            num_old = len(base.vocabularies[column.name]) + 1
            if column.num_rows < num_old:
                raise UserError(
                    f"column {column.name!r} has num_rows={column.num_rows}, and the run that this one starts from has "
                    f"{num_old:,} rows of it, which are all kept: give as many or more"
                )


def _prepare(job: _Job) -> None:
    """Counts values for the vocabularies, if any, and encodes the examples. Collective: every rank."""
    if job.with_vocabulary and job.like is None:
        job.ranks.run_on_each(lambda: _count_values(job))
        job.ranks.run_on_first(lambda: _build_vocabularies(job))
    vocabularies = job.ranks.run_on_each(lambda: _load_vocabularies(job))
    shards, faults = job.ranks.run_on_each(lambda: _write_shards(job, vocabularies))
    _check_faults(job, faults)
    gathered = job.ranks.all_gather((shards, len(faults)))
    all_shards = [shard for theirs, _ in gathered for shard in theirs]
    num_faults = sum(number for _, number in gathered)
    job.ranks.run_on_first(lambda: _write_contents(job, vocabularies, all_shards, num_faults))


def _read_part(part: list[Segment], job: _Job, faults: list[Fault]) -> Iterator[Examples]:
    for segment in part:
        columns = job.files.columns[segment.source.url]
        for raw in read_rows(segment, job.schema, columns, faults, job.chunk_bytes):
            examples, wrong = parse_rows(raw, job.schema, segment.source.url)
            faults += [Fault(segment, line, reason) for line, reason in wrong.items()]
            yield examples
            if len(faults) > job.options.max_bad_lines:
                raise UserError(_refusal(faults, job, "at least "))


def _refusal(faults: Sequence[Fault], job: _Job, at_least: str = "") -> str:
    shown = "; ".join(describe_fault(fault, job.schema) for fault in faults[:_FAULTS_SHOWN])
    return (
        f"{shown}. {at_least}{len(faults)} bad lines exceed data.max_bad_lines="
        f"{job.options.max_bad_lines}: correct them, or raise data.max_bad_lines to skip them"
    )


def _check_faults(job: _Job, faults: list[Fault]) -> None:
    """Refuses a log with too many bad lines over all ranks, else warns of them. Collective: every rank."""
    found = [fault for theirs in job.ranks.all_gather(faults) for fault in theirs]

    def check() -> None:
        if len(found) > job.options.max_bad_lines:
            raise UserError(_refusal(found, job))
        if found:
            shown = "; ".join(describe_fault(fault, job.schema) for fault in found[:_FAULTS_SHOWN])
            _logger.warning(f"skipped {len(found)} bad lines, for example {shown}")

    job.ranks.run_on_first(check)


def _count_values(job: _Job) -> None:
    """Writes this rank's counts of the values of each column with a vocabulary."""
    counts = {number: WordCounts() for number in job.with_vocabulary}
    faults: list[Fault] = []
    for part in job.my_parts.values():
        for examples in _read_part(part, job, faults):
            for number, column in job.with_vocabulary.items():
                counts[number].add(examples.categorical[column.name].values.cast(pa.large_binary()))
    for number, counted in counts.items():
        _write_arrow(job.path(_counts_name(number, job.ranks.rank)), counted.table())


def _build_vocabularies(job: _Job) -> None:
    """Adds up the ranks' counts, saves the vocabularies, and removes the counts."""
    for number, column in job.with_vocabulary.items():
        counts = WordCounts()
        for rank in range(job.ranks.size):
            path = job.path(_counts_name(number, rank))
            with pa.OSFile(path, "rb") as file:
                counts.merge(pa.ipc.open_file(file).read_all())
            os.remove(path)
        counted = counts.table()
        limit = None if column.num_rows is None else column.num_rows - 1
        old = None if job.base is None else job.base.vocabularies[column.name]
        if old is not None:
            is_old = pc.is_in(counted["word"], value_set=old["word"].combine_chunks())
            old, counted = _added_up(old, counted.filter(is_old)), counted.filter(pc.invert(is_old))
        if job.base is not None and not job.base.takes_new:
            counted = counted.slice(0, 0)
        kept = ordered(counted.filter(pc.greater_equal(counted["count"], column.min_count)))
        if old is not None:
            kept = pa.concat_tables([old, kept])
        _write_arrow(job.path(vocabulary_name(number)), kept.slice(0, limit))


def _added_up(values: pa.Table, counted: pa.Table) -> pa.Table:
    """Returns `values` in their order with the counts of `counted` added; `counted` holds each value at most once."""
    places = np.asarray(pc.index_in(counted["word"], value_set=values["word"].combine_chunks())).astype(np.int64)
    counts = np.asarray(values["count"], np.int64).copy()
    counts[places] += np.asarray(counted["count"])
    return pa.table([values["word"], pa.array(counts)], schema=COUNTS_SCHEMA)


def _load_vocabularies(job: _Job) -> dict[str, WordRows]:
    """Returns the vocabulary of each column that has one; a value's row is its place in it plus 1."""
    loaded = {}
    for number, column in job.with_vocabulary.items():
        if job.like is not None:
            table = job.like.vocabulary(column.name)
            assert table is not None
        else:
            with pa.OSFile(job.path(vocabulary_name(number)), "rb") as file:
                table = pa.ipc.open_file(file).read_all()
        loaded[column.name] = WordRows(table["word"].combine_chunks())
    return loaded


def _num_rows(job: _Job, vocabularies: Mapping[str, WordRows]) -> dict[str, int]:
    return {column.name: column.num_rows or len(vocabularies[column.name]) + 1 for column in job.columns}


def _write_shards(job: _Job, vocabularies: Mapping[str, WordRows]) -> tuple[list[dict[str, Any]], list[Fault]]:
    """Writes the records of this rank's parts; returns their entries in the table of contents, and the bad lines."""
    schema = job.schema
    shards: list[dict[str, Any]] = []
    faults: list[Fault] = []
    is_wide = max(_num_rows(job, vocabularies).values()) > _LARGEST_NARROW
    dtype = record_dtype(len(schema.dense), len(schema.single), len(schema.bags), is_wide)
    for number, part in job.my_parts.items():
        names = {"examples": f"examples-{number:05d}.bin", "values": f"values-{number:05d}.bin"}
        digest, moments = xxhash.xxh3_128(), Moments(len(schema.dense))
        num_examples = num_positives = num_values = 0
        with open(job.path(names["examples"]), "wb") as example_file, open(job.path(names["values"]), "wb") as file:
            for examples in _read_part(part, job, faults):
                records, values = encode(examples, schema, vocabularies, dtype, num_values)
                moments.add(records[DENSE])
                for target, data in ((example_file, records.tobytes()), (file, values.tobytes())):
                    target.write(data)
                    digest.update(data)
                num_examples += len(records)
                num_positives += int(records[LABEL].sum())
                num_values += len(values)
        facts = {"num_examples": num_examples, "num_positives": num_positives, "num_values": num_values}
        shards.append({**names, **facts, "moments": moments.as_json(), "xxh3": digest.hexdigest()})
    return shards, faults


def _write_contents(
    job: _Job, vocabularies: Mapping[str, WordRows], shards: list[dict[str, Any]], num_faults: int
) -> None:
    shards = sorted(shards, key=lambda shard: str(shard["examples"]))
    moments = Moments(len(job.schema.dense))
    for shard in shards:
        moments.merge(*map(np.array, shard["moments"]))
    if sum(shard["num_examples"] for shard in shards) == 0:
        raise UserError(f"{job.options.path}: the click log has no usable line")
    mean, std = moments.mean, moments.std
    if job.like is not None:
        mean, std = job.like.dense_mean, job.like.dense_std
    elif job.base is not None:
        mean, std = job.base.dense_mean, job.base.dense_std
    num_rows = _num_rows(job, vocabularies)
    vocabulary_fingerprint = _fingerprint(vocabularies) if job.like is None else job.like.vocabulary_fingerprint
    facts = {
        "vocabulary_fingerprint": vocabulary_fingerprint,
        "num_rows": num_rows,
        "is_wide": max(num_rows.values()) > _LARGEST_NARROW,
        "dense": job.schema.dense,
        "dense_mean": mean.tolist(),
        "dense_std": std.tolist(),
        "single": [column.name for column in job.schema.single],
        "bags": [column.name for column in job.schema.bags],
    }
    content = [shard["xxh3"] for shard in shards], sorted(facts.items())
    meta = {
        "format_version": _FORMAT_VERSION,
        "fingerprint": xxhash.xxh3_128_hexdigest(repr(content).encode()),
        "schema": asdict(job.schema),
        "sources": sorted({segment.source.identity for part in job.files.parts for segment in part}),
        "num_faults": num_faults,
        **facts,
        "shards": shards,
    }
    with open(job.path(META_NAME), "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)


def _fingerprint(vocabularies: Mapping[str, WordRows]) -> str:
    digest = xxhash.xxh3_128()
    for name, rows in vocabularies.items():
        for value in (name, *rows.words.to_pylist()):
            digest.update(repr(value).encode())
    return digest.hexdigest()


def _write_arrow(path: str, table: pa.Table) -> None:
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, COUNTS_SCHEMA) as writer:
        writer.write_table(table.cast(COUNTS_SCHEMA))


def _entry_name(
    sources: Sequence[Source], schema: ClickSchema, like: ClickLayout | None, base: ClickBase | None
) -> str:
    facts = (
        _FORMAT_VERSION,
        [source.identity for source in sources],
        schema.facts,
        None if like is None else (like.vocabulary_fingerprint, like.dense_mean.tolist(), like.dense_std.tolist()),
    )
    named = facts if base is None else (*facts, base.facts)
    return f"clicks-{xxhash.xxh3_64_hexdigest(repr(named).encode())}"


def _counts_name(number: int, rank: int) -> str:
    return f"counts-{number:03d}-{rank:05d}.arrow"
