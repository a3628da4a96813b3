"""Prepares a text for training, once: the ranks count its words, then write their ids to a cache folder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from embedtrain.data.corpus import TOKEN_DTYPE, VOCABULARY_NAME, PreparedCorpus
from embedtrain.data.prepared import META_NAME, prepared_entry
from embedtrain.data.readers import FORMATS
from embedtrain.data.readers.blocks import Segment, plan_parts, read_chunks
from embedtrain.data.seal import Unverified
from embedtrain.data.sources import CHUNK_BYTES, Source, suffix_of, take_sources
from embedtrain.data.text import TOKENIZERS, encode, lost_words, tokenize
from embedtrain.data.vocabulary import COUNTS_SCHEMA, Vocabulary, WordCounts, WordRows
from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import UserError, counted, printable

_logger = logging.getLogger(__name__)

OnProgress = Callable[[str, float], None]

PART_BYTES = 2 << 20
_FORMAT_VERSION = 1
_HEAD_BYTES = 1 << 16
_MANY_LOST = 0.2
_LONG_WORD_BYTES = 10_000
_SHOWN_BYTES = 40
"""Share of the words of an ordinary text that hold digits or underscores, with room to spare: 2 to 5 % of articles'."""


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """What to train on, and what counts as a word.

    Attributes:
        path: a file, a glob, a folder, or several of them, on any fsspec URL.
        tokenizer: a name in `TOKENIZERS`.
        min_count: words that are seen less often are left out.
        max_vocab_size: at most so many words are kept, the most frequent ones; None for all.
        base_vocabulary: a file of words that are kept however seldom they are in the text, and whose counts are added
            to the text's; None for none.

    Raises:
        UserError: an option is out of range.
    """

    path: str | Sequence[str]
    tokenizer: str = "letters"
    min_count: int = 5
    max_vocab_size: int | None = None
    base_vocabulary: str | None = None

    def __post_init__(self) -> None:
        if self.tokenizer not in TOKENIZERS:
            raise UserError(f"tokenizer: expected one of {', '.join(TOKENIZERS)}, got {self.tokenizer!r}")
        if self.min_count < 1:
            raise UserError(f"min_count: expected at least 1, got {self.min_count}")
        if self.max_vocab_size is not None and self.max_vocab_size < 1:
            given = self.max_vocab_size
            raise UserError(f"max_vocab_size: expected at least 1, or null for all, got {given}")

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a tuple."""
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)


@dataclass(frozen=True)
class _Job:
    """What a rank needs to know to do its share of a preparation in the folder `work_path`."""

    work_path: str
    options: CorpusOptions
    base: Vocabulary | None
    parts: Sequence[Sequence[Segment]]
    ranks: Ranks
    on_progress: OnProgress | None
    chunk_bytes: int

    @property
    def my_parts(self) -> dict[int, Sequence[Segment]]:
        """The parts of this rank, by their number; every `world_size`-th, so that all kinds of file mix."""
        rank, size = self.ranks.rank, self.ranks.size
        return {number: self.parts[number] for number in range(rank, len(self.parts), size)}

    def path(self, name: str) -> str:
        return os.path.join(self.work_path, name)


def prepare_corpus(
    options: CorpusOptions,
    cache_path: str,
    ranks: Ranks,
    *,
    unverified_sources: Unverified = (),
    on_progress: OnProgress | None = None,
    part_bytes: int = PART_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
) -> PreparedCorpus:
    """Returns the prepared form of a text, which the ranks make together unless the cache holds it.

    An entry of the cache is named by a hash of the sources' identities and of the options, so a source that
    changed makes a new one. It is written under another name and renamed when it is complete: a preparation
    that was killed is done again. The tokens are the same for every number of ranks.

    Collective: every rank calls, with the same arguments.

    Args:
        cache_path: local folder, made if missing. All ranks must see the same one: on several hosts it must
            be on a file system that they share.
        unverified_sources: what of the sources was prepared itself, and is not verified; see `Baskets`.
        on_progress: called with what is done and the fraction of this rank's share that is.
        part_bytes: ranks take the text in parts of at least this size; a compressed file is never divided.
        chunk_bytes: about how much text a rank holds at a time.

    Raises:
        UserError: on every rank, whichever found it: a path or a file of text that cannot be used, an empty
            vocabulary, a cache folder that is not local or may not be written.
        RuntimeError: a rank does not see the cache folder of the others.
    """
    sources = ranks.run_on_first(lambda: _take_texts(options))
    base = ranks.run_on_each(lambda: _load_base(options))

    def prepare(work_path: str) -> None:
        ranks.run_on_first(lambda: _warn_of_lost_words(sources, options))
        parts = plan_parts(sources, part_bytes)
        _prepare(_Job(work_path, options, base, parts, ranks, on_progress, chunk_bytes))

    name = _entry_name(sources, _tokenization(options, base))

    def open_entry(path: str, unverified: Unverified) -> PreparedCorpus:
        return PreparedCorpus(path, (*unverified_sources, *unverified))

    return prepared_entry(cache_path, name, open_entry, prepare, ranks)


def _take_texts(options: CorpusOptions) -> list[Source]:
    """Returns the files, and warns of those whose names are those of rows: their column names would become words."""
    sources = take_sources(options.paths)
    for name in ("csv", "tsv", "jsonl"):
        rows = [source.url for source in sources if suffix_of(source.url) in FORMATS[name].suffixes]
        if rows:
            _logger.warning(
                f"{', '.join(rows[:3])}: read as text, names of columns and all, although the name is one of {name}: "
                f"for sentences of items give data.format={name}, with data.basket_column and data.item_column"
            )
    return sources


def _prepare(job: _Job) -> None:
    """Collective: counts, agrees on the vocabulary, and encodes."""
    job.ranks.run_on_each(lambda: _count_words(job))
    job.ranks.run_on_first(lambda: _build_vocabulary(job))
    vocabulary = job.ranks.run_on_each(lambda: Vocabulary.load(job.path(VOCABULARY_NAME)))
    rows = WordRows(vocabulary.utf8_words)
    my_shards = job.ranks.run_on_each(lambda: _write_shards(job, rows))
    shards = [shard for theirs in job.ranks.all_gather(my_shards) for shard in theirs]
    job.ranks.run_on_first(lambda: _write_contents(job, vocabulary, shards))


def _count_words(job: _Job) -> None:
    counts = WordCounts()
    progress = _Progress("count words", job)
    for part in job.my_parts.values():
        for tokens in tokenize(_chunks(part, job, progress), job.options.tokenizer):
            counts.add(tokens.words)
    path = job.path(_counts_name(job.ranks.rank))
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, COUNTS_SCHEMA) as writer:
        writer.write_table(counts.table())


def _build_vocabulary(job: _Job) -> None:
    """Adds up the ranks' counts, saves the vocabulary, and removes the counts."""
    counts = WordCounts()
    for rank in range(job.ranks.size):
        with pa.OSFile(job.path(_counts_name(rank)), "rb") as file:
            counts.merge(pa.ipc.open_file(file).read_all())
        os.remove(job.path(_counts_name(rank)))
    options = job.options
    _warn_of_long_words(counts.table())
    try:
        build = Vocabulary.build if job.base is None else job.base.extended
        vocabulary = build(counts.table(), options.min_count, options.max_vocab_size)
    except UserError as error:
        raise UserError(f"{', '.join(options.paths)}: {error}{_hint(counts.table(), options)}") from error
    vocabulary.save(job.path(VOCABULARY_NAME))


