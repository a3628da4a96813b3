"""Ranking beside scikit-learn's gradient boosting: quality on the census income data, in one run.

    python benchmarks/ranking.py ../shared/data/ctr-census

Both sides train on `train.csv` and predict `valid.csv` (UCI Adult as it is published, without a header): embedtrain
through its command line under torchrun with `configs/ranking.yaml`, scikit-learn's HistGradientBoostingClassifier as it
comes, on the same columns, the texts among them declared as categories.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import OrdinalEncoder

ROOT = Path(__file__).resolve().parents[1]
CONFIG_PATH = ROOT / "configs" / "ranking.yaml"
SIDES = ("DCN-V2", "DLRM", "gradient boosting")

Measures = dict[str, float]


def main() -> None:
    """Runs all sides, seed by seed, and prints the table."""
    parser = argparse.ArgumentParser(description="Ranking beside gradient boosting on the census income data.")
    parser.add_argument("data", type=Path, help="folder of train.csv and valid.csv")
    parser.add_argument("overrides", nargs="*", help="key=value settings for embedtrain")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    measures: dict[str, list[Measures]] = {side: [] for side in SIDES}
    for seed in range(1, options.seeds + 1):
        for side, architecture in (("DCN-V2", "dcn_v2"), ("DLRM", "dlrm")):
            measures[side].append(run_embedtrain(options, architecture, seed))
        measures["gradient boosting"].append(run_boosting(options.data, seed))
        print(f"seed {seed}: { ({side: runs[-1] for side, runs in measures.items()}) }", flush=True)
    print(f"\nMean of {options.seeds} seeds (standard deviation), {options.ranks} ranks\n")
    print(f"| measure | {' | '.join(SIDES)} |\n| --- | --- | --- | --- |")
    for name in measures[SIDES[0]][0]:
        print(f"| {name} | {' | '.join(cell([run[name] for run in measures[side]]) for side in SIDES)} |")


def cell(values: list[float]) -> str:
    """Returns mean and standard deviation as text."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ({spread:.4f})"


def run_embedtrain(options: argparse.Namespace, architecture: str, seed: int) -> Measures:
    """Trains through the command line and returns the last measures on the held-out examples."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "data.path": options.data / "train.csv",
            "data.valid_path": options.data / "valid.csv",
            "data.cache_path": f"{folder}/cache",
            "run.path": f"{folder}/run",
            "ranking.architecture": architecture,
            "log.tensorboard": "false",
            "checkpoint.mode": "sync",
            "seed": seed,
        }
        overrides = [f"{key}={value}" for key, value in settings.items()] + options.overrides
        subprocess.run(
            [
                sys.executable,
                *(launcher if options.ranks > 1 else []),
                *("-m", "embedtrain", "train", str(CONFIG_PATH), *overrides),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
            check=True,
        )
        records = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    rates = [record["examples_per_second"] for record in records if "examples_per_second" in record]
    final = next(record for record in reversed(records) if "valid_auc" in record)
    examples = max(record["examples"] for record in records if "examples" in record)
    return {
        "AUC": final["valid_auc"],
        "log loss": final["valid_log_loss"],
        "training seconds": examples / statistics.median(rates),
    }


def run_boosting(data: Path, seed: int) -> Measures:
    """Trains scikit-learn's gradient boosting on the same columns and returns its measures."""
    section = yaml.safe_load(CONFIG_PATH.read_text())["data"]
    numbers = [section["columns"].index(name) for name in section["dense"]]
    label = section["columns"].index(section["label"])
    texts = [place for place in range(len(section["columns"])) if place not in (*numbers, label)]
    train, valid = (read_rows(data / name) for name in ("train.csv", "valid.csv"))
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan).fit(train[:, texts])
    inputs = [np.hstack([rows[:, numbers].astype(float), encoder.transform(rows[:, texts])]) for rows in (train, valid)]
    labels = [rows[:, label] == section["positive"] for rows in (train, valid)]
    start = time.perf_counter()
    model = HistGradientBoostingClassifier(
        categorical_features=list(range(len(numbers), len(numbers) + len(texts))), random_state=seed
    ).fit(inputs[0], labels[0])
    seconds = time.perf_counter() - start
    probabilities = model.predict_proba(inputs[1])[:, 1]
    return {
        "AUC": float(roc_auc_score(labels[1], probabilities)),
        "log loss": float(log_loss(labels[1], probabilities)),
        "training seconds": seconds,
    }


def read_rows(path: Path) -> NDArray[np.str_]:
    """Returns the fields of a file, [num_rows, num_columns]."""
    with path.open(newline="") as file:
        return np.array([row for row in csv.reader(file) if row])


if __name__ == "__main__":
    main()
