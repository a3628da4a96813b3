"""Which rows moved from one checkpoint to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from embedtrain.checkpoint import ShardView, save_checkpoint
from embedtrain.cli import main
from embedtrain.commands import diff
from embedtrain.commands.diff import Side, movement
from embedtrain.distributed.ranks import Ranks
from embedtrain.sharding.layout import SpreadLayout
from tests.unit.checkpoint.example import run_threads

WORDS = ["the", "king", "queen", "man", "woman"]


def save(
    path: Path, tables: Mapping[str, Tensor], *, step: int = 1, world_size: int = 1, words: Sequence[str] = ()
) -> str:
    """Saves tables, given in the order of their ids, as so many ranks do; returns the run folder."""

    def save_rank(ranks: Ranks, rank: int) -> str:
        shards = []
        for name, rows in tables.items():
            layout = SpreadLayout(len(rows), world_size)
            slots = layout.id_of(torch.arange(len(rows)))
            start, stop = layout.shard_range(rank)
            kind = layout.description
            shards.append(ShardView(f"{name}/weight", tuple(rows.shape), start, rows[slots][start:stop], kind))
        return save_checkpoint(f"{path}/checkpoints", step, shards, {}, ranks)

    for outcome in run_threads(world_size, save_rank):
        assert isinstance(outcome, str), outcome
    if words:
        (path / "vocabulary.tsv").write_text("".join(f"{word}\t{9 - row}\n" for row, word in enumerate(words)))
    return str(path)


def table(num_rows: int = 5, dim: int = 3) -> Tensor:
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
def test_rows_that_moved_most_come_first_by_name_whatever_number_of_ranks_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(diff, "_BLOCK_BYTES", block_bytes)
    was = table()
    now = was.clone()
    now[3] *= -1
    now[1, 2] += 0.5
    first = save(tmp_path / "a", {"word": was}, world_size=3, words=WORDS)
    second = save(tmp_path / "b", {"word": now}, world_size=2, words=WORDS)
    found, num_gone, num_new = movement("word", Side.open(first), Side.open(second), 4)
    assert (found.num_rows, found.num_moved, found.num_not_finite, num_gone, num_new) == (5, 2, 0, 0, 0)
    assert list(found.names) == ["man", "king", "the", "queen"]
    expected = (now - was).norm(dim=1)[[3, 1, 0, 2]].double().numpy()
    np.testing.assert_allclose(found.distances, expected, rtol=1e-6)
    assert found.cosines[0] == pytest.approx(-1) and found.cosines[2] == pytest.approx(1)
    assert found.mean == pytest.approx(expected.sum() / 5, rel=1e-6)


def test_rows_of_other_vocabularies_are_found_by_their_words(tmp_path: Path) -> None:
    was = table()
    now = torch.cat([was[[4, 1, 0]], torch.ones(1, 3)])
    now[0] += 1
    first = save(tmp_path / "a", {"word": was}, words=WORDS)
    second = save(tmp_path / "b", {"word": now}, words=["woman", "king", "the", "new"])
    found, num_gone, num_new = movement("word", Side.open(first), Side.open(second), 2)
    assert (found.num_rows, found.num_moved, num_gone, num_new) == (3, 1, 2, 1)
    assert list(found.names) == ["woman", "the"]


def test_rows_without_names_are_the_same_by_number_and_nan_is_counted(tmp_path: Path) -> None:
    was = table(6)
    now = torch.cat([was, torch.ones(3, 3)])
    now[2], now[5, 0] = 9, torch.nan
    first, second = (Side.open(save(tmp_path / name, {"x": rows})) for name, rows in (("a", was), ("b", now)))
    found, num_gone, num_new = movement("x", first, second, 1)
    assert (found.num_rows, found.num_moved, found.num_not_finite, num_gone, num_new) == (6, 2, 1, 0, 3)
    assert list(found.names) == ["2"]


def test_the_command_names_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = save(tmp_path / "a", {"word": table(), "old": table(2), "wide": table(4, 2)}, step=7, words=WORDS)
    moved = table()
    moved[2] += 1
    save(tmp_path / "a", {"word": moved, "new": table(8), "wide": table(4, 3)}, step=9)
    assert main(["diff", f"{first}/checkpoints/step-000000007", first, "--top", "1"]) == 0
    printed = capsys.readouterr().out
    for part in (
        f"from  {first}/checkpoints/step-000000007, step 7, saved by 1 rank",
        f"to    {first}/checkpoints/step-000000009, step 9",
        "table new: only in",
        "table old: only in",
        "table wide: 4 x 2 and 4 x 3 cannot be compared, because their dims differ",
        "1 of 5 common rows moved",
        "  queen\n",
    ):
        assert part in printed
    assert "king" not in printed

    assert main(["diff", first, first, "--table", "word"]) == 0
    assert "0 of 5 common rows moved" in capsys.readouterr().out
    assert main(["diff", first, first, "--table", "words"]) == 2
    assert "--table must be one of new, wide, word, got 'words'" in capsys.readouterr().err
    assert main(["diff", first, str(tmp_path / "nowhere")]) == 2
    assert "expected a run folder with a complete checkpoint" in capsys.readouterr().err
