"""What the names of logged numbers say: whether a number is of the model's quality, the progress or the machinery."""

from __future__ import annotations

from collections.abc import Iterable

_CLOCKS = {"epoch", "seconds", "skipped_steps", "step"}
_HELD_OUT = {"valid": "validation", "validation": "validation", "test": "test"}
"""Beginnings of the names of held-out measures, and how the data are called."""
_LOSSES = ("log_loss", "loss")
_ACRONYMS = {"auc": "AUC", "gauc": "GAUC", "ndcg": "NDCG", "mrr": "MRR", "rmse": "RMSE", "mae": "MAE", "map": "MAP"}


def split_name(name: str) -> tuple[str, str]:
    """Returns what a number measures, and on which data: ("auc", "validation") of `valid_auc`.

    A log loss of held-out data measures what the loss of the training does.
    """
    for separator in ("_", "/"):
        start, found, rest = name.partition(separator)
        if found and start in _HELD_OUT:
            return ("loss" if rest in _LOSSES else rest), _HELD_OUT[start]
    return name, "training"


def counters_of(names: Iterable[str]) -> set[str]:
    """Returns the names of the numbers that only count on, such as `words`."""
    names = set(names)
    return _CLOCKS | {name for name in names if f"{name}_per_second" in names}


def is_progress(name: str) -> bool:
    """Returns whether a number is of speed or of a learning rate."""
    return name.endswith("_per_second") or name.partition("/")[0] == "learning_rate"


def is_plumbing(name: str) -> bool:
    """Returns whether a number is of the machinery: seconds of stages, bytes, ids."""
    return "/" in name and not is_progress(name) and split_name(name)[1] == "training"


def quality_names(names: Iterable[str]) -> list[str]:
    """Returns the names of the numbers that say how good the model is, in order."""
    names = list(names)
    counters = counters_of(names)
    return [name for name in names if name not in counters and not is_progress(name) and not is_plumbing(name)]


def as_words(name: str) -> str:
    """Returns a name as a person writes it: `valid_log_loss` is "validation log loss", `auc` is "AUC"."""
    for start, data in _HELD_OUT.items():
        if name.startswith((f"{start}_", f"{start}/")):
            name = f"{data} {name[len(start) + 1 :]}"
            break
    words = []
    for word in name.replace("_", " ").split(" "):
        plain, at, length = word.partition("@")
        words.append(f"{_ACRONYMS.get(plain, plain)}{at}{length}")
    return " ".join(words)
