"""Scores with a packaged model. Needs only this file, torch and NumPy, and pyarrow to read Parquet.

    python PACKAGE/scorer.py --data rows.csv --keep id > scores.csv

    from scorer import Scorer
    scorer = Scorer("PACKAGE")
    probabilities = scorer.score([{"age": 39, "country": "Peru"}, {"age": "40", "country": None}])

`Retriever` opens the package of a retrieval model; it returns users' vectors and the best items for a vector.

Rows are encoded exactly as in training. A row that training would count as a bad line gets the score NaN; pass a
dict to `score` to collect the reasons.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FORMAT, VERSION, MANIFEST_NAME = "embedtrain package", 1, "manifest.json"
CHUNK_ROWS = 8192

_MAX_ID = (1 << 63) - 1
_MAX_FLOAT = float(np.finfo(np.float32).max)
_MAX_MEMO, _ITEMS_AT_ONCE = 1 << 17, 1 << 15
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|infinity|nan)", re.IGNORECASE)
_HEXADECIMAL = re.compile(r"[0-9a-fA-F]*")
_DTYPES = {"F32": np.float32, "BF16": np.int16, "I8": np.int8, "U8": np.uint8, "I64": np.int64, "U64": np.uint64}

Row = Mapping[str, Any]
Faults = dict[int, str]


class Scorer:
    """Scores rows with a packaged ranking model; its tables are memory-mapped.

    Args:
        path: folder of the package.

    Raises:
        ValueError: the folder is not a package, or has a newer format.
    """

    def __init__(self, path: str) -> None:
        self.manifest = read_manifest(path, "ranking")
        facts = self.manifest
        self._dense: list[str] = facts["dense"]
        self._mean, self._std = np.array(facts["dense_mean"]), np.array(facts["dense_std"])
        self._features = [_Feature(path, each) for each in facts["features"]]
        self._memo: dict[str, float] = {}
        self._network = torch.export.load(str(Path(path, facts["network"]))).module()

    @property
    def columns(self) -> list[str]:
        """Names of the columns that the model reads."""
        return list(dict.fromkeys([*self._dense, *(feature.name for feature in self._features)]))

    def score(self, rows: Iterable[Row], faults: Faults | None = None) -> NDArray[np.float32]:
        """Returns [n] float32: the probability of each row; NaN for a bad row.

        Args:
            rows: values by column: texts, numbers, None, or lists of them for bags. An absent column is a missing
                value; other columns are ignored.
            faults: filled with the reason per bad row, by its index.
        """
        found: Faults = {} if faults is None else faults
        scores = [np.zeros(0, np.float32)]
        iterator, start = iter(rows), 0
        while chunk := list(islice(iterator, CHUNK_ROWS)):
            own: Faults = {}
            scores.append(self._score(chunk, own))
            found.update({start + place: reason for place, reason in own.items()})
            start += len(chunk)
        return np.concatenate(scores)

    @torch.no_grad()
    def _score(self, rows: Sequence[Row], faults: Faults) -> NDArray[np.float32]:
        self._memo = {} if len(self._memo) > _MAX_MEMO else self._memo
        numbers = np.zeros((len(rows), len(self._dense)), np.float32)
        for place, name in enumerate(self._dense):
            numbers[:, place] = _numbers([row.get(name) for row in rows], name, faults, self._memo)
        ids = [feature.ids([row.get(feature.name) for row in rows], faults) for feature in self._features]
        vectors = [feature.vectors(*each) for feature, each in zip(self._features, ids, strict=True)]
        if self.manifest["dense_transform"] == "log1p":
            numbers = np.copysign(np.log1p(np.abs(numbers)), numbers)
        normalised = np.nan_to_num((numbers - self._mean) / self._std).astype(np.float32)
        dense = torch.from_numpy(normalised)
        if len(rows) == 1:  # The exported program needs at least two rows.
            dense, vectors = dense.repeat(2, 1), [each.repeat(2, 1) for each in vectors]
        scores = self._network(dense, vectors).sigmoid().numpy()[: len(rows)].copy()
        scores[list(faults)] = np.nan
        return scores  # type: ignore[no-any-return]


class Retriever:
    """Recommends items with a packaged retrieval model; its tables are memory-mapped. See `Scorer`."""

    def __init__(self, path: str, model: str = "retrieval") -> None:
        self.manifest = read_manifest(path, model)
        sides = self.manifest["sides"].items()
        self._sides = {side: (Table(path, each["table"]), Vocabulary(path, each["names"])) for side, each in sides}

    def user_vectors(self, users: Sequence[str | int]) -> Tensor:
        """Returns the vectors [n, dim] of users by raw id, whole numbers as text; ValueError for an unknown user."""
        return self._vectors("user", users)

    def _vectors(self, side: str, ids: Sequence[str | int]) -> Tensor:
        table, names = self._sides[side]
        rows = names.rows([str(each).encode() for each in ids]) - 1
        if len(rows) and rows.min() < 0:
            raise ValueError(f"{side} {ids[int(rows.argmin())]!r} is not in the training data")
        return table.rows(rows)

    @torch.no_grad()
    def top(self, vectors: Tensor, k: int = 10) -> list[list[tuple[str, float]]]:
        """Returns for each of the vectors [n, dim] its `k` best items with their scores, best first."""
        scores, items = vectors.new_zeros(len(vectors), 0), torch.zeros(len(vectors), 0, dtype=torch.int64)
        table, item_names = self._sides["item"]
        for start in range(0, table.num_rows, _ITEMS_AT_ONCE):
            ids = np.arange(start, min(start + _ITEMS_AT_ONCE, table.num_rows))
            both = torch.cat([scores, vectors @ table.rows(ids).T], dim=1)
            names = torch.cat([items, torch.from_numpy(ids).expand(len(vectors), -1)], dim=1)
            # A stable sort keeps the order of items with equal scores.
            order = both.argsort(dim=1, descending=True, stable=True)[:, :k]
            scores, items = both.gather(1, order), names.gather(1, order)
        return [
            [(item_names.text(item).decode(), score) for item, score in zip(own_items, own_scores, strict=True)]
            for own_items, own_scores in zip(items.tolist(), scores.tolist(), strict=True)
        ]


class _Feature:
    """Encodes a categorical column as rows of a table and looks up their vectors."""

    def __init__(self, path: str, facts: Mapping[str, Any]) -> None:
        self.name: str = facts["name"]
        self._facts = facts
        self._table = Table(path, facts["table"])
        self._vocabulary = Vocabulary(path, facts["vocabulary"]) if facts["encoding"] == "vocabulary" else None
        self._memo: dict[str, int] = {}

    def ids(self, values: Sequence[Any], faults: Faults) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Returns the table rows of a column's values, and for bags the number of rows per example."""
        if not self._facts["bag"]:
            return self._rows(values, np.arange(len(values)), faults), None
        bags = [self._bag(value, place, faults) for place, value in enumerate(values)]
        lengths = np.array([len(bag) for bag in bags], np.int64)
        flat = [value for bag in bags for value in bag]
        return self._rows(flat, np.repeat(np.arange(len(bags)), lengths), faults), lengths

    def vectors(self, ids: NDArray[np.int64], lengths: NDArray[np.int64] | None) -> Tensor:
        """Returns [n, dim]: one vector per example, pooled for bags."""
        vectors = self._table.rows(ids)
        if lengths is None:
            return vectors
        sizes = torch.from_numpy(lengths)
        sums = torch.segment_reduce(vectors, "sum", lengths=sizes, unsafe=True, initial=0)
        return sums / sizes.clamp(min=1).unsqueeze(1) if self._facts["pooling"] == "mean" else sums

    def _bag(self, value: Any, place: int, faults: Faults) -> list[Any]:
        if isinstance(value, list | tuple | np.ndarray):
            return list(value)
        text = _text_of(value, self.name, place, faults)
        return text.split(self._facts["separator"]) if text else []

    def _rows(self, values: Sequence[Any], places: NDArray[np.int64], faults: Faults) -> NDArray[np.int64]:
        memo = self._memo = {} if len(self._memo) > _MAX_MEMO else self._memo
        rows = _remembered(values, memo)
        new = [at for at, row in enumerate(rows) if row is None] if None in rows else []
        for at, row in zip(new, self._new_rows([values[at] for at in new], places[new].tolist(), faults), strict=True):
            rows[at] = row
            if values[at].__class__ is str and places[at] not in faults:
                memo[values[at]] = row
        return np.array(rows, np.int64)

    def _new_rows(self, values: Sequence[Any], places: Sequence[int], faults: Faults) -> list[int]:
        pairs = list(zip(values, places, strict=True))
        if self._facts["encoding"] == "id":
            return [_id_of(value, self._facts, place, faults) for value, place in pairs]
        texts = [_text_of(value, self.name, place, faults) for value, place in pairs]
        for text, place in zip(texts, places, strict=True):
            if self._facts["hexadecimal"] and not _HEXADECIMAL.fullmatch(text):
                faults.setdefault(place, f"column {self.name}: {text!r} is not hexadecimal")
        distinct = list(dict.fromkeys(texts))
        encoded = [text.encode() for text in distinct]
        if self._vocabulary is not None:
            found = self._vocabulary.rows(encoded)
        else:
            found = (hashes_of(encoded) % np.uint64(self._facts["num_rows"])).astype(np.int64)
        row_of = dict(zip(distinct, found.tolist(), strict=True))
        return [row_of[text] for text in texts]


