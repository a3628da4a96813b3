"""Classifies logged numbers by their names: quality of the model, progress, or internals such as bytes sent."""

from __future__ import annotations

from collections.abc import Iterable

_CLOCKS = {"epoch", "seconds", "skipped_steps", "step"}
_HELD_OUT = {"valid": "validation", "validation": "validation", "test": "test"}
"""Prefixes of the names of measures of held-out data, with the name of the data in reports."""
_LOSSES = ("log_loss", "loss")
_ACRONYMS = {"auc": "AUC", "gauc": "GAUC", "ndcg": "NDCG", "mrr": "MRR", "rmse": "RMSE", "mae": "MAE", "map": "MAP"}


def split_name(name: str) -> tuple[str, str]:
    """Returns the measure and the data that a name stands for: ("auc", "validation") for `valid_auc`.

    A log loss of held-out data is named "loss", because it is comparable to the training loss.
    """
    for separator in ("_", "/"):
        start, found, rest = name.partition(separator)
        if found and start in _HELD_OUT:
            return ("loss" if rest in _LOSSES else rest), _HELD_OUT[start]
    return name, "training"


def counters_of(names: Iterable[str]) -> set[str]:
    """Returns the names of the numbers that are running counts, such as `words` and `step`."""
    names = set(names)
    return _CLOCKS | {name for name in names if f"{name}_per_second" in names}


def is_progress(name: str) -> bool:
    """Returns whether a number is a speed or a learning rate."""
    return name.endswith("_per_second") or name.partition("/")[0] == "learning_rate"


def is_plumbing(name: str) -> bool:
    """Returns whether a number describes internals: seconds per stage, bytes, ids."""
    return "/" in name and not is_progress(name) and split_name(name)[1] == "training"


def quality_names(names: Iterable[str]) -> list[str]:
    """Returns the names of the numbers that measure the quality of the model, in the given order."""
    names = list(names)
    counters = counters_of(names)
    return [name for name in names if name not in counters and not is_progress(name) and not is_plumbing(name)]


def as_words(name: str) -> str:
    """Returns a name in plain words: "validation log loss" for `valid_log_loss`, "AUC" for `auc`."""
    for start, data in _HELD_OUT.items():
        if name.startswith((f"{start}_", f"{start}/")):
            name = f"{data} {name[len(start) + 1 :]}"
            break
    words = []
    for word in name.replace("_", " ").split(" "):
        plain, at, length = word.partition("@")
        words.append(f"{_ACRONYMS.get(plain, plain)}{at}{length}")
    return " ".join(words)