def _write_shards(job: _Job, rows: WordRows) -> list[dict[str, Any]]:
    """Writes a file of tokens for each part of this rank; returns what the table of contents says of each."""
    shards = []
    progress = _Progress("encode words", job)
    for number, part in job.my_parts.items():
        name = f"tokens-{number:05d}.bin"
        num_tokens = num_sentences = 0
        digest = xxhash.xxh3_128()
        with open(job.path(name), "wb") as file:
            for tokens in encode(tokenize(_chunks(part, job, progress), job.options.tokenizer), rows):
                data = tokens.astype(TOKEN_DTYPE).tobytes()
                file.write(data)
                digest.update(data)
                num_tokens += len(tokens)
                num_sentences += int((tokens < 0).sum())
        facts = {"num_tokens": num_tokens, "num_sentences": num_sentences, "xxh3": digest.hexdigest()}
        shards.append({"name": name, **facts})
    return shards


def _write_contents(job: _Job, vocabulary: Vocabulary, shards: list[dict[str, Any]]) -> None:
    if not sum(shard["num_tokens"] for shard in shards):
        raise UserError(
            f"{', '.join(job.options.paths)}: none of its words is in the vocabulary: no known word, and no new one "
            f"that stands there data.min_count={job.options.min_count} times"
        )
    shards = sorted(shards, key=lambda shard: str(shard["name"]))
    content = [shard["xxh3"] for shard in shards], vocabulary.fingerprint, _tokenization(job.options, job.base)
    meta = {
        "format_version": _FORMAT_VERSION,
        "fingerprint": xxhash.xxh3_128_hexdigest(repr(content).encode()),
        "options": asdict(job.options),
        "sources": sorted({segment.source.identity for part in job.parts for segment in part}),
        "shards": shards,
    }
    with open(job.path(META_NAME), "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)


def _chunks(part: Sequence[Segment], job: _Job, progress: _Progress) -> Iterator[bytes]:
    """Reads a part; a segment ends with a line even where its file does not."""
    for segment in part:
        chunk = b"\n"
        for chunk in read_chunks(
            segment.source, segment.start, segment.stop, chunk_bytes=job.chunk_bytes, on_read=progress.add
        ):
            yield chunk
        if not chunk.endswith(b"\n"):
            yield b"\n"


class _Progress:
    """Tells how much of this rank's share of a stage is done."""

    def __init__(self, stage: str, job: _Job) -> None:
        segments = (segment for part in job.my_parts.values() for segment in part)
        self._stage, self._on_progress = stage, job.on_progress
        self._total_bytes = sum(segment.stop - segment.start for segment in segments)
        self._done_bytes = 0

    def add(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if self._on_progress is not None:
            self._on_progress(self._stage, min(1.0, self._done_bytes / self._total_bytes))


def _hint(counts: pa.Table, options: CorpusOptions) -> str:
    """Returns what to do about a text without words."""
    if len(counts) > 0 or options.tokenizer != "letters":
        return ""
    return " of letters; data.tokenizer=whitespace takes what stands between spaces, such as numbers"


def _warn_of_lost_words(sources: Sequence[Source], options: CorpusOptions) -> None:
    """Warns of a text whose words are ids: the tokenizer `letters` cuts or drops them."""
    if options.tokenizer != "letters":
        return
    source = sources[0]
    head = next(iter(read_chunks(source, 0, source.size_bytes, chunk_bytes=_HEAD_BYTES)), b"")
    share, example = lost_words(head[:_HEAD_BYTES])
    if share > _MANY_LOST:
        _logger.warning(
            f"{source.url}: {share:.0%} of its first words are like {example!r}, of which data.tokenizer=letters keeps "
            "the letters alone, lower-cased, and nothing of a number: data.tokenizer=whitespace keeps them as they are"
        )


def _warn_of_long_words(counts: pa.Table) -> None:
    """Warns of words that no language has: they cost memory, and mostly mean that the files are not such text."""
    if not len(counts):
        return
    sizes = pc.binary_length(counts["word"])
    longest = pc.max(sizes).as_py()
    if longest <= _LONG_WORD_BYTES:
        return
    num_long = pc.sum(pc.greater(sizes, _LONG_WORD_BYTES)).as_py()
    word = counts["word"][pc.index(sizes, longest).as_py()].as_buffer()
    beginning = printable(bytes(word[:_SHOWN_BYTES]).decode(errors="replace"))
    _logger.warning(
        f"{counted(num_long, 'word')} of over {_LONG_WORD_BYTES:,} bytes; the longest has {longest:,} and begins with "
        f"{beginning}: does white space part the words of this text?"
    )


def _load_base(options: CorpusOptions) -> Vocabulary | None:
    return None if options.base_vocabulary is None else Vocabulary.load_base(options.base_vocabulary)


def _entry_name(sources: Sequence[Source], tokenization: tuple[Any, ...]) -> str:
    facts = _FORMAT_VERSION, [source.identity for source in sources], tokenization
    return f"corpus-{xxhash.xxh3_64_hexdigest(repr(facts).encode())}"


def _tokenization(options: CorpusOptions, base: Vocabulary | None) -> tuple[Any, ...]:
    own = options.tokenizer, options.min_count, options.max_vocab_size
    return own if base is None else (*own, base.fingerprint)


def _counts_name(rank: int) -> str:
    return f"counts-{rank:05d}.arrow"
