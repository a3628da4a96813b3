"""An index of faiss over vectors: built, measured against the exact answer, written, and asked instead of all rows."""

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

_NUM_LINKS = 32
_NUM_BUILT_FROM = 80
_NUM_VISITED = 96
"""Of HNSW: links of a vector, candidates for them, and candidates of a search."""
_LIST_ROWS = 40
_SEARCHED_SHARE = 64
_BITS = 8
_TRAINED_ROWS = 1 << 17
_ROUNDS = 10
_QUERIES = 256
_K = 20
_SAME = 1e-5
_MORE = 4
"""So many times as many candidates are taken as wanted: their own scores are rounded, and the exact ones decide."""


@dataclass(frozen=True)
class IndexFacts:
    """What an index is of; JSON beside it.

    Attributes:
        kind: "flat" compares with every vector; "ivfpq" keeps half a byte per number and looks into the nearest of
            many lists; "hnsw" walks a graph.
        similarity: "cosine" of vectors scaled to length 1, or "dot" of vectors as they are.
        table: that the vectors are of.
        step: of the checkpoint.
        num_rows: of the table, zero vectors included.
        dim: length of a vector.
        num_zero: vectors of zeros, which are left out: nothing is near them.
        recall: the share of the 20 best rows for a row that are the first 20 of the index, over a few hundred rows.
        rescored_recall: the share that is among the first 80, whose exact scores `Index.best` compares.
    """

    kind: IndexKind
    similarity: Similarity
    table: str
    step: int
    num_rows: int
    dim: int
    num_zero: int = 0
    recall: float = 0.0
    rescored_recall: float = 0.0


class Index:
    """An index that was built or read.

    Attributes:
        facts: what it is of.
    """

    def __init__(self, facts: IndexFacts, index: Any) -> None:
        self.facts = facts
        self._index = index

    def search(self, queries: FloatRows, k: int) -> NDArray[np.int64]:
        """Returns rows [n, k] near each of the queries [n, dim], roughly the nearest first; -1 if there are no more."""
        if self.facts.kind == "hnsw":
            _faiss().downcast_index(self._index.index).hnsw.efSearch = max(_NUM_VISITED, k)
        rows: NDArray[np.int64] = self._index.search(np.ascontiguousarray(queries, np.float32), k)[1]
        return rows

    def best(self, vectors: Vectors, query: FloatRows, k: int) -> tuple[NDArray[np.int64], FloatRows]:
        """Returns the rows nearest to a query [dim] and their exact scores, the best first; of equal ones the lower.

        Args:
            vectors: what the index is of.
            query: scaled as the similarity asks.
            k: how many; fewer if the index finds no more.
        """
        found = self.search(query[None], min(_MORE * k, max(1, self._index.ntotal)))[0]
        rows = np.sort(found[found >= 0])
        values = np.concatenate([np.empty((0, vectors.dim), np.float32), *(vectors.rows(row, row + 1) for row in rows)])
        scores = _scaled(values, self.facts.similarity) @ query
        order = np.argsort(-scores, kind="stable")[:k]
        return rows[order], scores[order]


def build_index(vectors: Vectors, kind: IndexKind, similarity: Similarity = "cosine") -> Index:
    """Builds an index in memory from vectors that are read some MiB at a time, and measures it.

    Raises:
        UserError: the package faiss is not installed, a vector is not finite, or all are zero.
    """
    faiss = _faiss()
    facts = IndexFacts(kind, similarity, vectors.table, vectors.step, vectors.num_rows, vectors.dim)
    sample = _sample(vectors, similarity)
    if len(sample) == 0:
        raise UserError(f"all vectors of table {vectors.table!r} are zero: an index needs others")
    index = faiss.IndexIDMap(_empty_index(faiss, kind, vectors.num_rows, sample))
    num_zero = 0
    for rows, block in _blocks(vectors, similarity):
        index.add_with_ids(block, rows)
        num_zero += len(block)
    built = Index(replace(facts, num_zero=vectors.num_rows - num_zero), index)
    recall, rescored = _recall(built, vectors)
    return Index(replace(built.facts, recall=recall, rescored_recall=rescored), index)


