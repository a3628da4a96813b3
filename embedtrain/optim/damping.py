"""Damps gradients along the few directions of high curvature, so that large steps do not overshoot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from embedtrain.distributed.ranks import Ranks
from embedtrain.ops._backend.transfer import to_device
from embedtrain.ops.busiest_rows import busiest_rows, count_buckets
from embedtrain.ops.damp_rows import Damping
from embedtrain.ops.top_eigenpairs import top_eigenpairs
from embedtrain.ops.weighted_square import weighted_square
from embedtrain.optim.optimizer import SparseOptimizer
from embedtrain.optim.preconditioning import Touched

_NUM_BUSIEST = 4096
"""Number of the most frequent rows that a second moment is computed from. It trains as well as one over all rows, in a
tenth of the time."""


class CurvatureDamping:
    """Damps gradients along directions of high curvature, so that one large step trains like many small steps.

    It applies to losses that sum `f(u_i . v_j)` over pairs of rows of two tables, such as word vectors. The curvature
    for row `i` is about `factor * n_i * C`. Here `n_i` is the number of the row's pairs, and `C` is the second moment
    `sum(n_j v_j v_j') / sum(n_j)` of the other table's rows.

    Along an eigenvector of `C`, let `x = factor * r_i * n_i * eigenvalue`, where `r_i` is the row's learning rate. Many
    small steps cover the fraction `1 - exp(-x)` of the way to the minimum. One step along the summed gradient covers
    the fraction `x`, which overshoots if `x` is large. So the gradient's component along each of the first eigenvectors
    is multiplied by `(1 - exp(-x)) / x`. Rows with few pairs keep nearly their full gradient.

    The object has no state. Set it as the `preconditioner` of an optimizer, and pass the `counts` of each step to
    `EmbeddingCollection.distinct_rows`.

    Args:
        pairs: maps a table to the table whose rows its rows are multiplied with. Each pair counts in both directions.
            A table may be paired with itself.
        directions: number of eigenvectors per table; at most dim are used.
        factor: curvature of a loss term relative to a squared error. For a logistic loss it is the mean of
            `s * (1 - s)`, where `s` is the predicted probability.

    Raises:
        ValueError: on construction, a table is in two pairs, or a number is out of range. On a call, a table is
            missing, the optimizer does not define a row's learning rate, or the gradient has no counts.
    """

    def __init__(self, pairs: Mapping[str, str], *, directions: int = 4, factor: float = 0.15) -> None:
        if directions < 1 or not 0 < factor < float("inf"):
            raise ValueError(f"directions and factor must be positive, got {directions} and {factor}")
        both = [*pairs.items(), *((other, table) for table, other in pairs.items() if other != table)]
        self._partner_of = dict(both)
        if len(self._partner_of) < len(both):
            raise ValueError(f"a table can be in one pair only, got {dict(pairs)}")
        self.directions, self.factor = directions, factor

    def __call__(self, touched: Sequence[Touched], ranks: Ranks) -> list[Tensor | Damping]:
        """Returns how each table group's gradient is damped; see `Preconditioner`. Collective: every rank."""
        self._check_tables(touched)
        is_paired = [not self._partner_of.keys().isdisjoint(part.table_names) for part in touched]
        dampings = iter(self._dampings(list(itertools.compress(touched, is_paired)), ranks))
        # Gradients of other table groups stay as they are and need no counts.
        return [
            next(dampings) if paired else part.gradient.values for part, paired in zip(touched, is_paired, strict=True)
        ]

    def _dampings(self, touched: Sequence[Touched], ranks: Ranks) -> list[Damping]:
        """Returns the damping of each table group, all of which contain paired tables. Collective: every rank."""
        names = list(self._partner_of)
        counts = self._counts(touched)
        tables = [_positions(names, part) for part in touched]
        moments = _second_moments(touched, counts, tables, names, ranks)
        partners = [names.index(self._partner_of[name]) for name in names]
        curvatures, directions = top_eigenpairs(moments[partners], self.directions)
        curvatures = torch.nn.functional.pad(curvatures, (0, 0, 0, 1))
        directions = torch.nn.functional.pad(directions, (0, 0, 0, 0, 0, 1))
        dampings = []
        for part, own, of_table in zip(touched, counts, tables, strict=True):
            if part.rates is None:
                raise ValueError(
                    f"CurvatureDamping cannot damp the tables {', '.join(part.table_names)}: their optimizer does not "
                    "define a row's learning rate before a step. Use SGD, or RowwiseAdagrad or Adagrad with "
                    "initial_accumulator_value above 0"
                )
            dampings.append(Damping(of_table, (self.factor * part.rates).mul_(own), curvatures, directions))
        return dampings

    def _check_tables(self, touched: Sequence[Touched]) -> None:
        """Raises ValueError if the optimizer does not train a table of the pairs."""
        found = {name for part in touched for name in part.table_names}
        if missing := sorted(self._partner_of.keys() - found):
            raise ValueError(
                f"CurvatureDamping: the optimizer has no table {', '.join(missing)}; it has {sorted(found)}"
            )

    def _counts(self, touched: Sequence[Touched]) -> list[Tensor]:
        """Returns the counts of each group's rows, [n] float32."""
        counts = []
        for part in touched:
            if part.gradient.counts is None:
                raise ValueError(
                    f"CurvatureDamping: the gradient of the tables {', '.join(part.table_names)} has no counts: "
                    "pass them to EmbeddingCollection.distinct_rows(asked, counts=...)"
                )
            counts.append(part.gradient.counts)
        return counts


