"""Which features a collection accepts."""

from __future__ import annotations

from collections.abc import Sequence

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
