"""Every command and every Python block of README and docs is run, in a folder with small data of those names."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import launching
from tests.blocks import PAGES, ROOT, Block, blocks, redirected

FAMILY = ["king", "queen", "man", "woman", "boy", "girl", "uncle", "aunt"]
SMALLER = {
    "ranking_criteo": ["data.num_rows=100", "data.features={}", "train.global_batch_size=64"],
    "retrieval": ["train.epochs=2"],
    "sasrec": ["train.epochs=2"],
}
"""Settings that make a command quick, by the configuration that it names."""

BEFORE = {
    "checkpoints.md": "torchrun --standalone --nproc-per-node 2 -m embedtrain "
    "train word2vec data.path=corpus.txt run.path=runs/x"
}
"""What a page takes for granted."""


def runnable(page: Path) -> list[Block]:
    # README's Python has a test of its own, on two ranks too.
    return [
        block
        for block in blocks(page)
        if not block.not_run and (block.commands or (block.language == "python" and page.name != "README.md"))
    ]


def write_words(folder: Path) -> None:
    generator = np.random.default_rng(0)
    words = [*FAMILY, "the", *(f"{a}{b}{c}" for a in "bcd" for b in "aei" for c in "lmn")]
    sentences = [" ".join(generator.choice(words, 9)) for _ in range(300)]
    (folder / "corpus.txt").write_text("\n".join(sentences))
    (folder / "new.txt").write_text("\n".join(f"{sentence} prince princess" for sentence in sentences[:50]))
    (folder / "questions-words.txt").write_text(": family\nking queen man woman\nboy girl uncle aunt\n")
    (folder / "wordsim.tsv").write_text("king queen 9\nman aunt 3\nboy the 1\nuncle aunt 8\n")
    vectors = generator.normal(size=(len(FAMILY), 50)).round(3)
    lines = [f"{word} {' '.join(map(str, row))}\n" for word, row in zip(FAMILY, vectors.tolist(), strict=True)]
    (folder / "glove.txt").write_text("".join(lines))


def write_clicks(folder: Path) -> None:
    """Census-like rows for the configuration `ranking`, and days of clicks in the Criteo layout."""
    generator = np.random.default_rng(1)
    days = [(f"{day}.csv", 512) for day in ("monday", "tuesday", "wednesday")]
    for name, num_rows in (("train.csv", 1024), ("valid.csv", 256), *days):
        rows = []
        for _ in range(num_rows):
            age, hours = generator.integers(18, 80), generator.integers(10, 60)
            words = [f"{column}{generator.integers(4)}" for column in "abcdefg"]
            income = ">50K" if age + hours + generator.normal() * 10 > 90 else "<=50K"
            row = [age, words[0], 9, words[1], 10, words[2], words[3], words[4], words[5], words[6], 0, 0, hours, "x"]
            rows.append(",".join(map(str, [*row, income])))
        (folder / name).write_text("\n".join(rows) + "\n")
    for day in range(7):
        numbers = generator.integers(0, 50, (128, 13)).astype(str)
        tokens = [[f"{token:08x}" for token in row] for row in generator.integers(0, 99, (128, 26)).tolist()]
        lines = ["\t".join([str(k % 2), *numbers[k], *tokens[k]]) + "\n" for k in range(128)]
        (folder / f"day_{day}.gz").write_bytes(gzip.compress("".join(lines).encode()))


def write_interactions(folder: Path) -> None:
    generator = np.random.default_rng(2)
    for name, num_items in (("train.txt", 6), ("test.txt", 2)):
        users = [4711, *range(40)]
        lines = [f"{user} {' '.join(map(str, generator.choice(30, num_items, replace=False)))}\n" for user in users]
        (folder / name).write_text("".join(lines))
    lines = [f"new{user} {' '.join(map(str, generator.choice(30, 5, replace=False)))}\n" for user in range(9)]
    (folder / "new-users.txt").write_text("".join(lines))
    rows = [
        f"{user},{item},{generator.integers(2, 6)},2024-05-{time + 1:02d}"
        for user in range(40)
        for time, item in enumerate(generator.choice(30, 8, replace=False))
    ]
    (folder / "events.csv").write_text("\n".join(["user,item,rating,time", *rows]) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout, as far as the commands see one, with data."""
    for name in ("configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_words(tmp_path)
    write_clicks(tmp_path)
    write_interactions(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps the runs that a page has trained, for the pages that begin with the very same command."""
    return tmp_path_factory.mktemp("trained")


def run(words: list[str], folder: Path, trained: Path) -> None:
    """Runs a command, or takes what the same command left behind on another page."""
    kept = trained / hashlib.sha256(repr(words).encode()).hexdigest()
    if kept.exists():
        shutil.copytree(kept, folder / "runs", dirs_exist_ok=True)
        return
    is_first = not (folder / "runs").exists()
    start(words, folder)
    if is_first and words[0] == "torchrun" and "train" in words:
        shutil.copytree(folder / "runs", kept)


def start(words: list[str], folder: Path) -> None:
    program, *arguments = words
    module = {"torchrun": ["-m", "torch.distributed.run"], "embedtrain": ["-m", "embedtrain"], "python": []}[program]
    if command := next((word for word in ("train", "tune", "baseline") if word in arguments), None):
        config = arguments[arguments.index(command) + 1]
        arguments += [f"data.cache_path={folder}/cache", "run.device=cpu", *SMALLER.get(config, [])]
    arguments, output = redirected(arguments)
    done = launching.run([sys.executable, *module, *arguments], cwd=folder)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    if output is not None:
        (folder / output).write_text(done.stdout, encoding="utf-8")


SLOW_PAGES = (
    "performance.md",
    "growing.md",
    "sasrec.md",
    "tutorial.md",
    "tuning.md",
    "daily.md",
    *(page.name for page in PAGES if page.parent.name == "howto"),
)
"""Pages whose commands take longer than what they hold beside other tests is worth in each run."""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.name in SLOW_PAGES else [], id=page.name)
        for page in PAGES
        if runnable(page)
    ],
)
def test_what_a_page_says_can_be_done(page: Path, folder: Path, trained: Path) -> None:
    if page.name in BEFORE:
        run(BEFORE[page.name].split(), folder, trained)
    for block in runnable(page):
        for words in block.commands:
            if not is_example(words):
                run(words, folder, trained)
        if block.language == "python":
            program = folder / f"{page.stem}-{block.line}.py"
            program.write_text(block.text, encoding="utf-8")
            start(["python", str(program)], folder)


def is_example(words: list[str]) -> bool:
    """Whether a command runs a program of docs/examples, all of which test_examples.py runs and looks at."""
    names = [Path(word).name for word in words if word.startswith("docs/examples/")]
    programs = (ROOT / "tests" / "e2e" / "test_examples.py").read_text(encoding="utf-8")
    assert all(f'"{name}"' in programs for name in names), words
    return bool(names)


def test_most_pages_can_be_run() -> None:
    assert {page.name for page in PAGES if runnable(page)} >= {
        "README.md",
        "checkpoints.md",
        "daily.md",
        "growing.md",
        "launching.md",
        "optimizers.md",
        "own_model.md",
        "performance.md",
        "ranking.md",
        "retrieval.md",
        "tutorial.md",
        "words.md",
    }
