"""What comes next, from a packed SASRec model: this file, scorer.py beside it, torch and NumPy are all it takes.

python PACKAGE/next_items.py --items 17,42 --top 10

from next_items import NextItems
model = NextItems("PACKAGE")
best = model.after([["17", "42"]], k=10)
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from scorer import Retriever
from torch import Tensor

_HISTORIES_AT_ONCE = 512


class NextItems(Retriever):  # type: ignore[misc]
    """A packed SASRec model; the vectors of its items are memory-mapped.

    Args:
        path: the folder of the package.

    Raises:
        ValueError: the folder is no such package, or one of a newer format.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, "sasrec")
        self._network = torch.export.load(str(Path(path, self.manifest["network"]))).module()

    @torch.no_grad()
    def vectors(self, histories: Sequence[Sequence[str]]) -> Tensor:
        """Returns a vector [n, dim] of each history, whose products with those of items say what comes next.

        Args:
            histories: raw ids of items, the newest last; of a longer one than the model takes, the newest count.
        """
        starts = range(0, len(histories), _HISTORIES_AT_ONCE)
        parts = [self._encoded(histories[start : start + _HISTORIES_AT_ONCE]) for start in starts]
        return torch.cat(parts) if parts else torch.zeros(0, self.manifest["dim"])

    def after(
        self, histories: Sequence[Sequence[str]], k: int = 10, leaves_out_known: bool = True
    ) -> list[list[tuple[str, float]]]:
        """Returns the best items after each history with their scores, the best first.

        Args:
            histories: see `vectors`.
            k: how many items each.
            leaves_out_known: whether to leave out the items of the history.
        """
        known = [set(history) if leaves_out_known else set() for history in histories]
        found = self.top(self.vectors(histories), k + max(map(len, known), default=0))
        return [
            [(item, score) for item, score in best if item not in own][:k]
            for best, own in zip(found, known, strict=True)
        ]

    def _encoded(self, histories: Sequence[Sequence[str]]) -> Tensor:
        max_length, dim = self.manifest["max_length"], self.manifest["dim"]
        newest = [list(history[-max_length:]) for history in histories]
        if not all(newest):
            raise ValueError("a history holds no item: expected at least one")
        padded = torch.zeros(max(2, len(newest)), max_length, dim)  # The program was made for two rows or more.
        lengths = torch.ones(len(padded), dtype=torch.int64)
        for place, history in enumerate(newest):
            padded[place, : len(history)] = self._vectors("item", history)
            lengths[place] = len(history)
        states: Tensor = self._network(padded, lengths)
        return states[: len(newest)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints as CSV the best items after a history."""
    parser = argparse.ArgumentParser(description="Predicts which items come next, with a packed SASRec model.")
    parser.add_argument("--package", default=str(Path(__file__).resolve().parent), help="the folder of the package")
    parser.add_argument("--items", required=True, help="raw ids such as 17,42, the newest last")
    parser.add_argument("--top", type=int, default=10, help="how many items")
    parser.add_argument("--include-known", action="store_true", help="also items of the history")
    given = parser.parse_args(arguments)
    try:
        history = [item.strip() for item in given.items.split(",")]
        (best,) = NextItems(given.package).after([history], given.top, leaves_out_known=not given.include_known)
    except (ValueError, OSError) as error:
        print(f"next_items: error: {error}", file=sys.stderr)
        return 2
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["item", "score"])
    writer.writerows([item, f"{score:.9g}"] for item, score in best)
    return 0


if __name__ == "__main__":
    sys.exit(main())