def _remembered(values: Sequence[Any], memo: Mapping[str, Any]) -> list[Any]:
    """Looks up texts in `memo`; None for unknown texts and for other types, because 1 and True are equal dict keys."""
    if set(map(type, values)) <= {str}:
        return list(map(memo.get, values))
    return [memo.get(value) if value.__class__ is str else None for value in values]


def _text_of(value: Any, name: str, place: int, faults: Faults) -> str:
    """Returns the text for the lookup of a value, without surrounding spaces; empty if the value is missing."""
    if isinstance(value, str):
        text = value.strip()
        if text.isascii() and "\0" not in text:
            return text
        try:
            text.encode()
        except UnicodeEncodeError:
            faults.setdefault(place, f"column {name}: half of a surrogate pair stands alone in {text!r}")
            return ""
        if "\0" in text:
            faults.setdefault(place, f"column {name}: the text {text!r} holds NUL")
        return text
    if value is None:
        return ""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    faults.setdefault(place, f"column {name}: expected a text or an integer, got {value!r}")
    return ""


def _id_of(value: Any, facts: Mapping[str, Any], place: int, faults: Faults) -> int:
    """Returns a value that is itself a row id; 0 and an entry in `faults` if it is invalid."""
    name, largest = facts["name"], facts["num_rows"] - 1
    text = str(int(value)) if isinstance(value, bool) else _text_of(value, name, place, faults)
    if not text:
        faults.setdefault(place, f"column {name}: the id is missing")
        return 0
    if not _INTEGER.fullmatch(text):
        faults.setdefault(place, f"column {name}: {text!r} is not an integer")
        return 0
    number = int(text) if len(text) < 100 else _MAX_ID
    if not 0 <= number <= largest:
        faults.setdefault(place, f"column {name}: id {number} is outside 0 to {largest}")
        return 0
    return number


