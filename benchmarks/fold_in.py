"""Recall for users who were folded in from their items, beside that of the same users when they are trained on.

python benchmarks/fold_in.py TRAIN.txt TEST.txt            # lines of `user item item ...`
python benchmarks/fold_in.py TRAIN.txt TEST.txt --users 200 --epochs 3    # quicker
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from embedtrain.cli import main as embedtrain
from embedtrain.data.bags import Bags
from embedtrain.data.histories import Histories, known_part, read_histories
from embedtrain.data.interactions import InteractionOptions
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.distributed.runtime import Runtime
from embedtrain.recipes.catalogue import measure_lists
from embedtrain.recipes.retrieval.folding import FoldIn
from embedtrain.recipes.retrieval.recipe import restored
from embedtrain.recipes.retrieval.recommendation import catalogue_of
from embedtrain.recipes.trained import checkpoint_of, measure_run, require_config

RUNTIME = Runtime(ONE_PROCESS, 0, torch.device("cpu"))


def split(train: str, test: str, folder: Path, num_users: int, seed: int) -> None:
    """Writes the training data without some users, what these have there, and what they have in the test."""
    lines, wanted = (
        {line.split(maxsplit=1)[0]: line for line in Path(path).read_text().splitlines(keepends=True)}
        for path in (train, test)
    )
    both = sorted(user for user in lines.keys() & wanted.keys() if len(lines[user].split()) > 1)
    chosen = set(random.Random(seed).sample(both, num_users))
    (folder / "without.txt").write_text("".join(line for user, line in lines.items() if user not in chosen))
    (folder / "history.txt").write_text("".join(lines[user] for user in both if user in chosen))
    (folder / "wanted.txt").write_text("".join(wanted[user] for user in both if user in chosen))


def train(data: str, run: str, settings: Sequence[str]) -> None:
    """Trains as the shipped configuration says."""
    arguments = [f"data.path={data}", f"run.path={run}", "log.tensorboard=false", *settings]
    if embedtrain(["train", "retrieval", *arguments]) != 0:
        raise SystemExit(f"the training on {data} failed")


def fold_in(run: str, folder: Path, ks: Sequence[int]) -> tuple[dict[str, float], float]:
    """Returns the measures of the users whom a run does not know, and the seconds until the map is learned."""
    with restored(require_config(run), RUNTIME, checkpoint_of(run, None)) as (model, interactions, _):
        options, items = InteractionOptions(path=""), interactions.items
        known = known_part(read_histories(options, str(folder / "history.txt"), items), "history", len(items))
        wanted = aligned(read_histories(options, str(folder / "wanted.txt"), items), known.users)
        start = time.perf_counter()
        users = FoldIn(model, interactions.known)
        seconds = time.perf_counter() - start
        queries = lambda rows: users.vectors(rows, known.items)  # noqa: E731
        return measure_lists(catalogue_of(model), queries, known.items, wanted, ks, alive=lambda: None), seconds


def aligned(found: Histories, users: Sequence[str]) -> Bags:
    """Returns the items of users in another order."""
    row = {user: number for number, user in enumerate(found.users)}
    rows = np.array([row[user] for user in users], np.int64)
    items, lengths = found.items.of(rows)
    return Bags.from_rows(np.repeat(np.arange(len(rows)), lengths), items, len(rows))


def main() -> None:
    """Trains with and without the users, and prints both measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--users", type=int, default=1000, help="how many are held out of the training")
    parser.add_argument("--seed", type=int, default=1, help="of their choice; the runs have the configuration's")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--runs", type=Path, help="folder of the two runs; those that are there are taken")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.runs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        split(given.train, given.test, folder, given.users, given.seed)
        settings = [f"train.epochs={given.epochs}", f"data.cache_path={folder}/cache"]
        train(given.train, f"{folder}/with", settings)
        train(str(folder / "without.txt"), f"{folder}/without", settings)
        trained = measure_run(require_config(f"{folder}/with"), RUNTIME, None, str(folder / "wanted.txt"))
        folded, seconds = fold_in(f"{folder}/without", folder, [20])
    print(f"{given.users:,} users held out (seed {given.seed}), {given.epochs} epochs; the map took {seconds:.1f} s")
    for name in ("recall@20", "ndcg@20"):
        print(
            f"{name}: trained on {trained[name]:.4f}, folded in {folded[name]:.4f}, {folded[name] / trained[name]:.1%}"
        )


if __name__ == "__main__":
    main()
