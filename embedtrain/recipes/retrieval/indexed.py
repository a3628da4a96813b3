"""Finds the best items of users with an approximate index instead of the whole catalogue."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedtrain.checkpoint import CheckpointReader
from embedtrain.data.bags import Bags
from embedtrain.errors import UserError
from embedtrain.export.index import Index, IndexedRows, open_index, require_index_of
from embedtrain.ops._backend.transfer import to_host
from embedtrain.recipes.retrieval.model import ITEM, Retrieval

_MORE = 4
_USERS_AT_ONCE = 64


class IndexedCatalogue:
    """Takes candidates from an index and ranks them by exact score; `best` has the interface of `Catalogue.best`.

    Items that the index does not return are missed.

    Args:
        model: the model, in one process.
        path: path of an index that `export_index` wrote.
        checkpoint: path of the checkpoint that the model was restored from.

    Raises:
        UserError: there are several processes, or the index belongs to other items.
    """

    def __init__(self, model: Retrieval, path: str, checkpoint: str) -> None:
        if model.tables.ranks.size > 1:
            raise UserError(f"--index needs one process, got {model.tables.ranks.size}: run without torchrun")
        self.model = model
        self.num_items = model.sides[ITEM].num_rows
        self._index: Index = open_index(path)
        dim = model.tables.shards[ITEM].spec.dim
        with CheckpointReader(checkpoint) as reader:
            rows = IndexedRows(ITEM, reader.step, reader.manifest.checksum, self.num_items, dim)
        # For vectors of length 1, dot product and cosine find the same items.
        require_index_of(
            self._index, rows, path, self._index.facts.similarity if model.scoring.is_unit(ITEM) else "dot"
        )

    @torch.no_grad()
    def best(self, users: NDArray[np.int64], k: int, known: Bags | None, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the best items of each user and their scores, the best first; see `Catalogue.best`."""
        queries = to_host(queries)
        starts = range(0, len(users), _USERS_AT_ONCE)
        found = [self._best(users[s : s + _USERS_AT_ONCE], queries[s : s + _USERS_AT_ONCE], k, known) for s in starts]
        return torch.cat([items for items, _ in found]), torch.cat([scores for _, scores in found])

    def _best(self, users: NDArray[np.int64], queries: Tensor, k: int, known: Bags | None) -> tuple[Tensor, Tensor]:
        k = min(k, self.num_items)
        lengths = np.zeros(len(users), np.int64) if known is None else known.lengths(users)
        wanted = min(self.num_items, _MORE * k + int(lengths.max()))
        candidates = self._index.search(queries.numpy(), wanted)
        if known is not None:
            for place, user in enumerate(users.tolist()):
                own = known.values[known.starts[user] : known.starts[user + 1]]
                candidates[place, np.isin(candidates[place], own)] = -1
        items, place_of = np.unique(candidates, return_inverse=True)
        vectors = to_host(self.model.encode({ITEM: torch.from_numpy(items.clip(min=0))})[ITEM])
        scores = torch.einsum("nd,nmd->nm", queries, vectors[torch.from_numpy(place_of.reshape(candidates.shape))])
        rows = torch.from_numpy(candidates)
        best = scores.masked_fill(rows < 0, -torch.inf).topk(k, dim=1)
        return rows.gather(1, best.indices), best.values
