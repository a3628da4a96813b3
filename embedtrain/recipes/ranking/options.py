"""Converts the configuration of a ranking run into options of its data and its model."""

from __future__ import annotations

from typing import Any

from embedtrain.data.click_log import ClickLayout
from embedtrain.data.click_schema import CRITEO_CATEGORICAL, CategoricalColumn, ClickSchema, require_columns
from embedtrain.data.readers import FORMATS
from embedtrain.recipes.base import table_spec
from embedtrain.recipes.layout import layout_of
from embedtrain.recipes.ranking.config import ClicksConfig, FeatureConfig, NetworkConfig, RankingConfig
from embedtrain.recipes.ranking.model import NetworkOptions
from embedtrain.spec import TableSpec


def click_schema(data: ClicksConfig) -> ClickSchema:
    """Returns the schema that a section describes.

    Raises:
        UserError: settings contradict one another.
    """
    if data.format == "criteo":
        names = tuple(data.categorical) or CRITEO_CATEGORICAL
        require_columns(names, CRITEO_CATEGORICAL, "data.categorical")
    else:
        names = tuple(data.categorical)
    require_columns(list(data.features), names, "data.features")
    columns = [_column(name, data.features.get(name, FeatureConfig()), data) for name in names]
    if data.format == "criteo":
        return ClickSchema.criteo(columns, data.dense_transform)
    layout = layout_of(data, "data")
    return ClickSchema(
        file_format=data.format,
        label=data.label,
        dense=tuple(data.dense),
        categorical=tuple(columns),
        positive=data.positive,
        columns=layout.columns,
        delimiter=layout.delimiter or FORMATS[data.format].delimiter,
        quote=layout.quote,
        dense_transform=data.dense_transform,
    )


def _column(name: str, feature: FeatureConfig, data: ClicksConfig) -> CategoricalColumn:
    num_rows = data.num_rows if feature.num_rows is None else feature.num_rows
    encoding = feature.encoding or data.encoding or ("vocabulary" if num_rows is None else "hash")
    return CategoricalColumn(
        name=name,
        num_rows=num_rows,
        encoding=encoding,
        min_count=data.min_count if feature.min_count is None else feature.min_count,
        is_bag=feature.bag,
        separator=feature.separator,
    )


def network_options(section: NetworkConfig) -> NetworkOptions:
    """Returns the options of the dense part from the configuration.

    Raises:
        UserError: an option is out of range.
    """
    return NetworkOptions(
        architecture=section.architecture,
        bottom=tuple(section.bottom),
        top=tuple(section.top),
        num_cross_layers=section.num_cross_layers,
        low_rank=section.low_rank,
    )


def feature_options(config: RankingConfig, name: str) -> FeatureConfig:
    """Returns the settings of a categorical column."""
    return config.data.features.get(name, FeatureConfig())


def network_inputs(config: RankingConfig) -> dict[str, Any]:
    """Returns the input columns of the network by key, in its order, and the widths of the categorical ones."""
    schema = click_schema(config.data)
    names = [column.name for column in schema.categorical]
    dims = {f"data.features.{name}.dim": feature_options(config, name).dim or config.table.dim for name in names}
    return {"data.categorical": names, "data.dense": list(schema.dense), **dims}


def ranking_tables(config: RankingConfig, layout: ClickLayout) -> list[TableSpec]:
    """Returns the table of each categorical column, in the order of `ClickLayout.feature_names`."""
    return [
        # Initial values as in DLRM: most rows of a large table are rare; near zero they add no noise.
        table_spec(
            config,
            name,
            layout.num_rows[name],
            dim=feature_options(config, name).dim,
            init_scale=layout.num_rows[name] ** -0.5,
        )
        for name in layout.feature_names
    ]