def export_index(
    vectors: Vectors, output: str, kind: IndexKind, similarity: Similarity = "cosine", *, overwrite: bool = False
) -> tuple[list[str], IndexFacts]:
    """Writes an index, the names of its rows, and what it is of.

    Args:
        vectors: what to index.
        output: path or fsspec URL of the new file; the names go to `OUTPUT.vocabulary.tsv`, the facts to `OUTPUT.json`.
        kind: see `IndexFacts`.
        similarity: see `IndexFacts`.
        overwrite: whether files that are there already are replaced.

    Returns:
        The paths, and the facts.

    Raises:
        UserError: as `build_index`, or the output is there already or cannot be written.
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
    """Opens what `export_index` wrote.

    Raises:
        UserError: there is no index, or the package faiss is not installed.
    """
    faiss = _faiss()
    try:
        facts = parse(IndexFacts, json.loads(storage.read(f"{path}.json")))
    except FileNotFoundError as error:
        raise UserError(f"there is no index {path} with a file {path}.json beside it") from error
    except (ValueError, SchemaError) as error:
        raise UserError(f"{path}.json does not say what an index is of: {error}") from error
    local_path = storage.local_path(path)
    try:
        if local_path is not None:
            return Index(facts, faiss.read_index(local_path))
        return Index(facts, faiss.deserialize_index(np.frombuffer(storage.read(path), np.uint8)))
    except (RuntimeError, FileNotFoundError) as error:
        raise UserError(f"{path} cannot be read as an index of faiss: {str(error).splitlines()[-1]}") from error


def require_index_of(
    index: Index, vectors: tuple[str, int, int, int], path: str, similarity: Similarity = "cosine"
) -> None:
    """Refuses an index of other vectors.

    Args:
        index: the index.
        vectors: table, step, number of rows and length of a row.
        path: of the index, for messages.
        similarity: that is asked for.

    Raises:
        UserError: it is of another table, checkpoint or similarity.
    """
    facts = index.facts
    if (facts.table, facts.step, facts.num_rows, facts.dim, facts.similarity) != (*vectors, similarity):
        table, step, num_rows, dim = vectors
        raise UserError(
            f"{path} is of table {facts.table!r} at step {facts.step:,}, {facts.num_rows:,} rows of {facts.dim}, for "
            f"{facts.similarity}; asked is table {table!r} at step {step:,}, {num_rows:,} rows of {dim}, for "
            f"{similarity}: export it anew with --similarity {similarity}, or choose by --table and --step"
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
    """Yields the rows that are not zero, and their vectors as they are compared."""
    for start, block in vectors.blocks():
        if not np.isfinite(block).all():
            row = start + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
            raise UserError(f"the vector of {vectors.words[row]!r} is not finite: an index cannot hold it")
        places = np.flatnonzero(block.any(axis=1))
        yield places + start, np.ascontiguousarray(_scaled(block[places], similarity), np.float32)


def _sample(vectors: Vectors, similarity: Similarity) -> FloatRows:
    """Returns some of the vectors, from all over the table."""
    step = max(1, vectors.num_rows // _TRAINED_ROWS)
    found = [block[rows % step == 0] for rows, block in _blocks(vectors, similarity)]
    return np.concatenate([np.empty((0, vectors.dim), np.float32), *found])


def _empty_index(faiss: Any, kind: IndexKind, num_rows: int, sample: FloatRows) -> Any:
    """Returns an index without vectors, trained on a sample if its kind needs that."""
    if kind not in get_args(IndexKind):
        raise UserError(f"the kinds of an index are {', '.join(get_args(IndexKind))}, got {kind!r}")
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
    # Few vectors are no mistake, which faiss warns of.
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1
    # It wants as many vectors as a code has values; fewer ones are given several times.
    index.train(np.resize(sample, (max(len(sample), 1 << _BITS), dim)))
    index.nprobe = max(1, min(num_lists, 8 + num_lists // _SEARCHED_SHARE))
    return index


def _recall(index: Index, vectors: Vectors) -> tuple[float, float]:
    """Returns `recall` and `rescored_recall` of `IndexFacts`; a row is not its own neighbour, equal rows all count."""
    similarity = index.facts.similarity
    wanted = set(np.linspace(0, vectors.num_rows - 1, min(_QUERIES, vectors.num_rows)).astype(int).tolist())
    picked = list(_picked(vectors, similarity, wanted))
    if not picked:
        return 1.0, 1.0
    own, queries = np.array([row for row, _ in picked]), np.stack([vector for _, vector in picked])
    best = np.full((len(queries), _K), -np.inf, np.float32)
    for rows, block in _blocks(vectors, similarity):
        scores = queries @ block.T
        scores[rows[None] == own[:, None]] = -np.inf
        best = -np.sort(-np.concatenate([best, scores], axis=1), axis=1)[:, :_K]
    found = index.search(queries, _MORE * _K + 1)
    vector_of = dict(_picked(vectors, similarity, set(found[found >= 0].tolist())))
    num_wanted, num_first, num_rescored = 0, 0, 0
    for place, query in enumerate(queries):
        exact = best[place][np.isfinite(best[place])]
        others = [row for row in found[place].tolist() if row >= 0 and row != own[place]]
        is_hit = np.array([query @ vector_of[row] >= exact[-1] - _SAME for row in others[: _MORE * _K]], bool)
        num_wanted += len(exact)
        num_first += int(is_hit[: len(exact)].sum())
        num_rescored += min(len(exact), int(is_hit.sum()))
    return (num_first / num_wanted, num_rescored / num_wanted) if num_wanted else (1.0, 1.0)


def _picked(vectors: Vectors, similarity: Similarity, wanted: set[int]) -> Iterator[tuple[int, FloatRows]]:
    chosen = np.array(sorted(wanted), np.int64)
    for rows, block in _blocks(vectors, similarity):
        places = np.flatnonzero(np.isin(rows, chosen))
        yield from zip(rows[places].tolist(), block[places], strict=True)
