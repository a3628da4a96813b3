"""A click log is the same for every number of ranks, and so are its batches and its faults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from embedtrain.data.click_batches import ClickBatches
from embedtrain.data.prepare_clicks import ClickOptions, prepare_clicks
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.errors import UserError
from embedtrain.testing.threads import outcomes_on_threads, run_threads
from tests.unit.data.click_example import criteo_line, criteo_schema, examples_of, write_criteo


def read_all(ranks: Ranks, path: str, cache: str) -> tuple[str, bytes, list[list[tuple[object, ...]]], list[int]]:
    """Returns the log's fingerprint and bytes, and this rank's part of each step of an epoch."""
    options = ClickOptions(path=path, schema=criteo_schema(num_rows=None))
    log = prepare_clicks(options, cache, ranks, part_bytes=2000)
    batches = ClickBatches(log, 24, block_examples=8, seed=1, ranks=ranks)
    parts = [batches.batch(1, step) for step in range(batches.steps_per_epoch)]
    log_bytes = log.read(0, log.num_examples).examples.tobytes()
    return log.fingerprint, log_bytes, [examples_of(part) for part in parts], [part.num_global for part in parts]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_examples_of_one_rank(tmp_path: Path, world_size: int) -> None:
    path = str(write_criteo(tmp_path / "day.tsv", 101))
    alone = read_all(ONE_PROCESS, path, str(tmp_path / "alone"))
    ranks = run_threads(world_size, read_all, path, str(tmp_path / "ranks"))
    for fingerprint, log_bytes, _, num_global in ranks:
        assert (fingerprint, log_bytes, num_global) == (alone[0], alone[1], alone[3])
    together = [[example for part in step for example in part] for step in zip(*(r[2] for r in ranks), strict=True)]
    assert together == alone[2]


def test_faults_of_all_ranks_count_together(tmp_path: Path) -> None:
    path = write_criteo(tmp_path / "day.tsv", 100)
    lines = path.read_text().splitlines()
    for number in (5, 40, 90):
        lines[number - 1] = criteo_line(7)
    path.write_text("\n".join(lines))
    for outcome in outcomes_on_threads(2, prepare_with_two_faults, str(path), str(tmp_path / "cache")):
        assert isinstance(outcome, UserError)
        assert re.search(r"day.tsv:\d+: column label: expected a label of 0 or 1, got '7'", str(outcome))
        assert "3 bad lines exceed data.max_bad_lines=2" in str(outcome)


def prepare_with_two_faults(ranks: Ranks, path: str, cache: str) -> None:
    options = ClickOptions(path=path, schema=criteo_schema(), max_bad_lines=2)
    prepare_clicks(options, cache, ranks, part_bytes=2000)
