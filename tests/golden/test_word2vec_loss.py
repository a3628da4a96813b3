"""The loss of a small run, step by step: a change of any draw, sum or formula on the way shows here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embedtrain.data.prepare import CorpusOptions, prepare_corpus
from embedtrain.data.skipgram import SamplingOptions, TextBatches
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.ops.skipgram_block import Architecture
from embedtrain.optim import RowwiseAdagrad
from embedtrain.recipes.word2vec.model import Word2Vec
from embedtrain.train.step import train_step

GOLDEN: dict[Architecture, list[float]] = {
    "skipgram": [
        4.0990307,
        4.0691015,
        4.0728973,
        4.0674302,
        4.0076515,
        3.842489,
        3.464083,
        3.091874,
        2.8353186,
        2.7560984,
    ],
    "cbow": [
        4.0966082,
        4.0690522,
        4.0720192,
        4.0853197,
        4.0821875,
        4.0952436,
        4.0832328,
        4.0920686,
        4.0667994,
        4.0798558,
    ],
}


def write_text(path: Path) -> None:
    words = [a + b for a in "abcdefgh" for b in "klmnop"]
    # A congruential sequence: no library's generator may change this text.
    state, lines = 1, []
    for _ in range(300):
        line = []
        for _ in range(8):
            state = (state * 1103515245 + 12345) % (1 << 31)
            line.append(words[(state >> 16) % len(words)])
        lines.append(" ".join(line))
    path.write_text("\n".join(lines))


@pytest.mark.parametrize("architecture", GOLDEN)
def test_losses_are_those_recorded(tmp_path: Path, architecture: Architecture) -> None:
    write_text(tmp_path / "text.txt")
    corpus = prepare_corpus(CorpusOptions(path=str(tmp_path / "text.txt")), str(tmp_path / "cache"), ONE_PROCESS)
    batches = TextBatches(corpus, SamplingOptions(sample=0.02), block_words=64, blocks_per_step=4, seed=5)
    model = Word2Vec(len(corpus.vocabulary), 12, architecture=architecture, seed=5)
    optimizer = RowwiseAdagrad(model.tables, lr=0.1, initial_accumulator_value=10.0)
    losses = []
    for step in range(batches.steps_per_epoch):
        objective = train_step(model, optimizer, batches.batch(0, step))
        losses.append(float(objective.total) / objective.num_predictions)
    # Not to the last bit: float32 sums run in another order on other vector units.
    np.testing.assert_allclose(losses, GOLDEN[architecture], rtol=1e-5)