def _numbers(values: Sequence[Any], name: str, faults: Faults, memo: dict[str, float]) -> NDArray[np.float32]:
    """Returns [n] float32: the numbers of a column; NaN if missing."""
    numbers = _remembered(values, memo)
    for place, number in enumerate(numbers) if None in numbers else ():
        if number is None:
            value = values[place]
            numbers[place] = _number(value, name, place, faults)
            if value.__class__ is str and place not in faults:
                memo[value] = numbers[place]
    return np.array(numbers, np.float64).astype(np.float32)


def _number(value: Any, name: str, place: int, faults: Faults) -> float:
    text = value.strip() if isinstance(value, str) else value
    if text is None or text == "":
        return np.nan
    try:
        if isinstance(text, str) and not _NUMBER.fullmatch(text):
            raise ValueError(f"{text!r} is not a number")
        number = float(text)
        if not abs(number) <= _MAX_FLOAT:
            raise ValueError(f"{number} is not a finite number")
    except (TypeError, ValueError, OverflowError) as error:
        faults.setdefault(place, f"column {name}: {error}")
        return np.nan
    return number


class Table:
    """A memory-mapped table of vectors; int8 tables have a scale and a bias per row."""

    def __init__(self, path: str, name: str) -> None:
        arrays = map_arrays(Path(path, name))
        weight = torch.from_numpy(arrays["weight"])
        self._weight = weight.view(torch.bfloat16) if arrays["weight"].dtype == np.int16 else weight
        self._scale = torch.from_numpy(arrays["scale"]) if "scale" in arrays else None
        self._bias = torch.from_numpy(arrays["bias"]) if "bias" in arrays else None
        self.num_rows, self.dim = weight.shape

    def rows(self, ids: NDArray[np.int64]) -> Tensor:
        """Returns the rows `ids` [n] as float32 [n, dim]."""
        places = torch.from_numpy(ids)
        rows = self._weight[places].float()
        if self._scale is None or self._bias is None:
            return rows
        return rows * self._scale[places].unsqueeze(1) + self._bias[places].unsqueeze(1)


