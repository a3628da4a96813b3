"""Bags pooled where their rows are: their ids travel to the owners, and a sum per owner and bag comes back.

A bag's ids may lie on several ranks. Each owner adds up its own rows of the bag; the rank of the example adds the
owners' sums in order of rank, and divides a mean by the bag's length. In backward the gradient of each sum travels
to its owner, which hands it on to the bag's rows there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.distributed.stages import stage
from embedtrain.embedding.table_group import TableGroup
from embedtrain.jagged import places_of_runs
from embedtrain.ops.pool_rows import Bags, pool_rows
from embedtrain.ops.row_gradient import Delivery
from embedtrain.ops.sort_unique import sort_unique
from embedtrain.sharding.cost import Wire, bytes_of_rows, bytes_of_sums
from embedtrain.spec import FeatureSpec

_VALUE_BITS = 13
"""Batches of up to 2**13 ids are counted exactly, larger ones by 2**12 to 2**13 of their ids on average: what an error
may decide wrongly costs about the same both ways."""
_BAG_BITS = 10
"""However many ids they hold, of 2**10 bags or more at least 2**9 are looked at, on average."""
_ODD = 0xBF58476D1CE4E5B9 - (1 << 64)
"""A multiplier whose products have well-mixed high bits, as a signed integer; see `embedtrain.ops._backend.mix`."""


def choose_owner(
    group: TableGroup,
    features: Sequence[FeatureSpec],
    bags: Sequence[Bags],
    weights: Sequence[Tensor | None],
    keys: Tensor,
) -> list[bool]:
    """Decides for each feature of this rank's batch whether the owners of its rows pool its bags.

    A function of the batch alone, so that a resumed run decides alike; ranks may decide differently.

    Args:
        group: the features' tables.
        features: their declarations.
        bags: their batches.
        weights: the weights as the caller gave them.
        keys: [n] int64; see `TableGroup.keys_of`.

    Raises:
        ValueError: pooling at the owner is forced where weights want a gradient, which needs the rows.
    """
    chosen = [False] * len(features)
    undecided = []
    for number, (feature, batch, weight) in enumerate(zip(features, bags, weights, strict=True)):
        needs_rows = weight is not None and weight.requires_grad and torch.is_grad_enabled()
        if feature.pool_at == "owner" and needs_rows:
            raise ValueError(
                f"feature {feature.name!r}: the gradient of its weights needs the rows, which pool_at='owner' leaves "
                "at their owners: declare pool_at='auto' or 'example', or detach the weights"
            )
        chosen[number] = feature.pool_at == "owner"
        # Bags of one id each can only lose.
        is_open = feature.pool_at == "auto" and feature.pooling != "none" and batch.num_values > batch.num_bags
        if is_open and not needs_rows:
            undecided.append(number)
    if undecided:
        parts = keys.split([batch.num_values for batch in bags])
        moves_less = _moves_less(
            group, [bags[number] for number in undecided], torch.cat([parts[number] for number in undecided])
        )
        for number, is_cheaper in zip(undecided, moves_less, strict=True):
            chosen[number] = is_cheaper
    return chosen


def _moves_less(group: TableGroup, bags: Sequence[Bags], keys: Tensor) -> list[bool]:
    """Returns for each feature by itself whether sums cost fewer bytes than its distinct rows.

    Both are counted, in large batches by a sample: distinct rows of all keys with a certain hash, sums of all bags
    whose number has it.
    """
    with stage("unique"):
        bound = group.ranks.size * group.num_local_rows
        num_rows = count_rows(keys, [feature.num_values for feature in bags], bound)
        num_sums = count_sums(keys, [_lengths_of(feature, keys.device) for feature in bags], group.num_local_rows)
    dim = group.weight.shape[1]
    wire = Wire(
        id_bytes=id_type(group).itemsize,
        vector_bytes=group.vector_wire_dtype.itemsize,
        gradient_bytes=group.gradient_wire_dtype.itemsize,
        has_gradients=torch.is_grad_enabled(),
    )
    return [
        bytes_of_sums(feature.num_values, of_sums, dim, wire, is_weighted=feature.weights is not None)
        < bytes_of_rows(of_rows, dim, wire)
        for feature, (of_rows, of_sums) in zip(bags, torch.stack([num_rows, num_sums], dim=1).tolist(), strict=True)
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
    _, pairs = _owner_and_bag(keys[places], own_lengths, num_local_rows)
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


class BagsAsked:
    """This rank's bags whose rows their owners shall add up.

    Args:
        group: the tables.
        bags: the features; there may be none.
        keys: [n] int64; the keys of their rows, feature after feature.

    Attributes:
        id_counts: [world_size] int64; ids for each owner.
        sum_counts: [world_size] int64; bags for each owner, which is how many sums it owes.
        is_weighted: whether ids have factors.
    """

    def __init__(self, group: TableGroup, bags: Sequence[Bags], keys: Tensor) -> None:
        self.bags = bags
        self.num_bags = sum(feature.num_bags for feature in bags)
        self.is_weighted = any(feature.weights is not None for feature in bags)
        with stage("unique"):
            lengths = torch.cat([keys.new_zeros(0), *(_lengths_of(feature, keys.device) for feature in bags)])
            owner, pairs = _owner_and_bag(keys, lengths, group.num_local_rows)
            self._rows = torch.sub(keys, owner, alpha=group.num_local_rows)
            bound = group.ranks.size * max(self.num_bags, 1)
            self._by_owner = sort_unique(pairs, bound=bound, with_inverse=False)
        ranks = torch.arange(group.ranks.size + 1, device=keys.device)
        ends = torch.searchsorted(self._by_owner.unique, ranks * self.num_bags)
        self.sum_counts = ends.diff()
        self.id_counts = self._by_owner.starts[ends].diff()

    def payload(self, dtype: torch.dtype, is_weighted: bool) -> Tensor:
        """Returns what travels to the owners: [n] rows, or [n, 2] rows and the bits of their weights.

        The first row of each bag is stored as its complement, a negative number, so that lengths need not travel.
        """
        rows = self._rows[self._by_owner.order]
        firsts = self._by_owner.starts[:-1]
        rows[firsts] = ~rows[firsts]
        if not is_weighted:
            return rows.to(dtype)
        weights = torch.cat(
            [
                rows.new_ones(feature.num_values, dtype=torch.float32) if feature.weights is None else feature.weights
                for feature in self.bags
            ]
            or [rows.new_zeros(0, dtype=torch.float32)]
        )
        return torch.stack([rows.to(dtype), weights[self._by_owner.order].view(torch.int32).to(dtype)], dim=1)

    def add_up(self, sums: Tensor) -> list[Tensor]:
        """Returns per feature [num_bags, dim]: the owners' sums added in order of rank, means divided."""
        by_bag = sort_unique(self._bag_of_sum, bound=max(self.num_bags, 1), with_inverse=False)
        num_owners = torch.zeros(self.num_bags, dtype=torch.int64, device=sums.device)
        num_owners[by_bag.unique] = by_bag.starts.diff()
        factors = self._factors()
        weights = None if factors is None else factors[self._bag_of_sum[by_bag.order]]
        (pooled,) = pool_rows(sums, by_bag.order, [Bags(sums.shape[0], num_owners, weights)])
        # `data` is no view to autograd: the caller may change one feature's vectors in place.
        return [part.data for part in pooled.split([feature.num_bags for feature in self.bags])]

    def share_out(self, grads: Sequence[Tensor | None], dim: int) -> Tensor:
        """Returns [num_sums, dim] float32; the gradient of each owner's sum, in order of owner."""
        of_bags = torch.cat(
            [
                self._rows.new_zeros(feature.num_bags, dim, dtype=torch.float32) if grad is None else grad
                for feature, grad in zip(self.bags, grads, strict=True)
            ]
            or [self._rows.new_zeros(0, dim, dtype=torch.float32)]
        )
        factors = self._factors()
        weights = None if factors is None else factors[self._bag_of_sum]
        (shared,) = pool_rows(of_bags, self._bag_of_sum, [Bags(self._bag_of_sum.numel(), None, weights)])
        return shared

    @property
    def _bag_of_sum(self) -> Tensor:
        """[num_sums] int64, in order of owner; bags are numbered through all features."""
        return self._by_owner.unique % max(self.num_bags, 1)

    def _factors(self) -> Tensor | None:
        """Returns [num_bags] float32, what a bag's sum is multiplied by; None where it is 1 for all."""
        if not any(feature.is_mean for feature in self.bags):
            return None
        parts = []
        for feature in self.bags:
            lengths = _lengths_of(feature, self._rows.device)
            parts.append(1.0 / lengths.clamp(min=1).float() if feature.is_mean else torch.ones_like(lengths).float())
        return torch.cat(parts)


