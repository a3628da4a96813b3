"""The features that a collection accepts, and the tables in which it looks them up."""

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
    """Returns the features by name; if `features` is None, one unpooled feature per table.

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
    """Returns the bags of a batch, after converting tensors of ids to bags.

    Raises:
        ValueError: the batch is not a mapping of names to bags or tensors of ids.
    """
    if type(batch) is not dict and not isinstance(batch, Mapping):  # `isinstance` of an abstract class is slower
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
    """Returns the shape of each tensor of ids [n, k] whose feature has no pooling, by name."""
    return {
        name: ids.shape
        for name, ids in batch.items()
        if type(ids) is not Jagged and isinstance(ids, Tensor) and ids.dim() == 2 and features[name].pooling == "none"
    }


class Route(NamedTuple):
    """Holds the features of a batch that are looked up in one table group.

    Attributes:
        number: index of the table group.
        names: names of the features, in the order of their tables and so of local rows, which makes sorting faster.
        tables: per feature, the position of its table in the group.
        features: per feature, its declaration.
    """

    number: int
    names: list[str]
    tables: list[int]
    features: list[FeatureSpec]


class Routes:
    """Finds the routes of batches, and caches them by the names of the features.

    Args:
        features: all features by name.
        places: per table, the index of its group and its position in the group.
    """

    def __init__(self, features: Mapping[str, FeatureSpec], places: Mapping[str, tuple[int, int]]) -> None:
        self.features = features
        self._place = {name: places[feature.table_name] for name, feature in features.items()}
        self._found: dict[tuple[str, ...], list[Route]] = {}
        self._checksums: dict[tuple[str, ...], int] = {}

    def group_of(self, name: str) -> int:
        """Returns the index of a feature's table group."""
        return self._place[name][0]

    def of(self, names: tuple[str, ...]) -> list[Route]:
        """Returns one route per table group that the features are looked up in.

        Raises:
            ValueError: `names` is empty, or a feature does not exist.
        """
        if names not in self._found:
            self._found[names] = self._find(names)
        return self._found[names]

    def checksum_of(self, names: tuple[str, ...]) -> int:
        """Returns a checksum of a set of features, an int64 that is equal in every process."""
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
        # In the order of groups, because the batches of different ranks may order their features differently.
        for number, own in sorted(members.items()):
            own.sort(key=lambda name: self._place[name][1])
            tables = [self._place[name][1] for name in own]
            routes.append(Route(number, own, tables, [self.features[name] for name in own]))
        return routes
