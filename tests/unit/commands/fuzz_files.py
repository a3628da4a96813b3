"""Damages to the files that commands read: manifests, prepared data, a run's own files, evaluation files."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedtrain.checkpoint import manifest

STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**62,
    2**70,
    -(2**80),
    0.5,
    1e300,
    "",
    "x",
    "../../secret",
    "/etc/passwd",
    "\x1b[31mred\x1b[0m",
    "\ud800",
    "9" * 30,
    [],
    {},
    [[]],
    [1] * 70,
    {"x": {"y": []}},
]
"""Values that tend to break what reads them."""

RUBBISH = [b"", b"}{", b"[]", b"null", b"0", b'"x"', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a":NaN}', b"\0" * 64]

COMMON = (
    "table: {dim: 4}\n"
    "optimizer: {name: rowwise_adagrad, lr: 0.1}\n"
    "log: {every_steps: 3, tensorboard: false}\n"
    "checkpoint: {mode: sync, every_steps: 5, keep_last: null}\n"
)
CONFIGS = {
    "words": (
        "model: word2vec\n"
        "data: {path: corpus.txt, cache_path: cache, min_count: 1}\n"
        "train: {epochs: 1, words_per_step: 64, block_words: 32}\n"
        "run: {path: words, device: cpu}\n"
    ),
    "pairs": (
        "model: retrieval\n"
        "data: {path: pairs.csv, format: csv, cache_path: cache}\n"
        "evaluate: {path: held.csv, k: [2]}\n"
        "train: {epochs: 1, global_batch_size: 8}\n"
        "run: {path: pairs, device: cpu}\n"
    ),
    "clicks": (
        "model: ranking\n"
        "data: {path: clicks.csv, format: csv, label: y, dense: [d], categorical: [a], valid_path: valid.csv,\n"
        "       cache_path: cache, block_examples: 16}\n"
        "train: {epochs: 1, global_batch_size: 16}\n"
        "run: {path: clicks, device: cpu}\n"
    ),
}
"""By name a configuration of each model, over the data of `write_data`."""


def write_data(folder: Path) -> None:
    """Writes small data of each model, and the configurations."""
    generator = random.Random(1)
    words = [f"{letter}{letter}" for letter in "abcdefghij"]
    lines = [" ".join(generator.choices(words, k=8)) for _ in range(60)]
    (folder / "corpus.txt").write_text("\n".join(lines) + "\n")
    (folder / "more.txt").write_text("\n".join(lines) + "\nnew words\n")
    (folder / "similar.tsv").write_text("aa\tbb\t3\ncc\tdd\t1\naa\tee\t2\n")
    (folder / "analogies.txt").write_text(": pairs\naa bb cc dd\nbb cc dd ee\n")
    pairs = [f"u{user},i{item}" for user in range(12) for item in generator.sample(range(9), 4)]
    (folder / "pairs.csv").write_text("\n".join(["user,item", *pairs]) + "\n")
    (folder / "held.csv").write_text("user,item\nu1,i1\nu2,i3\n")
    clicks = [f"{generator.randrange(2)},{generator.random():.3f},v{generator.randrange(6)}" for _ in range(160)]
    (folder / "clicks.csv").write_text("\n".join(["y,d,a", *clicks]) + "\n")
    (folder / "valid.csv").write_text("\n".join(["y,d,a", *clicks[:40]]) + "\n")
    (folder / "secret").write_text("secret\n")
    for name, text in CONFIGS.items():
        (folder / f"{name}.yaml").write_text(text + COMMON)


def mutated(document: Any, generator: random.Random) -> Any:
    """Returns a JSON document with one to three faults: values replaced, removed, repeated or renamed."""
    document = json.loads(json.dumps(document))
    for _ in range(generator.choice([1, 1, 2, 3])):
        places = list(_places(document))
        if not places:
            return generator.choice(STRANGE)
        container, key = generator.choice(places)
        kind = generator.randrange(5)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, list):
            container.insert(key, container[generator.randrange(len(container))])
        elif kind == 1:
            container[generator.choice(["x", "\x1b[1m", "step", str(key) + " "])] = container.pop(key)
        elif kind == 2 and isinstance(container[key], int) and not isinstance(container[key], bool):
            container[key] = generator.choice([container[key] + 1, container[key] - 1, -container[key], 2**63])
        else:
            container[key] = generator.choice(STRANGE)
    return document


def _places(document: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else []
    for key in keys:
        found.append((document, key))
        found += _places(document[key])
    return found


def damage_manifest(run: Path, generator: random.Random) -> str:
    """Forges a checkpoint's manifest, its checksum right; now and then its bytes."""
    path = generator.choice(sorted(run.glob("checkpoints/*/manifest.json")))
    if generator.random() < 0.1:
        return damage_bytes(path, generator)
    document = json.loads(path.read_text())
    del document["checksum"]
    # Most keys are those of pieces and checksums: each part of the document is hit as often.
    part = generator.choice([None, "tensors", "files", "state", "state"])
    if part is None:
        document = mutated(document, generator)
    else:
        document[part] = mutated(document[part], generator)
    if isinstance(document, dict):
        document["checksum"] = manifest._checksum(document)
        path.write_bytes(manifest.canonical_json(document))
    else:
        path.write_text(json.dumps(document))
    return f"{path.name} {part}"


def damage_bytes(path: Path, generator: random.Random) -> str:
    """Overwrites, cuts, lengthens or replaces the bytes of a file."""
    data = bytearray(path.read_bytes())
    kind = generator.randrange(4)
    if kind == 0 and data:
        for _ in range(generator.randint(1, 5)):
            data[generator.randrange(len(data))] = generator.randrange(256)
    elif kind == 1 and data:
        del data[generator.randrange(len(data)) :]
    elif kind == 2:
        data += generator.choice(RUBBISH)
    else:
        data = bytearray(generator.choice(RUBBISH))
    path.write_bytes(data)
    return f"{path.name} bytes {kind}"


def replace_by_another_kind(path: Path, secret: Path, generator: random.Random) -> str:
    """Puts a folder, a pipe or a link in the place of a file or of nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    kind = generator.randrange(5)
    puts: list[Callable[[], object]] = [
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to(secret),
        lambda: path.symlink_to(path.name),
    ]
    puts[kind]()
    return f"{path.name} kind {kind}"


def damage_json(path: Path, generator: random.Random) -> str:
    """Mutates a file of JSON, or of JSON lines."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    place = generator.randrange(len(lines))
    lines[place] = json.dumps(mutated(json.loads(lines[place]), generator))
    path.write_text("\n".join(lines) + "\n", errors="surrogatepass")
    return f"{path.name} line {place}"


def damage_file(path: Path, secret: Path, generator: random.Random) -> str:
    """Damages a file in any way."""
    kind = generator.random()
    if kind < 0.3:
        return replace_by_another_kind(path, secret, generator)
    if kind < 0.7 and path.suffix in (".json", ".jsonl"):
        return damage_json(path, generator)
    return damage_bytes(path, generator)
