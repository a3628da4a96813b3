"""Speed of preparation: words, clicks and interactions per second, beside another tree of this project and polars.

    python benchmarks/preparation.py --other ../embedtrain-before

Each side prepares the same generated data on one thread, each time in a process of its own; the sides take turns.
polars does the work of a Criteo log: it reads the lines, hashes 26 columns, takes the logarithm of 13, writes Parquet.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
HASH_ROWS = 1_000_003
CENSUS_NUMBERS = ("age", "hours")
CENSUS_TEXTS = {"work": 9, "education": 16, "occupation": 15, "country": 42, "employer": 5000}
CRITEO_NUMBERS, CRITEO_TOKENS = 13, 26


class Work(NamedTuple):
    """One kind of data to prepare.

    Attributes:
        unit: what is counted.
        size: how many of them the data hold, times `--scale`.
        write: writes that many to a path.
        prepare: prepares the file at a path in a folder, with the package that is on Python's path.
    """

    unit: str
    size: int
    write: Callable[[Path, int], None]
    prepare: Callable[[str, str], None]


def main() -> None:
    """Writes the data, lets the sides take turns, and prints and records the rates."""
    parser = argparse.ArgumentParser(description="Words, clicks and interactions prepared per second.")
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)}; all by default")
    parser.add_argument("--other", type=Path, help="root of another tree of this project to compare with")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the size of the data")
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds: for a busy machine")
    parser.add_argument("--record", action="store_true", help="append the figures to results.csv")
    parser.add_argument("--one", nargs=3, metavar=("WORK", "SIDE", "DATA"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(*options.one)))
        return
    rates: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.works or WORKS:
            work = WORKS[name]
            size = max(1, round(work.size * options.scale))
            path = Path(folder, name.replace(" ", "-") + (".csv" if "CSV" in name else ".txt"))
            work.write(path, size)
            seconds = take_turns(name, path, options)
            path.unlink()
            rates[name] = {side: size / statistics.median(taken) for side, taken in seconds.items()}
            print(f"{name}: {size} {work.unit}, seconds {seconds}", file=sys.stderr, flush=True)
    print_table(rates)
    if options.record:
        record(rates)


def take_turns(name: str, path: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Returns the seconds of each turn of each side."""
    trees = {"this tree": ROOT, **({"other tree": options.other.resolve()} if options.other else {})}
    if name == "Criteo log" and importlib.util.find_spec("polars"):
        trees["polars"] = ROOT
    seconds: dict[str, list[float]] = {side: [] for side in trees}
    for _ in range(options.turns):
        for side, tree in trees.items():
            program = [sys.executable, __file__, "--one", name, side, str(path)]
            threads = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
            environment = {**os.environ, **threads, "PYTHONPATH": str(tree)}
            told = subprocess.run(program, env=environment, stdout=subprocess.PIPE, check=True).stdout
            measured = json.loads(told.splitlines()[-1])
            if side != "polars" and not Path(measured["package"]).is_relative_to(tree):
                raise SystemExit(f"{side}: expected the package of {tree}, but {measured['package']} was imported")
            seconds[side].append(measured["cpu_seconds" if options.cpu_time else "seconds"])
    return seconds


def run_one(name: str, side: str, path: str) -> dict[str, object]:
    """Prepares the data once and returns what it took; imports and the start of the process do not count."""
    import embedtrain
    from embedtrain.data import interactions, prepare, prepare_clicks  # noqa: F401

    prepare_once = WORKS[name].prepare
    if side == "polars":
        import polars  # noqa: F401

        prepare_once = prepare_with_polars
    with tempfile.TemporaryDirectory() as folder:
        start, cpu_start = time.perf_counter(), time.process_time()
        prepare_once(path, folder)
        taken = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    return {"package": embedtrain.__file__, **taken}


def print_table(rates: dict[str, dict[str, float]]) -> None:
    """Prints rates per second, and how many times the others' rate ours is."""
    print("| work | unit | this tree | other tree | ratio | polars | ratio |\n|" + " --- |" * 7)
    for name, by_side in rates.items():
        cells = [name, WORKS[name].unit, f"{by_side['this tree']:,.0f}"]
        for peer in ("other tree", "polars"):
            rate = by_side.get(peer)
            cells += ["", ""] if rate is None else [f"{rate:,.0f}", f"{by_side['this tree'] / rate:.2f}"]
        print(f"| {' | '.join(cells)} |")