class Vocabulary:
    """A memory-mapped vocabulary: maps texts to rows. Row 0 stands for all texts out of the vocabulary."""

    def __init__(self, path: str, name: str) -> None:
        arrays = map_arrays(Path(path, name))
        self._hashes, self._places = arrays["hashes"], arrays["places"]
        self._offsets, self._texts = arrays["offsets"], arrays["texts"]

    def rows(self, texts: Sequence[bytes]) -> NDArray[np.int64]:
        """Returns [n] int64: the row of each text, which is its place in the list plus 1; 0 for unknown texts."""
        hashes = hashes_of(texts)
        first = np.searchsorted(self._hashes, hashes)
        rows = np.zeros(len(texts), np.int64)
        for number, text in enumerate(texts):
            at = int(first[number])
            # Texts with the same hash are adjacent.
            while at < len(self._hashes) and self._hashes[at] == hashes[number]:
                if self.text(int(self._places[at])) == text:
                    rows[number] = self._places[at] + 1
                    break
                at += 1
        return rows

    def text(self, place: int) -> bytes:
        """Returns the text at `place` in the list."""
        return self._texts[self._offsets[place] : self._offsets[place + 1]].tobytes()


def hashes_of(texts: Sequence[bytes]) -> NDArray[np.uint64]:
    """Returns [n] uint64: a hash of the length and then of each 8 bytes of a text, padded with zeros."""
    lengths = np.array([len(text) for text in texts], np.int64)
    starts = lengths.cumsum() - lengths
    data = np.frombuffer(b"".join(texts) + bytes(8), np.uint8)
    words = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))  # The 8 bytes that start at each byte.
    masks = np.array([(1 << 8 * length) - 1 for length in range(9)], np.uint64)
    hashes = _mixed(lengths.view(np.uint64))
    for start in range(0, int(lengths.max(initial=0)), 8):
        more = np.flatnonzero(lengths > start)
        kept = masks[np.minimum(lengths[more] - start, 8)]
        hashes[more] = _mixed(hashes[more] ^ (words[starts[more] + start] & kept))
    return hashes


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def read_manifest(path: str, model: str) -> dict[str, Any]:
    """Returns the manifest of a package; ValueError if it has a newer format or another kind of model."""
    file = Path(path, MANIFEST_NAME)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is not a package: it has no {MANIFEST_NAME}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{file} is not the manifest of a package")
    if found["version"] > VERSION:
        raise ValueError(
            f"{path} is a package of version {found['version']}, and this scorer reads versions up to {VERSION}: use "
            "the scorer.py in the package"
        )
    if found["model"] != model:
        raise ValueError(f"{path} is a package of a {found['model']} model, not of a {model} model")
    return found


def map_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Returns the tensors of a safetensors file as memory-mapped arrays; bfloat16 as int16.

    Source: https://huggingface.co/docs/safetensors/index#format
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    found: dict[str, NDArray[Any]] = {}
    for name, facts in header.items():
        if name != "__metadata__":
            start, stop = facts["data_offsets"]
            dtype, shape = np.dtype(_DTYPES[facts["dtype"]]), tuple(facts["shape"])
            # Mapped copy-on-write because torch warns about read-only arrays. Empty tensors cannot be mapped.
            mapped = np.memmap(path, dtype, "c", 8 + size + start, shape) if stop > start else np.zeros(shape, dtype)
            found[name] = mapped if mapped.flags.aligned else mapped.copy()
    return found


