"""Drafts a first configuration for data files with columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from embedtrain.data.survey import survey
from embedtrain.errors import UserError
from embedtrain.recipes.registry import BUILT_IN, recipe_of


def draft(path: str, model: str | None = None, label: str | None = None) -> str:
    """Returns a first configuration as YAML for data files with columns.

    Args:
        path: a file, a glob or a folder of csv, tsv, jsonl or parquet.
        model: name of the model; None for the first model that can use the columns. Models that predict a column are
            tried first.
        label: the column that the model predicts; None to guess it.

    Raises:
        UserError: the files cannot be read, or the model cannot use their columns.
    """
    names = [name for name in reversed(BUILT_IN) if recipe_of(name).draft is not None]
    if model is not None and model not in names:
        *others, last = names
        drafted = f"{', '.join(others)} and {last}"
        raise UserError(f"--from drafts configurations of {drafted}, not of {model!r}; leave out --from")
    found = survey(path)
    errors: dict[str, list[str]] = {}  # by message, the models that it rules out
    for name in names if model is None else [model]:
        make = recipe_of(name).draft
        assert make is not None
        try:
            return (
                "\n".join(make(path, replace(found, remarks=[*found.remarks, *_reasons(path, errors)]), label)) + "\n"
            )
        except UserError as error:
            errors.setdefault(str(error), []).append(name)
    # With a label only the first error matters, because only the first model predicts a column.
    first, *others = errors
    raise UserError(f"{path}: {'; '.join(_reasons(path, errors))}" if others and label is None else first)


def _reasons(path: str, errors: Mapping[str, Sequence[str]]) -> list[str]:
    return [
        f"no configuration of {' and '.join(models)}: {error.removeprefix(f'{path}: ')}"
        for error, models in errors.items()
    ]
