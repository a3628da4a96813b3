"""Steps of growing size: where they lie, and runs that stop and go on among them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embedtrain import cli
from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from embedtrain.data import skipgram
from embedtrain.data.partition import StepPlan
from embedtrain.train.calendar import Calendar


class _Batches:
    """Batches of blocks that are never drawn."""

    examples_per_epoch = 50

    def __init__(self, growth: float | None) -> None:
        self._plan = StepPlan(50, 20, growth=growth, blocks_at_first=4)
        self.is_growing, self.steps_of, self.steps_per_epoch = self._plan.is_growing, self._plan.steps_of, 3

    def share_done(self, epoch: int, step: int) -> float:
        return float(self._plan.blocks(epoch, step).start / 50)

    def batch(self, epoch: int, step: int) -> None:
        raise AssertionError


@pytest.mark.parametrize("growth", [None, 0.25])
def test_steps_are_numbered_through_all_epochs(growth: float | None) -> None:
    batches = _Batches(growth)
    places = [(epoch, step) for epoch in range(4) for step in range(batches.steps_of(epoch))]
    assert (len(places) > 4 * 3) == (growth is not None)
    for number in (5, 0, *range(len(places)), 2):
        assert Calendar(batches).place_of(number) == places[number]
    calendar = Calendar(batches)
    assert [calendar.place_of(number) for number in range(len(places))] == places
    assert calendar.first_step_of(4) == len(places)
    shares = [calendar.share_done(number, 4) for number in range(len(places))]
    if growth is None:
        assert shares == [number / len(places) for number in range(len(places))]
    else:
        assert shares == [(e * 50 + batches._plan.blocks(e, s).start) / 200 for e, s in places]
    assert calendar.share_done(len(places), 4) == 1.0


def run(text: Path, folder: Path, epochs: int) -> dict[str, torch.Tensor]:
    settings = [
        f"data.path={text}",
        f"data.cache_path={text.parent / 'cache'}",
        f"run.path={folder}",
        f"train.epochs={epochs}",
        "data.min_count=1",
        "table.dim=8",
        "train.block_words=32",
        "train.words_per_step=1024",
        "schedule.name=constant",
        "log.tensorboard=false",
        "run.device=cpu",
        "word2vec.sample=0",
    ]
    assert cli.main(["train", "word2vec", *settings]) == 0
    path = latest_checkpoint(f"{folder}/checkpoints")
    assert path is not None
    with CheckpointReader(path) as reader:
        assert reader.state["train"]["examples"] == 3000 * epochs
        return {name: reader.read(name, 0, info.shape[0]) for name, info in reader.tensors.items()}


def test_a_damped_run_goes_on_among_its_growing_steps_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skipgram, "WORDS_AT_FIRST", 128)
    generator = torch.Generator().manual_seed(0)
    words = (torch.rand(2, 3000, generator=generator).prod(dim=0) * 40).long().tolist()
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(
            " ".join(f"w{'abcdefghij'[w % 10]}{'klmn'[w // 10]}" for w in words[i : i + 25]) for i in range(0, 3000, 25)
        )
    )
    whole = run(text, tmp_path / "whole", 3)
    run(text, tmp_path / "parts", 1)
    parts = run(text, tmp_path / "parts", 3)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(values, parts[name]) for name, values in whole.items())