def read_rows(path: str, lines: Mapping[str, Any], columns: Sequence[str]) -> Iterator[tuple[int, Row | str]]:
    """Yields for each line of a file its number and its row, or the reason why the line is bad.

    Other files than .parquet and .jsonl have the format of `lines`. The file must have all `columns`.
    """
    suffix = Path(path).suffix
    if suffix == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    with open(0 if path == "-" else path, newline="", encoding="utf-8-sig", closefd=path != "-") as file:
        if suffix == ".jsonl" or (lines["format"] == "jsonl" and suffix not in (".csv", ".tsv")):
            yield from _json_rows(file)
            return
        csv.field_size_limit(sys.maxsize)
        quotes = {"quotechar": lines["quote"]} if lines["quote"] else {"quoting": csv.QUOTE_NONE}
        reader = csv.reader(file, delimiter=lines["delimiter"], **quotes)
        records = ((reader.line_num, record) for record in reader if record)
        names = lines["columns"] or [name.strip() for name in next(records, (0, []))[1]]
        _require_columns(path, columns, names)
        for number, record in records:
            if len(record) == len(names):
                yield number, dict(zip(names, record, strict=True))
            else:
                yield number, f"expected {len(names)} fields, got {len(record)}"


def _json_rows(file: Iterable[str]) -> Iterator[tuple[int, Row | str]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"not a JSON object: {error}"
            continue
        yield number, row if isinstance(row, dict) else f"expected a JSON object, got {type(row).__name__}"


def _parquet_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[int, Row | str]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        _require_columns(path, columns, file.schema_arrow.names)
        yield from enumerate(row for batch in file.iter_batches(CHUNK_ROWS) for row in batch.to_pylist())


def _require_columns(path: str, wanted: Sequence[str], existing: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in existing]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(existing)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints CSV: the kept columns and the probability of each row, or the best items of users."""
    parser = argparse.ArgumentParser(description="Scores rows of a file, or recommends items, with a packaged model.")
    parser.add_argument("--package", default=str(Path(__file__).resolve().parent), help="folder of the package")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--data", help="file in the format of training, .jsonl or .parquet; - for standard input")
    asked.add_argument("--users", nargs="+", help="raw ids of users (for a retrieval model)")
    parser.add_argument("--top", type=int, default=10, help="number of items per user")
    parser.add_argument("--keep", default="", help="columns to copy to the output, for example id,ts")
    parser.add_argument("--max-bad-lines", type=int, default=0, help="maximum number of bad lines to skip")
    given = parser.parse_args(arguments)
    try:
        if given.users is not None:
            _print_items(Retriever(given.package), given.users, given.top)
            return 0
        scorer = Scorer(given.package)
        keep = [name for name in given.keep.split(",") if name]
        num_bad = _print_scores(scorer, given.data, keep, given.max_bad_lines)
    except (ValueError, OSError, csv.Error) as error:
        print(f"scorer: error: {error}", file=sys.stderr)
        return 2
    if num_bad:
        print(f"scorer: skipped {num_bad} bad lines", file=sys.stderr)
    return 0


def _print_scores(scorer: Scorer, path: str, keep: Sequence[str], max_bad_lines: int) -> int:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*keep, "probability"])
    rows = read_rows(path, scorer.manifest["lines"], [*scorer.columns, *keep])
    num_bad = 0
    while chunk := list(islice(rows, CHUNK_ROWS)):
        faults: Faults = {}
        scores = scorer.score(({} if isinstance(row, str) else row for _, row in chunk), faults)
        for place, ((line, row), score) in enumerate(zip(chunk, scores.tolist(), strict=True)):
            if isinstance(row, str) or place in faults:
                num_bad += 1
                if num_bad > max_bad_lines:
                    raise ValueError(f"{path}:{line}: {row if isinstance(row, str) else faults[place]}")
                continue
            writer.writerow([*(row.get(name) for name in keep), f"{score:.9g}"])
    return num_bad


def _print_items(retriever: Retriever, users: Sequence[str], top: int) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["user", "item", "score"])
    for user, items in zip(users, retriever.top(retriever.user_vectors(users), top), strict=True):
        writer.writerows([user, item, f"{score:.9g}"] for item, score in items)


if __name__ == "__main__":
    sys.exit(main())
