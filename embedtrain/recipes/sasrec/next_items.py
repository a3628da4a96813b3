"""Predicts next items with a packaged SASRec model; needs this file, scorer.py beside it, torch and NumPy.

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
    """Predicts next items with a packaged SASRec model, whose item vectors are memory-mapped.

    Args:
        path: folder of the package.

    Raises:
        ValueError: the folder is not a SASRec package, or its format is newer.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, "sasrec")
        self._network = torch.export.load(str(Path(path, self.manifest["network"]))).module()

    @torch.no_grad()
    def vectors(self, histories: Sequence[Sequence[str | int]]) -> Tensor:
        """Returns the vectors [n, dim] of histories; dot products with item vectors score the next item.

        Args:
            histories: raw ids of items, the newest last. Only the newest items of a longer history than the model's
                maximum are used. Ids that are whole numbers are compared as text.
        """
        starts = range(0, len(histories), _HISTORIES_AT_ONCE)
        parts = [self._encoded(histories[start : start + _HISTORIES_AT_ONCE]) for start in starts]
        return torch.cat(parts) if parts else torch.zeros(0, self.manifest["dim"])

    def after(
        self, histories: Sequence[Sequence[str | int]], k: int = 10, leaves_out_known: bool = True
    ) -> list[list[tuple[str, float]]]:
        """Returns the best next items of each history with their scores, the best first.

        Args:
            histories: see `vectors`.
            k: number of items per history.
            leaves_out_known: whether to leave out the items of the history.
        """
        known = [set(map(str, history)) if leaves_out_known else set() for history in histories]
        found = self.top(self.vectors(histories), k + max(map(len, known), default=0))
        return [
            [(item, score) for item, score in best if item not in own][:k]
            for best, own in zip(found, known, strict=True)
        ]

    def _encoded(self, histories: Sequence[Sequence[str | int]]) -> Tensor:
        max_length, dim = self.manifest["max_length"], self.manifest["dim"]
        newest = [list(history[-max_length:]) for history in histories]
        if not all(newest):
            raise ValueError("a history has no item: expected at least one")
        padded = torch.zeros(max(2, len(newest)), max_length, dim)  # The exported network needs at least two rows.
        lengths = torch.ones(len(padded), dtype=torch.int64)
        for place, history in enumerate(newest):
            padded[place, : len(history)] = self._vectors("item", history)
            lengths[place] = len(history)
        states: Tensor = self._network(padded, lengths)
        return states[: len(newest)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the best next items of a history as CSV."""
    parser = argparse.ArgumentParser(description="Predicts the next items of a history with a packaged SASRec model.")
    parser.add_argument("--package", default=str(Path(__file__).resolve().parent), help="folder of the package")
    parser.add_argument("--items", required=True, help="raw ids of the history such as 17,42, the newest last")
    parser.add_argument("--top", type=int, default=10, help="number of items")
    parser.add_argument("--include-known", action="store_true", help="include items of the history")
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