def record(rates: dict[str, dict[str, float]]) -> None:
    """Appends a row per comparison to the record of all benchmarks."""
    from record import Measure, append_results

    measures = [
        Measure(name, f"{WORKS[name].unit} per second, {peer}", ours, rate, ours / rate, ranks=1, threads=1)
        for name, by_side in rates.items()
        for ours in [by_side["this tree"]]
        for peer, rate in by_side.items()
        if peer != "this tree"
    ]
    names = ("pyarrow", "numpy", *(["polars"] if importlib.util.find_spec("polars") else []))
    append_results("preparation", " ".join(f"{name} {version(name)}" for name in names), measures)


def write_common_words(path: Path, size: int) -> None:
    """Writes words by Zipf's law of 20,000 distinct ones, 1 in 50 of them beyond ASCII."""
    generator = np.random.default_rng(0)
    accents = ("", "\u00e9", "\u4e2d")
    words = [f"word{_letters(i)}{accents[i % 2 + 1] if i % 50 == 0 else ''}" for i in range(20_000)]
    write_words(path, [words[i] for i in (generator.zipf(1.2, size) % len(words)).tolist()])


def write_rare_words(path: Path, size: int) -> None:
    """Writes words, four of five of which occur once."""
    write_words(path, [f"w{_letters(i % 100)}" if i % 5 == 0 else f"id{_letters(i)}" for i in range(size)])


def write_words(path: Path, words: list[str]) -> None:
    """Writes lines of 25 words."""
    path.write_text("\n".join(" ".join(words[i : i + 25]) for i in range(0, len(words), 25)), encoding="utf-8")


def write_census(path: Path, size: int) -> None:
    """Writes a label, 2 numbers and 5 texts a line, with a header, as the census data have them."""
    generator = np.random.default_rng(0)
    columns = [generator.integers(0, 2, size), *(generator.integers(0, 99, size) for _ in CENSUS_NUMBERS)]
    columns += [generator.zipf(1.3, size) % distinct for distinct in CENSUS_TEXTS.values()]
    with path.open("w") as file:
        file.write(",".join(["label", *CENSUS_NUMBERS, *CENSUS_TEXTS]) + "\n")
        for label, age, hours, *texts in np.stack(columns, axis=1).tolist():
            file.write(f"{label}, {age}, {hours}, {', '.join(f'Some-value-{text}' for text in texts)}\n")


def write_criteo(path: Path, size: int) -> None:
    """Writes lines of a label, 13 numbers, a fifth of them missing, and 26 tokens, a twentieth of them missing."""
    generator = np.random.default_rng(0)
    numbers = np.floor(generator.exponential(50, (size, CRITEO_NUMBERS))).astype(int)
    numbers[generator.random(numbers.shape) < 0.2] = -1
    tokens = generator.zipf(1.2, (size, CRITEO_TOKENS)).astype(np.uint64) * np.uint64(2654435761) % np.uint64(1 << 32)
    has_token = generator.random(tokens.shape) >= 0.05
    labels = generator.integers(0, 2, size)
    with path.open("w") as file:
        for label, values, hashes, is_told in zip(labels, numbers.tolist(), tokens.tolist(), has_token, strict=True):
            fields = ["" if value < 0 else str(value) for value in values]
            fields += [f"{token:08x}" if told else "" for token, told in zip(hashes, is_told, strict=True)]
            file.write("\t".join([str(label), *fields]) + "\n")


def write_lines_of_items(path: Path, size: int) -> None:
    """Writes a user and about ten items a line."""
    users, items = _pairs(size)
    starts = np.flatnonzero(np.diff(users, prepend=-1)).tolist()
    with path.open("w") as file:
        for start, stop in zip(starts, [*starts[1:], size], strict=True):
            file.write(f"u{users[start]} {' '.join(f'i{item}' for item in items[start:stop].tolist())}\n")


