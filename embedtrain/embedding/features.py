"""Which features a collection accepts, and where it looks them up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from embedtrain.jagged import Jagged
from embedtrain.spec import FeatureSpec, TableSpec


def resolve_features(tables: Sequence[TableSpec], features: Sequence[FeatureSpec] | None) -> dict[str, FeatureSpec]:
    """Returns the features by name; where None, one per table.

    Raises:
        ValueError: there is no table, a name repeats, or a feature's table does not exist.
    """
    if not tables:
        raise ValueError("a collection needs at least one table")
    if features is None:
        features = [FeatureSpec(table.name) for table in tables]
    for kind, names in (("table", [t.name for t in tables]), ("feature", [f.name for f in features])):
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{kind} names must be unique, got {', '.join(repeated)} more than once")
    known = [table.name for table in tables]
    for feature in features:
        if feature.table_name not in known:
            raise ValueError(
                f"feature {feature.name!r} is looked up in table {feature.table_name!r}, "
                f"which does not exist; the tables are {', '.join(known)}"
            )
    return {feature.name: feature for feature in features}


def as_bags(batch: object) -> Mapping[str, Jagged]:
    """Returns the bags of a batch, of which tensors of ids are made too.

    Raises:
        ValueError: it is something else.
    """
    if type(batch) is not dict and not isinstance(batch, Mapping):  # an abstract class takes longer to ask
        raise ValueError(
            f"expected a batch that has ids per feature, such as {{'item': ids}}, got {type(batch).__name__}"
        )
    for bags in batch.values():
        if type(bags) is not Jagged:
            break
    else:
        return batch
    for name, ids in batch.items():
        if not isinstance(ids, Jagged | Tensor):
            raise ValueError(f"feature {name!r}: expected a Jagged or a tensor of ids, got {type(ids).__name__}")
        if isinstance(ids, Tensor) and (ids.dim() not in (1, 2) or ids.dtype not in (torch.int64, torch.int32)):
            raise ValueError(
                f"feature {name!r}: expected ids [n] or [n, k], int64 or int32, got {ids.dtype} {tuple(ids.shape)}"
            )
    return {name: ids if isinstance(ids, Jagged) else Jagged.from_ids(ids) for name, ids in batch.items()}


def shapes_of(batch: Mapping[str, Jagged | Tensor], features: Mapping[str, FeatureSpec]) -> dict[str, torch.Size]:
    """Returns the shapes of the tensors [n, k] of ids that features without pooling look up."""
    return {
        name: ids.shape
        for name, ids in batch.items()
        if type(ids) is not Jagged and isinstance(ids, Tensor) and ids.dim() == 2 and features[name].pooling == "none"
    }


class Route(NamedTuple):
    """What batches of certain features look up in one group of tables.

    Attributes:
        number: the group's.
        names: the features, in order of their tables: of local rows, which helps to sort.
        tables: the positions of their tables in the group.
        features: their declarations.
    """

    number: int
    names: list[str]
    tables: list[int]
    features: list[FeatureSpec]


class Routes:
    """Where batches are looked up, found once for each choice of features.

    Args:
        features: by name.
        places: of each table, the number of its group, and its position there.
    """

    def __init__(self, features: Mapping[str, FeatureSpec], places: Mapping[str, tuple[int, int]]) -> None:
        self.features = features
        self._place = {name: places[feature.table_name] for name, feature in features.items()}
        self._found: dict[tuple[str, ...], list[Route]] = {}
        self._checksums: dict[tuple[str, ...], int] = {}

    def group_of(self, name: str) -> int:
        """Returns the number of a feature's group."""
        return self._place[name][0]

    def of(self, names: tuple[str, ...]) -> list[Route]:
        """Returns where features are looked up, by group.

        Raises:
            ValueError: one does not exist, or there is none.
        """
        if names not in self._found:
            self._found[names] = self._find(names)
        return self._found[names]

    def checksum_of(self, names: tuple[str, ...]) -> int:
        """Returns a number, the same in every process, by which sets of features are told apart; int64."""
        if names not in self._checksums:
            text = json.dumps(sorted(map(str, names))).encode()
            self._checksums[names] = xxh3_64_intdigest(text) - (1 << 63)
        return self._checksums[names]

    def _find(self, names: tuple[str, ...]) -> list[Route]:
        unknown = [name for name in names if name not in self.features]
        if unknown or not names:
            raise ValueError(f"expected a batch of the features {list(self.features)}, got {list(names)}")
        members: dict[int, list[str]] = {}
        for name in names:
            members.setdefault(self.group_of(name), []).append(name)
        routes = []
        # In order of the groups, not of the batch: ranks may name their features in different orders.
        for number, own in sorted(members.items()):
            own.sort(key=lambda name: self._place[name][1])
            tables = [self._place[name][1] for name in own]
            routes.append(Route(number, own, tables, [self.features[name] for name in own]))
        return routes
