"""The section `data` of models that learn from interactions of users and items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from embedtrain.config.sections import RowFilesConfig, refuse_stream, require_at_least_one, require_paths
from embedtrain.data.splits import Rule
from embedtrain.errors import UserError


@dataclass
class InteractionsConfig(RowFilesConfig):
    """Files of interactions, and how they are split."""

    path: str | list[str] = "???"
    """A file, a glob, a folder, or a list of them, on any fsspec URL."""
    format: str = "auto"
    """lines (.txt) has `user item item ...` per line; csv, tsv, jsonl, parquet and recbole (.inter) have one
    interaction per row. auto chooses by the file suffix."""
    user_column: str = "user"
    """Column of the users' raw ids; not for lines."""
    item_column: str = "item"
    """Column of the items' raw ids; not for lines."""
    rating_column: str | None = None
    """Column of ratings, which are numbers: interactions below min_rating are left out. null keeps all interactions."""
    min_rating: float | None = None
    """Minimum rating of the interactions that are kept; needs rating_column."""
    time_column: str | None = None
    """Column of numbers or dates that orders each user's interactions; null keeps the order of the files."""
    min_user_count: int = 1
    """Minimum number of interactions per user. Users and items below their minimum are removed, repeatedly, until all
    others reach it."""
    min_item_count: int = 1
    """Minimum number of interactions per item; see min_user_count."""
    split: Literal["none", "ratio", "leave_one_out", "by_time"] = "none"
    """How the test part is held out, if evaluate.path does not give it. ratio draws a share of each user's items at
    random, leave_one_out takes each user's newest interactions, by_time takes the newest interactions of all users."""
    validation: Literal["none", "auto", "ratio", "leave_one_out", "by_time"] = "none"
    """How a validation part is held out of the rest, for measurements during training, early stopping and tuning. auto
    uses the rule of split, or ratio if split is none. With a validation part, only `embedtrain evaluate` uses the test
    part."""
    held_out_ratio: float = 0.1
    """Share that ratio and by_time hold out for the test part, and again for the validation part."""
    held_out_events: int = 1
    """Interactions per user that leave_one_out holds out for the test part, and again for the validation part."""
    split_seed: int = 1
    """Seed of the draws of ratio. It is separate from `seed`, so that runs with different seeds have the same split."""
    cache_path: str = "~/.cache/embedtrain"
    """Local folder of the prepared data."""

    @property
    def validation_rule(self) -> Rule:
        """Rule by which the validation part is held out, with "auto" resolved."""
        if self.validation != "auto":
            return self.validation
        return "ratio" if self.split == "none" else self.split

    def check(self, test_path: str | Sequence[str] | None) -> None:
        """Checks ranges that types do not express.

        Args:
            test_path: the setting `evaluate.path`.

        Raises:
            UserError: a value is out of range, or two settings contradict each other.
        """
        refuse_stream(self.path, "the interactions are counted before training")
        require_paths({"data.path": self.path})
        if (self.rating_column is None) != (self.min_rating is None):
            raise UserError(
                "data.rating_column and data.min_rating go together: interactions with a lower rating are left out"
            )
        counts = ("min_user_count", "min_item_count", "held_out_events")
        require_at_least_one((f"data.{name}", getattr(self, name)) for name in counts)
        if not 0 < self.held_out_ratio < 1:
            raise UserError(f"data.held_out_ratio must be above 0 and below 1, got {self.held_out_ratio:g}")
        if self.split_seed < 0:
            raise UserError(f"data.split_seed must be at least 0, got {self.split_seed}")
        if self.split != "none" and test_path is not None:
            raise UserError(
                f"evaluate.path={test_path} gives the test part, but data.split={self.split} holds out another from "
                "data.path: leave one of them out"
            )
        rules = {"data.split": self.split, "data.validation": self.validation_rule}
        for key, rule in rules.items():
            if rule == "by_time" and self.time_column is None:
                raise UserError(f"{key}=by_time needs data.time_column, the column of times")
        unused = {
            "held_out_ratio": ("ratio", "by_time"),
            "held_out_events": ("leave_one_out",),
            "split_seed": ("ratio",),
        }
        for name, of_rules in unused.items():
            if getattr(self, name) != getattr(InteractionsConfig, name) and not set(of_rules) & set(rules.values()):
                raise UserError(
                    f"data.{name} needs {' or '.join(of_rules)} as data.split or data.validation: give one of them, or "
                    f"leave data.{name} out"
                )
