"""Where the bags of each feature are pooled: decided once, from bags that were measured, and again when bags change.

Sums cost fewer bytes than distinct rows if bags are long and their ids do not repeat. Counting takes time, so the ranks
count in the first step alone. They tell each other what they counted with the sizes of the exchange, and from the next
step on all pool alike. In every step they tell how many ids and bags they have, which costs nothing: if bags have
become much longer or shorter, the next step counts again.
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
"""Bags that have become so many times longer or shorter are measured again."""
_VALUE_BITS = 13
"""Batches of up to 2**13 ids are counted exactly, larger ones by 2**12 to 2**13 of their ids on average: what an error
may decide wrongly costs about the same both ways."""
_BAG_BITS = 10
"""However many ids they hold, of 2**10 bags or more at least 2**9 are looked at, on average."""
_ODD = 0xBF58476D1CE4E5B9 - (1 << 64)
"""A multiplier whose products have well-mixed high bits, as a signed integer; see `embedtrain.ops._backend.mix`."""


class PoolingChoice(NamedTuple):
    """Where the ranks pool the bags of a feature.

    Attributes:
        at_owner: whether the owners of its rows do.
        bag_size: ids per bag over all ranks when it was decided; 0 if the next batch is to be measured again.
    """

    at_owner: bool
    bag_size: float


PoolingChoices = Mapping[str, PoolingChoice]
"""By feature; a feature of which no id has come yet has none."""


class Measured(NamedTuple):
    """What one rank measured of a feature's batch, or all ranks together; bytes are 0 if they were not counted.

    Attributes:
        num_values: ids.
        num_bags: bags.
        sum_bytes: what travels if owners pool.
        row_bytes: what travels if the distinct rows do.
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
        ValueError: pooling at the owner is forced and weights want a gradient, which needs the rows.
    """
    needs_rows = weight is not None and weight.requires_grad and torch.is_grad_enabled()
    if feature.pool_at == "owner" and needs_rows:
        raise ValueError(
            f"feature {feature.name!r}: the gradient of its weights needs the rows, which pool_at='owner' leaves "
            "at their owners: declare pool_at='auto' or 'example', or detach the weights"
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
    """Returns what this rank measures of the features whose bags may be pooled on either side.

    Args:
        group: the features' tables.
        route: the features.
        bags: their batches.
        weights: the weights as the caller gave them.
        keys: [n] int64; see `TableGroup.keys_of`.
        choices: those made so far; bytes are counted for features without one, and if it is to be made again.

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
        # Bags of one id each can only lose and are not counted: the same bytes both ways leave them at the examples.
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
    """Returns whether owners pool a feature's batch; before the ranks have agreed, each goes by what it measured.

    Args:
        feature: its declaration.
        batch: its bags.
        choice: what the ranks agreed on; None for nothing yet.
        measured: of the batch; None if its bags are pooled where the feature says.
    """
    if measured is None:
        return feature.pool_at == "owner"
    if choice is not None:
        return choice.at_owner
    return measured.sum_bytes < measured.row_bytes


def agree(choices: PoolingChoices, measured: Mapping[str, Measured]) -> PoolingChoices:
    """Returns the choices for the next batch; the same on every rank.

    Args:
        choices: those so far.
        measured: by feature, of all ranks together.
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
    """Returns for each feature by itself the bytes of its sums and of its distinct rows.

    Both are counted, in large batches by a sample: distinct rows of all keys with a certain hash, sums of all bags
    whose number has it.
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
    """Returns how many distinct keys each of several features has, [num_features] int64; a sample's where many.

    Args:
        keys: [n] int64, feature after feature; all below `bound`.
        sizes: how many are each feature's.
    """
    bits = max(keys.numel().bit_length() - _VALUE_BITS, 0)
    places = _sample(keys, bits)
    feature = torch.bucketize(places, _ends(sizes, keys.device), right=True)
    pairs = sort_unique(keys[places] + feature * bound, bound=len(sizes) * bound, with_inverse=False).unique
    return torch.bincount(torch.div(pairs, bound, rounding_mode="floor"), minlength=len(sizes)) << bits


def count_sums(keys: Tensor, lengths: Sequence[Tensor], num_local_rows: int) -> Tensor:
    """Returns how many pairs of a bag and an owner of its rows each of several features has; a sample's where many.

    Args:
        keys: [n] int64, feature after feature and bag after bag.
        lengths: per feature [num_bags] int64, of its bags.
        num_local_rows: of each owner.
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
    """Returns the places of all keys with a certain hash: of each distinct key in 2**bits, on average."""
    if not bits:
        return torch.arange(keys.numel(), device=keys.device)
    # The high bits of the product are a hash of all of the key.
    hashes = keys * _ODD
    hashes >>= 64 - bits
    return (hashes == 0).nonzero().flatten()


def _ends(sizes: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(sizes, device=device).cumsum(0)
