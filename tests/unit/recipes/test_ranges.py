"""Every number of a configuration has a range, which is checked before a run begins."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest

from embedtrain.config.sections import Config
from embedtrain.errors import UserError
from embedtrain.recipes.loading import load_config
from embedtrain.recipes.optimizers import check_optimizers
from embedtrain.recipes.registry import BUILT_IN

GIVEN = {
    "word2vec": ["data.path=x"],
    "retrieval": ["data.path=x", "items.path=i", "items.features={c: {}}", "items.hidden=[8]"],
    "sasrec": ["data.path=x"],
    "ranking": ["data.path=x", "data.categorical=[a]", "data.features={a: {dim: 4, num_rows: 5, min_count: 1}}"],
}
ANY_SIZE = {
    "seed",
    "optimizer.reset_state_from_step",
    "checkpoint.max_extra_memory_bytes",
    "checkpoint.max_failures",
    "data.max_bad_lines",
}
"""Any number of 64 bits, or any that is not negative, has a meaning for these."""
MAY_BE_NEGATIVE = {"seed", "retrieval.margin"}


def numbers(section: Any, prefix: str = "") -> Iterator[tuple[str, set[type]]]:
    """Yields the keys that take numbers, with the types that they take."""
    hints = get_type_hints(type(section))
    for each in dataclasses.fields(section):
        hint, value = hints[each.name], getattr(section, each.name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{prefix}{each.name}.")
        elif isinstance(value, dict) and all(map(dataclasses.is_dataclass, value.values())):
            for name, entry in value.items():
                yield from numbers(entry, f"{prefix}{each.name}.{name}.")
        elif kinds := {hint, *get_args(hint)} & {int, float, list[int]}:
            yield f"{prefix}{each.name}", kinds


def refusal(config: Config, key: str, value: Any) -> str:
    """Returns what is said of a configuration with another value; as `load_config` checks it, which takes longer."""
    changed = copy.deepcopy(config)
    *path, name = key.split(".")
    section: Any = changed
    for part in path:
        section = section[part] if isinstance(section, dict) else getattr(section, part)
    setattr(section, name, value)
    try:
        changed.check()
        check_optimizers(changed.optimizer)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("model", BUILT_IN)
def test_numbers_that_cannot_be_are_refused_with_their_key(model: str) -> None:
    config = load_config(None, [f"model={model}", *GIVEN[model]])
    keys = dict(numbers(config))
    assert len(keys) > 20
    for key, kinds in keys.items():
        for value in (-3, 1e300 if float in kinds else 10**18):
            if key not in (MAY_BE_NEGATIVE if value == -3 else ANY_SIZE):
                assert key in refusal(config, key, [value] if list[int] in kinds else value), (key, value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("word2vec.power=75", r"word2vec\.power must be in \[-2, 2\], got 75"),
        ("data.min_count=0", r"data\.min_count must be at least 1, got 0"),
        ("optimizer.tables.output.eps=-1", r"optimizer\.tables\.output\.eps must be finite and not negative, got -1"),
        ("optimizer.max_grad_norm=0", r"optimizer\.max_grad_norm must be positive, got 0"),
    ],
)
def test_some_numbers_and_what_is_said_of_them(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, ["data.path=x", setting])
