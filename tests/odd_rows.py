"""Rows of every odd kind, and a small ranking run that was trained on some: what scoring must not stumble over."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedtrain import cli

HEADER = "id,label,x0,x1,shop,user,place,tags,words"
CONFIG = """
model: ranking
data:
  dense: [x0, x1]
  categorical: [shop, user, place, tags, words, x0]
  features:
    user: {num_rows: 64, dim: 4}
    place: {num_rows: 50, encoding: id}
    tags: {bag: true, pooling: sum}
    words: {bag: true, num_rows: 32, separator: ";"}
  max_bad_lines: 100000
table: {dim: 8}
ranking: {top: [16]}
train: {epochs: 2, global_batch_size: 128}
dense_optimizer: {lr: 0.01}
log: {every_steps: 20, tensorboard: false}
"""

NUMBERS = ["1.5", "1e3", "-0", ".5", "5.", "1E-3", " 7 ", "", '"3"', "-12", "1e30", "0", "\u00a08"]
ODD_NUMBERS = ["+2", "inf", "nan", "abc", "0x10", "1_000", "1e400", "1e39", "\uff11", "--1", "Infinity", '"1,5"']
TEXTS = ["s1", "s2", "S1", " s1 ", "", '"s1"', '"s,1"', '"s""1"', 's"1', "na\u00efve", "\u65e5\u672c", "\U0001f600"]
ODD_TEXTS = [
    "never seen",
    "x" * 5000,
    '"multi\nline"',
    '"s"1',
    "\u2003s1\u2003",
    "\ufb01",
    "e\u0301",
    '""',
    "\x1fs1",
    "\u200bs1",
]
IDS = ["7", " 7 ", '"7"', "0", "49", "07"]
ODD_IDS = ["", "+7", "50", "-1", "7.0", "0x7", "99999999999999999999", "\uff17", "seven"]
BAGS = ["a|b", "a", "", "a||b", " a | b ", "|", '"a|b"', "a;b;c", "\u00e9|a"]
ODD_BAGS = ["unseen|a", ";;", "  ", "a" * 300 + "|b", "\u2003|a"]


def lines(num_lines: int, seed: int, odd_share: float) -> list[str]:
    """Returns lines of CSV without a header, with a share of them that have an odd value, too few fields or none."""
    generator = np.random.default_rng(seed)

    def one_of(usual: Sequence[str], odd: Sequence[str]) -> str:
        chosen = odd if generator.random() < odd_share / 4 else usual
        return chosen[generator.integers(len(chosen))]

    found = []
    for number in range(num_lines):
        kind = generator.random()
        if kind < odd_share / 40:
            found.append("")
        elif kind < odd_share / 20:
            found.append(f"{number},1,2")
        else:
            x0, shop, tags = one_of(NUMBERS, ODD_NUMBERS), one_of(TEXTS, ODD_TEXTS), one_of(BAGS, ODD_BAGS)
            label = int(generator.random() < (0.8 if "1" in shop else 0.2))
            rest = f"{one_of(NUMBERS, ODD_NUMBERS)},{shop},u{generator.integers(90)},{one_of(IDS, ODD_IDS)}"
            found.append(f"{number},{label},{x0},{rest},{tags},{one_of(BAGS, ODD_BAGS)}")
    return found


def write_csv(path: Path, num_lines: int, seed: int = 1, odd_share: float = 0.0) -> None:
    """Writes lines that end in CRLF, LF and, one in a hundred, a blank line."""
    text = "".join(
        f"{line}\r\n" if number % 3 else f"{line}\n" for number, line in enumerate(lines(num_lines, seed, odd_share))
    )
    path.write_bytes(f"{HEADER}\n{text}".encode())


def json_rows(num_rows: int, seed: int) -> list[dict[str, Any]]:
    """Returns rows of values of every type that JSON has, some of which cannot be used."""
    generator = np.random.default_rng(seed)
    kinds: dict[str, list[Any]] = {
        "x0": [1, -2, "3", " 4 ", "", None, 10**20],
        "x1": [1.5, 2, "2.5", None, "abc", [1]],
        "shop": ["s1", " s2", 7, True, None, "", "\u65e5\u672c", 2.5, ["s1"], {"a": 1}, 2**70],
        "user": ["u1", 5, -5, None, "\x00", False],
        "place": [7, "7", " 8 ", "+9", 50, None, 7.5, -1],
        "tags": [["a", "b"], [], None, "a|b", ["a", None, " b "], 5, ["a", 1.5], [["a"]]],
        "words": [["a"], "a;b", [1, "x"], None, ["\u00e9", ""]],
    }
    rows = []
    for number in range(num_rows):
        row: dict[str, Any] = {"id": number}
        for name, values in kinds.items():
            usual = generator.random() < 0.9
            if generator.random() < 0.97:
                row[name] = values[generator.integers(2 if usual else len(values))]
        rows.append(row)
    return rows


def write_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def train_run(folder: Path) -> Path:
    """Trains a small run in this process; returns its folder."""
    write_csv(folder / "train.csv", 1500, odd_share=0.05)
    (folder / "config.yaml").write_text(CONFIG)
    run = folder / "run"
    settings = [f"data.path={folder}/train.csv", f"data.cache_path={folder}/cache", f"run.path={run}", "run.device=cpu"]
    assert cli.main(["train", str(folder / "config.yaml"), *settings]) == 0
    return run
