"""Output dist: sends vectors to the ranks that asked for them and, in backward, gradients to the owners of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedtrain.embedding.input_dist import Asked
from embedtrain.embedding.requests import Found, GroupRequest
from embedtrain.embedding.table_group import TableGroup, TableShard
from embedtrain.ops.gather_rows import gather_rows
from embedtrain.ops.pool_rows import grad_of_weights, pool_rows
from embedtrain.ops.row_gradient import Delivery


def output_dist(asked: Asked, found: Sequence[Found]) -> dict[str, Tensor]:
    """Returns the float32 vectors of each feature, in the caller's order; see `EmbeddingCollection.forward` for shapes.

    Backward sums the gradients of all features of a group by row, and delivers them to the rows' owners.

    Collective: every rank, and its backward too.
    """
    vectors: dict[str, Tensor] = {}
    for part, own in zip(asked.parts, found, strict=True):
        # Weights are passed only if they need a gradient, because each argument of an autograd function costs time.
        is_learned = any([weight is not None and weight.requires_grad for weight in part.weights])
        learned = part.weights if is_learned else ()
        pooled = _OutputDist.apply(part.group.gradients.anchor, part, own, *learned)  # type: ignore[no-untyped-call]
        vectors.update(zip(part.route.names, pooled, strict=True))
    for name, shape in asked.shapes.items():
        vectors[name] = vectors[name].unflatten(0, shape)
    return {name: vectors[name] for name in asked.names}


def fetch_distinct(asked: Asked, counts: Tensor | None = None) -> Tensor:
    """Returns each distinct row once, [num_distinct, dim] float32; see `Asked.places`.

    Collective: every rank, and its backward too.

    Args:
        asked: the batch.
        counts: [num_distinct or more] float32; sent to the owners with the gradient, see `Delivery`.

    Raises:
        ValueError: see `EmbeddingCollection.distinct_rows`.
    """
    if len({part.group.weight.shape[1] for part in asked.parts}) > 1:
        raise ValueError(f"distinct_rows needs tables of one dim; the tables of {list(asked.names)} differ in dim")
    features = {n: f for part in asked.parts for n, f in zip(part.route.names, part.route.features, strict=True)}
    pooled = [name for name in asked.names if features[name].pooling != "none"]
    if pooled:
        raise ValueError(f"distinct_rows needs features without pooling; pooled features are {', '.join(pooled)}")
    if asked.check is not None:
        asked.check.run()
    counts_of: Sequence[Tensor | None] = [None] * len(asked.parts)
    if counts is not None:
        if counts.dtype != torch.float32 or counts.dim() != 1:
            raise ValueError(f"counts must be [num_distinct or more] float32, got {counts.dtype} {tuple(counts.shape)}")
        sizes = [part.distinct.unique.numel() for part in asked.parts]
        counts_of = counts[: sum(sizes)].split(sizes)
    parts: list[Tensor] = [
        _DistinctRows.apply(part.group.gradients.anchor, part, own)  # type: ignore[no-untyped-call]
        for part, own in zip(asked.parts, counts_of, strict=True)
    ]
    rows: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return rows


def fetch_own(group: TableGroup, shard: TableShard) -> Tensor:
    """Returns this rank's rows of a table, [num_slots, dim] float32; backward delivers their gradients on this rank."""
    rows: Tensor = _OwnRows.apply(group.gradients.anchor, group, shard)  # type: ignore[no-untyped-call]
    return rows


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, group: TableGroup, shard: TableShard) -> Tensor:
        first, num_rows = shard.first_row, len(shard.weight)
        ctx.group, ctx.rows = group, torch.arange(first, first + num_rows, device=anchor.device)
        if not group.access.is_on_host and shard.weight.dtype == torch.float32:
            return shard.weight.detach()  # without a copy, which would double the memory of the shard
        return gather_rows(*group.access.look_up(ctx.rows), torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.group.gradients.deliver(Delivery.of_rows(ctx.rows, grad.float().contiguous()))
        return None, None, None


class _DistinctRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, part: GroupRequest, counts: Tensor | None) -> Tensor:
        ctx.part, ctx.counts = part, counts
        return part.fetch_distinct()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.part.deliver(ctx.part.send_distinct_home(grad, ctx.counts))
        return None, None, None


class _OutputDist(torch.autograd.Function):
    """Pools at examples and at owners in one function, so that every rank runs the same collectives in one order."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, part: GroupRequest, found: Found, *weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.part = part
        own = [bags for bags, is_there in zip(part.bags, part.at_owner, strict=True) if not is_there]
        vectors = part.fetch(found)
        ctx.is_learned = any(ctx.needs_input_grad[3:])
        if ctx.is_learned:
            # `save_for_backward` makes backward raise if rows have changed: one rank pools directly from the table.
            ctx.save_for_backward(*vectors)
        here = pool_rows(*vectors, own) if own else []
        if part.sums is None or found.of_sums is None:
            return tuple(here)
        there = part.sums.fetch(*found.of_sums)
        from_here, from_there = iter(here), iter(there)
        return tuple(next(from_there if is_there else from_here) for is_there in part.at_owner)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Gradients are enabled here only for a second derivative. The guard that refuses one costs time, so it is
        # applied only then.
        return _backward_once(ctx, *grads) if torch.is_grad_enabled() else _backward(ctx, *grads)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    part: GroupRequest = ctx.part
    here = [number for number, is_there in enumerate(part.at_owner) if not is_there]
    if ctx.needs_input_grad[0]:  # False if all rows are frozen and only the weights of ids need gradients
        to_rows = _of_trained(part, grads)
        of_rows = part.send_home([to_rows[number] for number in here], [part.bags[number] for number in here])
        of_sums = None
        if part.sums is not None:
            pooled_there = [grad for grad, is_there in zip(to_rows, part.at_owner, strict=True) if is_there]
            of_sums = part.sums.send_home(pooled_there)
        part.deliver(of_rows, of_sums)
    of_weights: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 3)
    if ctx.is_learned:
        source, all_places = ctx.saved_tensors
        values = all_places.split([part.bags[number].num_values for number in here])
        for number, places in zip(here, values, strict=True):
            grad = grads[number]
            if ctx.needs_input_grad[3 + number] and grad is not None:
                of_weights[number] = grad_of_weights(source, places, part.bags[number], grad)
    return None, None, None, *of_weights


_backward_once = once_differentiable(_backward)


def _of_trained(part: GroupRequest, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Returns the gradients, with None for features whose tables are frozen."""
    if not (frozen := part.group.frozen):
        return grads
    return [
        None if feature.table_name in frozen else grad for feature, grad in zip(part.route.features, grads, strict=True)
    ]
