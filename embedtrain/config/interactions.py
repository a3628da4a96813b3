"""The section `data` of models that learn from who turned to what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from embedtrain.config.sections import RowFilesConfig, refuse_stream, require_at_least_one, require_paths
from embedtrain.data.splits import Rule
from embedtrain.errors import UserError


@dataclass
class InteractionsConfig(RowFilesConfig):
    """Who turned to what."""

    path: str | list[str] = "???"
    """A file, a glob, a folder, a list of them, on any fsspec URL."""
    format: str = "auto"
    """auto goes by the suffix; lines (.txt) are `user item item ...`; csv, tsv, jsonl, parquet and recbole (.inter) are
    a table with one interaction per row."""
    user_column: str = "user"
    """Of a table: the column of the users' raw ids."""
    item_column: str = "item"
    """Of a table: the column of the items' raw ids."""
    rating_column: str | None = None
    """Of a table: a column of numbers; interactions below min_rating are left out. null: all count."""
    min_rating: float | None = None
    """The lowest rating that counts; goes with rating_column."""
    time_column: str | None = None
    """Of a table: a column of numbers or dates that orders each user's interactions; null: the order of the files."""
    min_user_count: int = 1
    """Users with fewer interactions are left out, and items by min_item_count, until all that is left has enough."""
    min_item_count: int = 1
    """Items with fewer interactions are left out."""
    split: Literal["none", "ratio", "leave_one_out", "by_time"] = "none"
    """What is held out as the test part, in place of evaluate.path: a share of each user's items, drawn at random
    (ratio); each user's newest interactions (leave_one_out); or the newest of all (by_time)."""
    validation: Literal["none", "auto", "ratio", "leave_one_out", "by_time"] = "none"
    """What is held out of the rest, for the measurements during training, early stopping and the choice of settings;
    auto goes by the rule of split, and by ratio without one. Then only `embedtrain evaluate` looks at the test part."""
    held_out_ratio: float = 0.1
    """The share that ratio and by_time hold out, for each of the two parts."""
    held_out_events: int = 1
    """The interactions of each user that leave_one_out holds out, for each of the two parts."""
    split_seed: int = 1
    """Of the draws of ratio; runs that differ only in `seed` share their split."""
    cache_path: str = "~/.cache/embedtrain"
    """Local folder for the prepared data."""

    @property
    def validation_rule(self) -> Rule:
        """The rule by which the validation part is held out."""
        if self.validation != "auto":
            return self.validation
        return "ratio" if self.split == "none" else self.split

    def check(self, test_path: str | Sequence[str] | None) -> None:
        """Checks what types cannot say.

        Args:
            test_path: the files of `evaluate.path`.

        Raises:
            UserError: a value is out of range, or two settings contradict each other.
        """
        refuse_stream(self.path, "who is known to have what is counted before it is trained on")
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
                f"evaluate.path={test_path} names what is held out, and data.split={self.split} holds out a part of "
                "data.path: leave one of them out"
            )
        rules = {"data.split": self.split, "data.validation": self.validation_rule}
        for key, rule in rules.items():
            if rule == "by_time" and self.time_column is None:
                raise UserError(f"{key}=by_time needs data.time_column, the column that says when")
        unused = {
            "held_out_ratio": ("ratio", "by_time"),
            "held_out_events": ("leave_one_out",),
            "split_seed": ("ratio",),
        }
        for name, of_rules in unused.items():
            if getattr(self, name) != getattr(InteractionsConfig, name) and not set(of_rules) & set(rules.values()):
                raise UserError(
                    f"data.{name} is for data.split or data.validation of {' or '.join(of_rules)}: give one of them, "
                    f"or leave data.{name} out"
                )
