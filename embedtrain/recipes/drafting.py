"""Drafts a first configuration for data files with columns."""

from __future__ import annotations

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
        raise UserError(f"--from drafts configurations of {' and '.join(names)}, not of {model!r}; leave out --from")
    found = survey(path)
    reasons: list[str] = []
    errors: list[UserError] = []
    for name in names if model is None else [model]:
        make = recipe_of(name).draft
        assert make is not None
        try:
            return "\n".join(make(path, replace(found, remarks=[*found.remarks, *reasons]), label)) + "\n"
        except UserError as error:
            errors.append(error)
            reasons.append(f"no configuration of {name}: {str(error).removeprefix(f'{path}: ')}")
    # With a label only the first error matters, because only the first model predicts a column.
    raise errors[0] if len(errors) == 1 or label is not None else UserError(f"{path}: {'; '.join(reasons)}")
