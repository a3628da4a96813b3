"""Decides from measured batches whether the bags of a feature are pooled at examples or at owners.

Sums need fewer bytes than distinct rows if bags are long and ids rarely repeat. Counting both takes time, so the ranks
count only in the first step. They exchange the counts together with the split sizes, and all ranks follow one choice
from the next step on. The number of ids and bags is exchanged in every step at no extra cost: if the mean bag size has
changed much, the next step counts again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from embedtrain.distributed.stages import stage
from embedtrain.embedding.features import Route
from embedtrain.embedding.owner_pooling import id_type
from embedtrain.embedding.table_group import TableGroup
from embedtrain.jagged import places_of_runs
from embedtrain.ops._backend.transfer import to_host
from embedtrain.ops.owner_bags import lengths_of, owner_and_bag
from embedtrain.ops.pool_rows import Bags
from embedtrain.ops.sort_unique import sort_unique
from embedtrain.sharding.cost import Wire, bytes_of_rows, bytes_of_sums
from embedtrain.spec import FeatureSpec

_MUCH = 2.0
"""Factor by which the mean bag size must change before bags are counted again."""
_VALUE_BITS = 13
"""Batches of up to 2**13 ids are counted exactly, larger batches by a sample of 2**12 to 2**13 ids on average. An error
of the sample can only decide wrongly if both ways cost about the same."""
_BAG_BITS = 10
"""Of 2**10 bags or more, the sample has at least 2**9 bags on average, for any number of ids."""
_ODD = 0xBF58476D1CE4E5B9 - (1 << 64)
"""A multiplier whose products have well-mixed high bits, as a signed integer; see `embedtrain.ops._backend.mix`."""


class PoolingChoice(NamedTuple):
    """Holds the decision for one feature.

    Attributes:
        at_owner: whether owners pool its bags; else the ranks of the examples do.
        bag_size: mean number of ids per bag over all ranks at the decision; 0 if the next batch must be counted again.
    """

    at_owner: bool
    bag_size: float


PoolingChoices = Mapping[str, PoolingChoice]
"""Choices by feature; a feature that had no ids yet is missing."""


class Measured(NamedTuple):
    """Holds the measurements of a feature's batch, on one rank or summed over ranks.

    Attributes:
        num_values: number of ids.
        num_bags: number of bags.
        sum_bytes: bytes sent if owners pool; 0 if not counted.
        row_bytes: bytes sent if examples pool, for the distinct rows; 0 if not counted.
    """

    num_values: int = 0
    num_bags: int = 0
    sum_bytes: int = 0
    row_bytes: int = 0


def is_open(feature: FeatureSpec) -> bool:
    """Returns whether a feature's bags may be pooled on either side."""
    return feature.pool_at == "auto" and feature.pooling != "none"


def may_choose(feature: FeatureSpec, weight: Tensor | None) -> bool:
    """Returns whether a batch of a feature may be pooled on either side.

    Raises:
        ValueError: `pool_at` is "owner" but the weights need a gradient, for which the example needs the rows.
    """
    needs_rows = weight is not None and weight.requires_grad and torch.is_grad_enabled()
    if feature.pool_at == "owner" and needs_rows:
        raise ValueError(
            f"feature {feature.name!r}: the gradient of its weights needs the rows, which pool_at='owner' does not "
            "send: declare pool_at='auto' or 'example', or detach the weights"
        )
    return is_open(feature) and not needs_rows


def measure(
    group: TableGroup,
    route: Route,
    bags: Sequence[Bags],
    weights: Sequence[Tensor | None],
    keys: Tensor,
    choices: PoolingChoices,
) -> dict[str, Measured]:
    """Measures this rank's batches of the features whose bags may be pooled on either side.

    Args:
        group: tables of the features.
        route: the features.
        bags: bags per feature.
        weights: per feature, the weights that the caller gave.
        keys: [n] int64; see `TableGroup.keys_of`.
        choices: the choices so far. Bytes are counted only for features without a choice, or with a bag size of 0.

    Raises:
        ValueError: see `may_choose`.
    """
    measured: dict[str, Measured] = {}
    to_count = []
    for number, (name, feature, batch, weight) in enumerate(
        zip(route.names, route.features, bags, weights, strict=True)
    ):
        if not may_choose(feature, weight) or not batch.num_values:
            continue
        choice = choices.get(name)
        is_due = choice is None or not choice.bag_size
        # Bags of one id each are never cheaper at owners. They are not counted: equal bytes choose the example.
        measured[name] = Measured(batch.num_values, batch.num_bags, int(is_due), int(is_due))
        if is_due and batch.num_values > batch.num_bags:
            to_count.append(number)
    if to_count:
        parts = keys.split([batch.num_values for batch in bags])
        counted = _bytes_of_both(
            group, [bags[number] for number in to_count], torch.cat([parts[number] for number in to_count])
        )
        for number, (sum_bytes, row_bytes) in zip(to_count, counted, strict=True):
            name = route.names[number]
            measured[name] = measured[name]._replace(sum_bytes=sum_bytes, row_bytes=max(row_bytes, 1))
    return measured