def write_pairs(path: Path, size: int) -> None:
    """Writes a user and an item a line, with a header."""
    users, items = _pairs(size)
    pairs = zip(users.tolist(), items.tolist(), strict=True)
    path.write_text("user,item\n" + "".join(f"{user},{item}\n" for user, item in pairs))


def _pairs(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    generator = np.random.default_rng(0)
    return np.sort(generator.integers(0, size // 10 + 1, size)), generator.zipf(1.2, size) % (size // 20 + 1)


def _letters(number: int) -> str:
    """Writes a number in letters alone."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def _alone() -> Any:
    """Returns what stands for one process: None in a tree from before `Ranks`."""
    try:
        from embedtrain.distributed.ranks import ONE_PROCESS
    except ImportError:
        return None
    return ONE_PROCESS


def prepare_letters(path: str, folder: str) -> None:
    """Prepares words of letters."""
    from embedtrain.data.prepare import CorpusOptions, prepare_corpus

    prepare_corpus(CorpusOptions(path=path), folder, _alone())


def prepare_whitespace(path: str, folder: str) -> None:
    """Prepares words between white space."""
    from embedtrain.data.prepare import CorpusOptions, prepare_corpus

    prepare_corpus(CorpusOptions(path=path, tokenizer="whitespace"), folder, _alone())


def prepare_census(path: str, folder: str) -> None:
    """Prepares clicks with vocabularies."""
    from embedtrain.data.click_schema import CategoricalColumn, ClickSchema
    from embedtrain.data.prepare_clicks import ClickOptions, prepare_clicks

    columns = tuple(CategoricalColumn(name=name) for name in CENSUS_TEXTS)
    schema = ClickSchema(file_format="csv", label="label", dense=CENSUS_NUMBERS, categorical=columns)
    prepare_clicks(ClickOptions(path=path, schema=schema), folder, _alone())


def prepare_criteo(path: str, folder: str) -> None:
    """Prepares clicks by hashing."""
    from embedtrain.data.click_schema import CRITEO_CATEGORICAL, CategoricalColumn, ClickSchema
    from embedtrain.data.prepare_clicks import ClickOptions, prepare_clicks

    columns = [CategoricalColumn(name=name, encoding="hash", num_rows=HASH_ROWS) for name in CRITEO_CATEGORICAL]
    prepare_clicks(ClickOptions(path=path, schema=ClickSchema.criteo(columns)), folder, _alone())


def prepare_pairs(path: str, folder: str) -> None:
    """Prepares interactions."""
    from embedtrain.data.interactions import InteractionOptions, prepare_interactions

    prepare_interactions(InteractionOptions(path=path), folder, _alone())


def prepare_with_polars(path: str, folder: str) -> None:
    """Does with polars the work of `prepare_criteo`."""
    import polars as pl

    numbers = [f"I{i}" for i in range(1, CRITEO_NUMBERS + 1)]
    tokens = [f"C{i}" for i in range(1, CRITEO_TOKENS + 1)]
    lines = pl.read_csv(
        path,
        separator="\t",
        has_header=False,
        new_columns=["label", *numbers, *tokens],
        schema_overrides={name: pl.String for name in tokens},
        quote_char=None,
    )
    lines.with_columns(
        *(pl.col(name).cast(pl.Float32).log1p() for name in numbers),
        *((pl.col(name).hash() % HASH_ROWS).cast(pl.Int32) for name in tokens),
    ).write_parquet(f"{folder}/clicks.parquet")


WORKS = {
    "few distinct words": Work("words", 4_000_000, write_common_words, prepare_letters),
    "many distinct words": Work("words", 1_000_000, write_rare_words, prepare_whitespace),
    "census CSV": Work("lines", 400_000, write_census, prepare_census),
    "Criteo log": Work("lines", 150_000, write_criteo, prepare_criteo),
    "lines of items": Work("interactions", 1_000_000, write_lines_of_items, prepare_pairs),
    "interactions CSV": Work("interactions", 1_000_000, write_pairs, prepare_pairs),
}

if __name__ == "__main__":
    main()
