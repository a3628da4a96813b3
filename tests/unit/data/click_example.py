"""A small click log in the Criteo layout, and how the tests read prepared logs back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from embedtrain.data.click_batches import ClickBatch
from embedtrain.data.click_log import ClickLog
from embedtrain.data.click_schema import CRITEO_CATEGORICAL, CategoricalColumn, ClickSchema
from embedtrain.data.prepare_clicks import ClickOptions, prepare_clicks
from embedtrain.distributed.ranks import ONE_PROCESS


def criteo_line(label: object = 1, dense: Sequence[object] = (), tokens: Sequence[str] = ()) -> str:
    """A line; numbers and tokens that are not given are missing."""
    numbers = [str(value) for value in dense] + [""] * (13 - len(dense))
    return "\t".join([str(label), *numbers, *tokens, *[""] * (26 - len(tokens))])


def criteo_schema(num_rows: int | None = 1000) -> ClickSchema:
    encoding = "vocabulary" if num_rows is None else "hash"
    columns = [CategoricalColumn(name=name, num_rows=num_rows, encoding=encoding) for name in CRITEO_CATEGORICAL]
    return ClickSchema.criteo(columns)


def write_criteo(path: Path, num_lines: int, seed: int = 0) -> Path:
    """Writes lines of Zipf-like tokens, some values missing."""
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(num_lines):
        dense = ["" if generator.random() < 0.2 else int(generator.integers(-2, 500)) for _ in range(13)]
        tokens = [
            "" if generator.random() < 0.1 else f"{int(50 * generator.random() ** 3) * 2654435761 % 2**32:08x}"
            for _ in range(26)
        ]
        lines.append(criteo_line(int(generator.integers(2)), dense, tokens))
    path.write_text("\n".join(lines) + "\n")
    return path


def prepared(path: Path | str | list[str], schema: ClickSchema, cache: Path, **options: object) -> ClickLog:
    settings = {name: options.pop(name) for name in ("max_bad_lines",) if name in options}
    given = path if isinstance(path, list) else str(path)
    return prepare_clicks(ClickOptions(path=given, schema=schema, **settings), str(cache), ONE_PROCESS, **options)  # type: ignore[arg-type]


def examples_of(batch: ClickBatch) -> list[tuple[object, ...]]:
    """The examples of a batch as tuples that can be compared."""
    bags = {name: jagged.values.split(jagged.lengths.tolist()) for name, jagged in batch.features.items()}
    return [
        (float(batch.labels[i]), *batch.dense[i].tolist(), *(tuple(bag[i].tolist()) for bag in bags.values()))
        for i in range(batch.num_examples)
    ]