def has_row_rates(optimizer: SparseOptimizer) -> bool:
    """Returns whether `CurvatureDamping` supports an optimizer, which must define `SparseOptimizer.row_rates`."""
    # The rows may lie in host memory even if the store's device is a GPU.
    return all(
        optimizer.row_rates(store, torch.zeros(0, dtype=torch.int64, device=store.weight.device), settings) is not None
        for store, settings in zip(optimizer.stores, optimizer.param_groups, strict=True)
    )


def _positions(names: Sequence[str], part: Touched) -> Tensor:
    """Returns the index of each row's table in `names`, [n] int64. All other tables have the index `len(names)`."""
    known = [names.index(name) if name in names else len(names) for name in part.table_names]
    if known == list(range(len(known))):
        return part.tables
    return to_device(torch.tensor(known), part.tables.device)[part.tables]


def _second_moments(
    touched: Sequence[Touched], counts: Sequence[Tensor], tables: Sequence[Tensor], names: Sequence[str], ranks: Ranks
) -> Tensor:
    """Returns, for each paired table, the mean of `v v'` over the pairs of its most frequent rows on all ranks.

    Collective: every rank.

    Args:
        touched: the table groups.
        counts, tables: of each group, the count of each row, and the index of its table; see `_positions`.
        names: names of the paired tables.
        ranks: the ranks that share the tables.

    Returns:
        [num_tables, dim, dim] float32.
    """
    device, dim, num_tables = counts[0].device, touched[0].store.weight.shape[1], len(names)
    num_indices = num_tables + any(name not in names for part in touched for name in part.table_names)
    each = [count_buckets(own, of_table, num_indices) for own, of_table in zip(counts, tables, strict=True)]
    histogram = ranks.all_reduce(sum(each[1:], start=each[0]))
    sums = torch.zeros(num_tables, dim * dim + 1, dtype=torch.float32, device=device)
    for part, own, of_table in zip(touched, counts, tables, strict=True):
        busiest = busiest_rows(part.places, own, of_table, histogram, _NUM_BUSIEST)
        for of_sum, (rows, weights) in zip(sums, busiest[:num_tables], strict=True):
            of_sum[:-1] += weighted_square(part.store.weight, rows, weights).flatten()
            of_sum[-1] += weights.sum()
    ranks.all_reduce(sums)
    # A table without any pair gets zeros.
    return (sums[:, :-1] / sums[:, -1:].clamp(min=1e-30)).view(num_tables, dim, dim)
