from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from embedtrain.data.click_batches import ClickBatch
from embedtrain.data.click_schema import CategoricalColumn, ClickSchema
from embedtrain.data.click_stream import ClickStream, StreamOptions
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.errors import UserError
from embedtrain.testing.threads import run_threads

SCHEMA = ClickSchema(
    file_format="csv",
    label="label",
    dense=("x",),
    categorical=(
        CategoricalColumn(name="user", num_rows=100, encoding="id"),
        CategoricalColumn(name="tags", num_rows=50, encoding="id", is_bag=True),
    ),
    columns=("label", "x", "user", "tags"),
    dense_transform="none",
)
LINES = [f"{n % 2},{n}.5,{n},{'|'.join(str(t) for t in range(n % 4))}" for n in range(11)]


def stream_of(path: Path, ranks: Ranks = ONE_PROCESS, **options: Any) -> ClickStream:
    return ClickStream(StreamOptions(str(path), lines_per_step=4, **options), SCHEMA, ranks)


def write(folder: Path, name: str, lines: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(f"{line}\n" for line in lines))


def steps_of(stream: ClickStream, position: Mapping[str, Any] | None = None) -> list[tuple[ClickBatch, dict]]:
    steps, reached = [], dict(position or {})
    while True:
        batch, reached, is_over = stream.next_batch(reached)
        if is_over:
            return steps
        assert batch is not None
        steps.append((batch, dict(reached)))


def users_of(batches: list[ClickBatch]) -> list[int]:
    return [int(user) for batch in batches for user in batch.features["user"].values]


def test_each_example_is_in_one_step_as_it_stands(tmp_path: Path) -> None:
    write(tmp_path, "a", LINES[:6])
    write(tmp_path, "b", LINES[6:])
    batches = [batch for batch, _ in steps_of(stream_of(tmp_path))]
    assert [batch.num_examples for batch in batches] == [4, 4, 3]
    assert users_of(batches) == list(range(11))
    assert batches[1].labels.tolist() == [0, 1, 0, 1]
    assert batches[1].dense.flatten().tolist() == [4.5, 5.5, 6.5, 7.5]  # as they stand: no mean is known
    assert batches[1].features["tags"].lengths.tolist() == [0, 1, 2, 3]
    assert batches[1].features["tags"].values.tolist() == [0, 0, 1, 0, 1, 2]


def test_it_goes_on_from_any_step(tmp_path: Path) -> None:
    write(tmp_path, "a", LINES[:6])
    write(tmp_path, "b", LINES[6:])
    whole = steps_of(stream_of(tmp_path))
    for number, (_, position) in enumerate(whole):
        rest = [batch for batch, _ in steps_of(stream_of(tmp_path), position)]
        assert users_of(rest) == users_of([batch for batch, _ in whole[number + 1 :]])


def parts_of(ranks: Ranks, path: Path) -> list[tuple[list[int], list[int], int]]:
    return [
        (users_of([batch]), batch.features["tags"].values.tolist(), batch.num_global)
        for batch, _ in steps_of(stream_of(path, ranks))
    ]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_lines_of_a_step(tmp_path: Path, world_size: int) -> None:
    write(tmp_path, "a", LINES)
    alone = parts_of(ONE_PROCESS, tmp_path)
    shared = list(zip(*run_threads(world_size, parts_of, tmp_path), strict=True))
    assert len(alone) == len(shared) == 3
    for (users, tags, num_global), parts in zip(alone, shared, strict=True):
        assert [user for part, _, _ in parts for user in part] == users
        assert [tag for _, part, _ in parts for tag in part] == tags
        assert {number for _, _, number in parts} == {num_global}
        sizes = [len(part) for part, _, _ in parts]
        assert max(sizes) - min(sizes) <= 1


def test_bad_lines_are_left_out_and_counted_until_there_are_too_many(tmp_path: Path) -> None:
    bad = [*LINES[:2], "2,1,1,", "1,1,100,", *LINES[2:7], "1,1", *LINES[7:]]
    write(tmp_path, "a", bad)
    steps = steps_of(stream_of(tmp_path, max_bad_lines=3))
    assert users_of([batch for batch, _ in steps]) == list(range(11))
    assert [position["bad_lines"] for _, position in steps] == [2, 2, 3, 3]
    with pytest.raises(UserError, match=r"a:10: expected 4 fields, got 2\. 3 bad lines .*max_bad_lines=2"):
        steps_of(stream_of(tmp_path, max_bad_lines=2))
    # What was left out before the run was stopped counts on.
    with pytest.raises(UserError, match="3 bad lines"):
        steps_of(stream_of(tmp_path, max_bad_lines=2), steps[0][1])


def test_blank_lines_are_no_examples(tmp_path: Path) -> None:
    write(tmp_path, "a", ["", "", "", "", *LINES[:2], "", LINES[2]])
    batches = [batch for batch, _ in steps_of(stream_of(tmp_path))]
    assert [batch.num_examples for batch in batches] == [0, 3]
    assert torch.equal(batches[1].labels, torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"columns": None}, "give data.columns"),
        ({"file_format": "parquet"}, "cannot be streamed: use a format of lines"),
        ({"categorical": (CategoricalColumn(name="user"),)}, "user cannot have a vocabulary: give data.num_rows"),
    ],
)
def test_what_must_know_the_data_in_advance_is_refused(tmp_path: Path, schema: dict, message: str) -> None:
    options = {**vars(SCHEMA), **schema}
    with pytest.raises(UserError, match=message):
        ClickStream(StreamOptions(str(tmp_path), lines_per_step=4), ClickSchema(**options), ONE_PROCESS)