class BagsOwed:
    """What the ranks settled for the bags of a group that the owners of their rows pool.

    Args:
        group: the tables.
        asked: this rank's bags.
        counts: of sums, from each rank and for each.
        owed: the ids of other ranks' bags, as `BagsAsked.payload` of every rank sent them to this one.
        is_weighted: whether ids have factors.

    Attributes:
        rows: [n] int64; the local rows that this rank adds up.
    """

    def __init__(
        self,
        group: TableGroup,
        asked: BagsAsked,
        counts: tuple[Sequence[int], Sequence[int]],
        owed: Tensor,
        *,
        is_weighted: bool,
    ) -> None:
        self._asked, self._group = asked, group
        self._ask_counts, self._owe_counts = counts
        signed = (owed[:, 0] if is_weighted else owed).long()
        weights = owed[:, 1].to(torch.int32).view(torch.float32) if is_weighted else None
        is_first = signed < 0
        self.rows = torch.where(is_first, ~signed, signed)
        starts = is_first.nonzero().flatten()
        lengths = torch.cat([starts, starts.new_tensor([signed.numel()])]).diff()
        self._owed = Bags(signed.numel(), lengths, weights)

    def pool(self) -> Tensor:
        """Returns the sums that this rank owes, [num_sums, dim], as they travel."""
        (sums,) = pool_rows(*self._group.access.look_up(self.rows), [self._owed])
        # Sums have no storage to be exact to: they travel as gradients do, in float32 unless chosen otherwise.
        return sums.to(self._group.gradient_wire_dtype)

    def fetch(self, sums: Tensor) -> list[Tensor]:
        """Returns this rank's bags, pooled: per feature [num_bags, dim] float32. Collective: every rank.

        Args:
            sums: what `pool` returned.
        """
        return self._asked.add_up(self._group.ranks.all_to_all(sums, self._owe_counts, self._ask_counts))

    def send_home(self, grads: Sequence[Tensor | None]) -> None:
        """Sends the gradients of the pooled vectors to the owners, where those of the rows wait for an optimizer.

        Collective: every rank.
        """
        group = self._group
        shares = self._asked.share_out(grads, group.weight.shape[1]).to(group.gradient_wire_dtype)
        received = group.ranks.all_to_all(shares, self._ask_counts, self._owe_counts)
        group.gradients.deliver(Delivery(self.rows, [self._owed], [received.float()]))


def _owner_and_bag(keys: Tensor, lengths: Tensor, num_local_rows: int) -> tuple[Tensor, Tensor]:
    """Returns the owner of each value's row, and `owner * number of bags + bag`; bags are numbered through."""
    owner = torch.div(keys, num_local_rows, rounding_mode="floor")
    # In place: fresh memory of this size costs more than the arithmetic.
    bag = torch.repeat_interleave(lengths, output_size=keys.numel())
    return owner, bag.add_(owner, alpha=max(lengths.numel(), 1))


def _lengths_of(feature: Bags, device: torch.device) -> Tensor:
    if feature.lengths is None:
        return torch.ones(feature.num_values, dtype=torch.int64, device=device)
    return feature.lengths


def id_type(group: TableGroup) -> torch.dtype:
    """Returns in which type local rows travel: half the bytes, where they fit."""
    return torch.int32 if group.num_local_rows < 1 << 31 else torch.int64
