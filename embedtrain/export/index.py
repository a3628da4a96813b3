"""A faiss index over vectors: building, measuring its recall, writing, opening and searching."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from embedtrain import storage
from embedtrain.errors import UserError
from embedtrain.export.formats.arrays import write_vocabulary
from embedtrain.export.storage import new_files, refuse_packed_name
from embedtrain.export.vectors import FloatRows, Vectors, unit_rows
from embedtrain.schema import SchemaError, parse

IndexKind = Literal["flat", "ivfpq", "hnsw"]
Similarity = Literal["cosine", "dot"]

_CLASSES: dict[IndexKind, str] = {"flat": "IndexFlatIP", "ivfpq": "IndexIVFPQ", "hnsw": "IndexHNSWFlat"}
"""The faiss class of each kind."""
_NUM_LINKS = 32
_NUM_BUILT_FROM = 80
_NUM_VISITED = 96
"""HNSW parameters: links per vector (M), candidates when building (efConstruction) and searching (efSearch)."""
_LIST_ROWS = 40
_SEARCHED_SHARE = 64
_BITS = 8
_TRAINED_ROWS = 1 << 17
_ROUNDS = 10
_QUERIES = 256
_K = 20
_SAME = 1e-5
_MORE = 4
"""The index returns this many times the wanted rows, because its scores are approximate; exact scores then choose."""


@dataclass(frozen=True)
class IndexedRows:
    """Identifies the indexed vectors.

    Attributes:
        table: name of the table.
        step: step of the checkpoint.
        checksum: checksum of the checkpoint's manifest, which differs between runs.
        num_rows: number of rows, zero vectors included.
        dim: length of a vector.
    """

    table: str
    step: int
    checksum: str
    num_rows: int
    dim: int

    @classmethod
    def of(cls, vectors: Vectors) -> IndexedRows:
        """Returns the identity of `vectors`."""
        return cls(vectors.table, vectors.step, vectors.checksum, vectors.num_rows, vectors.dim)

    def __str__(self) -> str:
        return f"table {self.table!r} at step {self.step:,}, {self.num_rows:,} rows of {self.dim}"


@dataclass(frozen=True)
class IndexFacts:
    """Describes an index; stored as JSON beside it.

    Attributes:
        kind: "flat" compares with every vector; "ivfpq" stores half a byte per number and searches the nearest of
            many lists; "hnsw" searches a graph.
        similarity: "cosine" (vectors are scaled to length 1) or "dot".
        rows: the indexed vectors.
        num_zero: number of zero vectors, which are not indexed.
        recall: share of a row's 20 nearest rows that `Index.best` finds, over a few hundred rows.
        approximate_recall: the same share for `Index.search`, which uses only the index's approximate scores.
    """

    kind: IndexKind
    similarity: Similarity
    rows: IndexedRows
    num_zero: int = 0
    recall: float = 0.0
    approximate_recall: float = 0.0


class Index:
    """Searches a faiss index.

    Attributes:
        facts: description of the index.
    """

    def __init__(self, facts: IndexFacts, index: Any) -> None:
        self.facts = facts
        self._index = index

    def search(self, queries: FloatRows, k: int) -> NDArray[np.int64]:
        """Returns rows [n, k] near each of the queries [n, dim], approximately nearest first; -1 if there are fewer."""
        graph = getattr(_faiss().downcast_index(self._index.index), "hnsw", None)
        if graph is not None:
            graph.efSearch = max(_NUM_VISITED, k)
        rows: NDArray[np.int64] = self._index.search(np.ascontiguousarray(queries, np.float32), k)[1]
        return rows

    def best(self, vectors: Vectors, query: FloatRows, k: int) -> tuple[NDArray[np.int64], FloatRows]:
        """Returns the rows nearest to a query [dim] and their exact scores, best first; ties are ordered by row.

        Args:
            vectors: the indexed vectors.
            query: the query, scaled to length 1 if the similarity is "cosine".
            k: number of rows; fewer are returned if the index finds fewer.
        """
        found = self.search(query[None], min(_MORE * k, max(1, self._index.ntotal)))[0]
        rows = np.sort(found[found >= 0])
        values = np.concatenate([np.empty((0, vectors.dim), np.float32), *(vectors.rows(row, row + 1) for row in rows)])
        scores = _scaled(values, self.facts.similarity) @ query
        order = np.argsort(-scores, kind="stable")[:k]
        return rows[order], scores[order]


def build_index(vectors: Vectors, kind: IndexKind, similarity: Similarity = "cosine") -> Index:
    """Builds an index in memory, reading the vectors in blocks, and measures its recall.

    Raises:
        UserError: the package faiss is not installed, a vector is not finite, or all vectors are zero.
    """
    faiss = _faiss()
    facts = IndexFacts(kind, similarity, IndexedRows.of(vectors))
    sampled_rows, sample = _sample(vectors, similarity)
    if len(sample) == 0:
        raise UserError(f"cannot index table {vectors.table!r}: all its vectors are zero")
    index = faiss.IndexIDMap(_empty_index(faiss, kind, vectors.num_rows, sample))
    num_zero = 0
    for rows, block in _blocks(vectors, similarity):
        index.add_with_ids(block, rows)
        num_zero += len(block)
    built = Index(replace(facts, num_zero=vectors.num_rows - num_zero), index)
    chosen = np.linspace(0, len(sample) - 1, min(_QUERIES, len(sample))).astype(np.int64)
    recall, approximate_recall = _recall(built, vectors, sampled_rows[chosen], sample[chosen])
    return Index(replace(built.facts, recall=recall, approximate_recall=approximate_recall), index)


def export_index(
    vectors: Vectors, output: str, kind: IndexKind, similarity: Similarity = "cosine", *, overwrite: bool = False
) -> tuple[list[str], IndexFacts]:
    """Writes an index, the names of its rows, and its description.

    Args:
        vectors: the vectors to index.
        output: path or fsspec URL of the new file; `OUTPUT.vocabulary.tsv` gets the names, `OUTPUT.json` the facts.
        kind: see `IndexFacts`.
        similarity: see `IndexFacts`.
        overwrite: whether to replace existing files.

    Returns:
        The paths, and the description.

    Raises:
        UserError: see `build_index`; or the output exists or cannot be written.
    """
    refuse_packed_name(output, "faiss")
    faiss = _faiss()
    paths = [output, f"{output}.vocabulary.tsv", f"{output}.json"]
    with new_files(paths, overwrite) as (file, names, facts):
        write_vocabulary(vectors, names, "faiss")
        built = build_index(vectors, kind, similarity)
        faiss.write_index(built._index, faiss.PyCallbackIOWriter(file.write))
        facts.write(json.dumps(asdict(built.facts), indent=1).encode())
    return paths, built.facts


def open_index(path: str) -> Index:
    """Opens an index that `export_index` wrote.

    Raises:
        UserError: there is no index, the file does not match its description, or the package faiss is not installed.
    """
    faiss = _faiss()
    try:
        facts = parse(IndexFacts, json.loads(storage.read(f"{path}.json")))
    except FileNotFoundError as error:
        raise UserError(f"{path} is not an index: it or {path}.json does not exist") from error
    except (ValueError, SchemaError) as error:
        raise UserError(f"{path}.json does not describe an index: {error}") from error
    local_path = storage.local_path(path)
    try:
        if local_path is not None:
            index = faiss.read_index(local_path)
        else:
            index = faiss.deserialize_index(np.frombuffer(storage.read(path), np.uint8))
    except (RuntimeError, FileNotFoundError) as error:
        raise UserError(f"{path} is not a faiss index: {str(error).splitlines()[-1]}") from error
    expected = (facts.rows.num_rows - facts.num_zero, facts.rows.dim)
    if not isinstance(index, faiss.IndexIDMap) or (index.ntotal, index.d) != expected:
        raise UserError(
            f"{path} is not the index that {path}.json describes: expected an IndexIDMap of {expected[0]:,} vectors of "
            f"dim {expected[1]}, found {type(index).__name__} of {index.ntotal:,} vectors of dim {index.d}"
        )
    if (found := type(faiss.downcast_index(index.index)).__name__) != _CLASSES[facts.kind]:
        raise UserError(
            f"{path} is not the index that {path}.json describes: expected {_CLASSES[facts.kind]} (kind "
            f"{facts.kind}), found {found}"
        )
    return Index(facts, index)


def require_index_of(index: Index, rows: IndexedRows, path: str, similarity: Similarity = "cosine") -> None:
    """Checks that an index was built from the given vectors.

    Args:
        index: the index.
        rows: identity of the vectors.
        path: path of the index, for messages.
        similarity: the similarity to search by.

    Raises:
        UserError: the index was built from another table or checkpoint, or for another similarity.
    """
    facts = index.facts
    if (facts.rows, facts.similarity) == (rows, similarity):
        return
    advice = f"export the index again with --similarity {similarity}, or name its vectors with --table and --step"
    if (str(facts.rows), facts.similarity) == (str(rows), similarity):
        raise UserError(f"{path} was built from another run with the same {rows}: {advice}")
    raise UserError(
        f"{path} was built from {facts.rows}, for {facts.similarity}, not from {rows}, for {similarity}: {advice}"
    )


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError("an index needs the package faiss: pip install 'embedtrain[ann]'") from error
    return faiss


def _scaled(rows: FloatRows, similarity: Similarity) -> FloatRows:
    return unit_rows(rows) if similarity == "cosine" else rows


def _blocks(vectors: Vectors, similarity: Similarity) -> Iterator[tuple[NDArray[np.int64], FloatRows]]:
    """Yields the rows whose vectors are not zero, and their vectors, scaled for the similarity."""
    for start, block in vectors.blocks():
        if not np.isfinite(block).all():
            row = start + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
            raise UserError(f"cannot index the vector of {vectors.words[row]!r}: it is not finite")
        places = np.flatnonzero(block.any(axis=1))
        yield places + start, np.ascontiguousarray(_scaled(block[places], similarity), np.float32)


def _sample(vectors: Vectors, similarity: Similarity) -> tuple[NDArray[np.int64], FloatRows]:
    """Returns a sample of evenly spaced non-zero rows, or all if they are few, and their vectors."""
    rows, sample = np.empty(0, np.int64), np.empty((0, vectors.dim), np.float32)
    step, count = 1, 0
    for block_rows, block in _blocks(vectors, similarity):
        places = np.flatnonzero(np.arange(count, count + len(block)) % step == 0)
        rows, sample = np.concatenate([rows, block_rows[places]]), np.concatenate([sample, block[places]])
        count += len(block)
        while len(rows) > 2 * _TRAINED_ROWS:
            rows, sample, step = rows[::2], sample[::2], 2 * step
    return rows, sample


def _empty_index(faiss: Any, kind: IndexKind, num_rows: int, sample: FloatRows) -> Any:
    """Returns an index without vectors; kind "ivfpq" is trained on the sample."""
    if kind not in get_args(IndexKind):
        raise UserError(f"the kind of an index must be one of {', '.join(get_args(IndexKind))}, got {kind!r}")
    dim = sample.shape[1]
    if kind == "flat":
        return faiss.IndexFlatIP(dim)
    if kind == "hnsw":
        graph = faiss.IndexHNSWFlat(dim, _NUM_LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction, graph.hnsw.efSearch = _NUM_BUILT_FROM, _NUM_VISITED
        return graph
    num_lists = max(1, min(int(2 * num_rows**0.5), len(sample) // _LIST_ROWS))
    num_parts = dim // 2 if dim % 2 == 0 else dim
    lists = faiss.IndexFlatIP(dim)
    index = faiss.IndexIVFPQ(lists, dim, num_lists, num_parts, _BITS, faiss.METRIC_INNER_PRODUCT)
    index.cp.spherical = True
    index.cp.niter = index.pq.cp.niter = _ROUNDS
    # Suppresses the warning of faiss about few vectors.
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1
    # faiss needs at least as many vectors as a code has values, so a smaller sample is repeated.
    index.train(np.resize(sample, (max(len(sample), 1 << _BITS), dim)))
    index.nprobe = max(1, min(num_lists, 8 + num_lists // _SEARCHED_SHARE))
    return index


def _recall(index: Index, vectors: Vectors, own: NDArray[np.int64], queries: FloatRows) -> tuple[float, float]:
    """Returns `recall` and `approximate_recall` of `IndexFacts` for some rows and their vectors.

    A row does not count as its own neighbour. All rows as near as the last exact neighbour count as hits.
    """
    found = index.search(queries, _MORE * (_K + 1))
    wanted = np.unique(found)
    vector_of: dict[int, FloatRows] = {}
    best = np.full((len(queries), _K), -np.inf, np.float32)
    for rows, block in _blocks(vectors, index.facts.similarity):
        scores = queries @ block.T
        scores[rows[None] == own[:, None]] = -np.inf
        best = -np.sort(-np.concatenate([best, scores], axis=1), axis=1)[:, :_K]
        places = np.flatnonzero(np.isin(rows, wanted))
        vector_of.update(zip(rows[places].tolist(), block[places], strict=True))
    num_wanted, num_first, num_found = 0, 0, 0
    for place, query in enumerate(queries):
        exact = best[place][np.isfinite(best[place])]
        others = [row for row in found[place].tolist() if row >= 0 and row != own[place]]
        is_hit = np.array([query @ vector_of[row] >= exact[-1] - _SAME for row in others], bool)
        num_wanted += len(exact)
        num_first += int(is_hit[: len(exact)].sum())
        num_found += min(len(exact), int(is_hit.sum()))
    return (num_found / num_wanted, num_first / num_wanted) if num_wanted else (1.0, 1.0)
