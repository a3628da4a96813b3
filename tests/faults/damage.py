"""Every way to damage the files of a checkpoint, and whether a reader notices."""

from __future__ import annotations

import collections
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from embedtrain.checkpoint import CheckpointReader, verify
from embedtrain.errors import CheckpointError

NUM_TRUNCATIONS = 20
NUM_FLIPS = 200


def read_all(folder: Path) -> dict[str, Tensor]:
    """Returns all that a checkpoint holds, by name."""
    verify(str(folder))
    with CheckpointReader(str(folder)) as reader:
        tensors = {name: reader.read(name, 0, info.shape[0]) for name, info in reader.tensors.items()}
        return {**tensors, **reader.replicated()}


def damages(folder: Path, foreign: Path, seed: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields kinds of damage, each with what does it to `folder`; files are put back in between by the caller.

    Args:
        folder: of the checkpoint.
        foreign: of a checkpoint of another run with the same names of tensors and numbers of rows.
        seed: of the draws.
    """
    generator = random.Random(seed)
    files = sorted(folder.iterdir())
    others = {shape_of(path.name): path for path in foreign.iterdir()}
    for index, file in enumerate(files):
        data = file.read_bytes()
        for length in generator.sample(range(len(data)), NUM_TRUNCATIONS):
            yield "truncated", lambda file=file, length=length, data=data: file.write_bytes(data[:length])
        for bit in generator.sample(range(8 * len(data)), NUM_FLIPS):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            yield "bit flipped", lambda file=file, flipped=flipped: file.write_bytes(flipped)
        yield "removed", file.unlink
        following = files[(index + 1) % len(files)]
        yield "swapped", lambda first=file, second=following: swap(first, second)
        yield "of another run", lambda file=file: shutil.copy(others[shape_of(file.name)], file)


def shape_of(name: str) -> str:
    """Returns a file's name without its attempt: "shard--00001-of-00002.safetensors"."""
    return "".join(part if len(part) != 16 else "-" for part in name.split("-"))


def swap(first: Path, second: Path) -> None:
    """Has two files change their places."""
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def count_noticed(folder: Path, foreign: Path, seed: int = 0) -> collections.Counter[str]:
    """Does every damage in turn; returns how many of each kind were refused, or read with the right content.

    Raises:
        AssertionError: a damaged checkpoint was read, and held other rows than were saved.
    """
    original = read_all(folder)
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    counts: collections.Counter[str] = collections.Counter()
    for kind, do in damages(folder, foreign, seed):
        do()
        try:
            found = read_all(folder)
        except CheckpointError:
            counts[f"{kind}: refused"] += 1
        else:
            assert found.keys() == original.keys(), kind
            assert all(torch.equal(found[name], original[name]) for name in original), kind
            counts[f"{kind}: read, right"] += 1
        for path, data in kept.items():
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)
    return counts