def chosen_owner(feature: FeatureSpec, batch: Bags, choice: PoolingChoice | None, measured: Measured | None) -> bool:
    """Returns whether owners pool a feature's batch.

    Args:
        feature: declaration of the feature.
        batch: its bags.
        choice: choice of all ranks; None before there is one, when each rank follows its own measurement.
        measured: measurement of the batch; None if `pool_at` alone decides.
    """
    if measured is None:
        return feature.pool_at == "owner"
    if choice is not None:
        return choice.at_owner
    return measured.sum_bytes < measured.row_bytes


def agree(choices: PoolingChoices, measured: Mapping[str, Measured]) -> PoolingChoices:
    """Returns the choices for the next batch, equal on every rank.

    Args:
        choices: the choices so far.
        measured: per feature, the measurements summed over all ranks.
    """
    changed: dict[str, PoolingChoice] = {}
    for name, total in measured.items():
        if not total.num_values:
            continue
        size, choice = total.num_values / total.num_bags, choices.get(name)
        if total.row_bytes:
            changed[name] = PoolingChoice(total.sum_bytes < total.row_bytes, size)
        elif choice is not None and not choice.bag_size / _MUCH <= size <= choice.bag_size * _MUCH:
            changed[name] = PoolingChoice(choice.at_owner, 0.0)
    return {**choices, **changed} if changed else choices


def _bytes_of_both(group: TableGroup, bags: Sequence[Bags], keys: Tensor) -> list[tuple[int, int]]:
    """Returns per feature the bytes of its sums and of its distinct rows.

    Large batches are sampled by hash: distinct rows are counted among the keys with a certain hash, sums among the bags
    whose index has it.
    """
    with stage("unique"):
        bound = group.ranks.size * group.num_local_rows
        num_rows = count_rows(keys, [feature.num_values for feature in bags], bound)
        num_sums = count_sums(keys, [lengths_of(feature, keys.device) for feature in bags], group.num_local_rows)
    counts = to_host(torch.stack([num_rows, num_sums], dim=1)).tolist()
    dim = group.weight.shape[1]
    wire = Wire(
        id_bytes=id_type(group).itemsize,
        vector_bytes=group.vector_wire_dtype.itemsize,
        gradient_bytes=group.gradient_wire_dtype.itemsize,
        has_gradients=torch.is_grad_enabled(),
    )
    return [
        (
            bytes_of_sums(feature.num_values, of_sums, dim, wire, is_weighted=feature.weights is not None),
            bytes_of_rows(of_rows, dim, wire),
        )
        for feature, (of_rows, of_sums) in zip(bags, counts, strict=True)
    ]


def count_rows(keys: Tensor, sizes: Sequence[int], bound: int) -> Tensor:
    """Returns the number of distinct keys per feature, [num_features] int64; estimated from a sample if there are many.

    Args:
        keys: [n] int64, feature after feature; all below `bound`.
        sizes: number of keys per feature.
        bound: upper bound of the keys.
    """
    bits = max(keys.numel().bit_length() - _VALUE_BITS, 0)
    places = _sample(keys, bits)
    feature = torch.bucketize(places, _ends(sizes, keys.device), right=True)
    pairs = sort_unique(keys[places] + feature * bound, bound=len(sizes) * bound, with_inverse=False).unique
    return torch.bincount(torch.div(pairs, bound, rounding_mode="floor"), minlength=len(sizes)) << bits


def count_sums(keys: Tensor, lengths: Sequence[Tensor], num_local_rows: int) -> Tensor:
    """Returns the number of pairs of a bag and an owner of its rows, per feature; estimated from a sample if many.

    Args:
        keys: [n] int64, feature after feature and bag after bag.
        lengths: per feature, the lengths of its bags, [num_bags] int64.
        num_local_rows: number of rows per owner.
    """
    together = torch.cat(list(lengths))
    bits = max(min(keys.numel().bit_length() - _VALUE_BITS, together.numel().bit_length() - _BAG_BITS), 0)
    bags = _sample(torch.arange(together.numel(), device=keys.device), bits)
    own_lengths = together[bags]
    places = places_of_runs((together.cumsum(0) - together)[bags], own_lengths)
    _, pairs = owner_and_bag(keys[places], own_lengths, num_local_rows)
    distinct = sort_unique(pairs, with_inverse=False).unique
    ends = _ends([each.numel() for each in lengths], keys.device)
    feature = torch.bucketize(bags[distinct % max(bags.numel(), 1)], ends, right=True)
    return torch.bincount(feature, minlength=len(lengths)) << bits


def _sample(keys: Tensor, bits: int) -> Tensor:
    """Returns the indices of all keys with a certain hash, which one of 2**bits distinct keys has on average."""
    if not bits:
        return torch.arange(keys.numel(), device=keys.device)
    # The high bits of the product depend on all bits of the key.
    hashes = keys * _ODD
    hashes >>= 64 - bits
    return (hashes == 0).nonzero().flatten()


def _ends(sizes: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(sizes, device=device).cumsum(0)
