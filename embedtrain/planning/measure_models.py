"""Measures what models do beside looking up rows: layers, losses of scores, and reading their examples."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from embedtrain.data.click_batches import ClickBatches
from embedtrain.data.click_schema import CategoricalColumn, ClickSchema
from embedtrain.data.prepare_clicks import ClickOptions, prepare_clicks
from embedtrain.data.retrieval_batches import DrawOptions, RetrievalBatches
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.ops.sample_text import KEEP_BITS, SamplingTables, TextSample, sample_text
from embedtrain.ops.skipgram_block import TextBlock, count_predictions, skipgram_block
from embedtrain.planning.counting import count
from embedtrain.planning.made_up import made_up_interactions
from embedtrain.planning.timing import median_seconds
from embedtrain.recipes.retrieval.model import Scoring, pair_losses
from embedtrain.sharding.plan import Arithmetic

_EXAMPLES, _WIDTH, _LAYERS = 4096, 64, 4
_FEATURES = 24, 16
_USERS, _ITEMS_EACH, _CANDIDATES = 512, 4, 512
_FEW_COLUMNS, _MANY_COLUMNS = 2, 34
_WORDS, _VOCABULARY, _NEGATIVES, _WINDOW, _VECTOR_DIMS = 4096, 1 << 16, 5, 5, (64, 256)


def arithmetic_rates(device: torch.device) -> dict[str, float]:
    """Returns the rates of operations on whole tensors: of products, of what they return, and of starting them."""
    left, right = torch.rand(2048, 512, device=device), torch.rand(512, 512, device=device)
    of_product = median_seconds(lambda: left @ right, device) / (left.numel() * right.shape[1])
    seconds, work = _timed(_layers(1, 8, device), device)
    of_op = seconds / work.ops
    rates = {
        "dense_products_per_second": 1 / of_product,
        "batched_products_per_second": _batched_products_per_second(device),
        "op_seconds": of_op,
    }
    for name, run in {
        "values_per_second": _layers(_EXAMPLES, _WIDTH, device),
        "score_values_per_second": _scores(device),
    }.items():
        seconds, work = _timed(run, device)
        # What the products and the starts leave; a tenth where a disturbance left nothing.
        of_values = max(seconds - work.products * of_product - work.ops * of_op, seconds / 10)
        rates[name] = work.values / of_values
    return rates


def skipgram_rates(device: torch.device) -> dict[str, float]:
    """Returns the rates of drawing from a text, and of the word2vec kernel: a part for each score, and one by dim."""
    texts = [torch.randint(_VOCABULARY, (_WORDS,), dtype=torch.int32) for _ in range(8)]
    tokens, positions = itertools.cycle(texts), torch.arange(_WORDS)
    everything = torch.full((_VOCABULARY,), 1 << KEEP_BITS, dtype=torch.int32)
    rows = torch.arange(_VOCABULARY)
    tables = SamplingTables(everything, torch.stack([rows, rows], dim=1), torch.tensor([0, _VOCABULARY]))
    keys = itertools.count()

    def draw() -> TextSample:
        return sample_text(next(tokens), positions, tables, window=_WINDOW, num_negatives=_NEGATIVES, key=next(keys))

    sample = draw()
    block = TextBlock(
        torch.randint(4 * _WORDS, (_WORDS,), device=device),
        torch.randint(4 * _WORDS, (_WORDS, 1 + _NEGATIVES), device=device),
        sample.starts.to(device),
        sample.stops.to(device),
    )
    scores = int(count_predictions(block)) * (1 + _NEGATIVES)
    vectors = [torch.rand(4 * _WORDS, dim, device=device) - 0.5 for dim in _VECTOR_DIMS]
    narrow, wide = (median_seconds(functools.partial(skipgram_block, each, block), device) for each in vectors)
    by_dim = max((wide - narrow) / (_VECTOR_DIMS[1] - _VECTOR_DIMS[0]), narrow / 1000)
    return {
        "sample_draws_per_second": _WORDS * (1 + _NEGATIVES) / median_seconds(draw),
        "skipgram_scores_per_second": scores / max(narrow - _VECTOR_DIMS[0] * by_dim, narrow / 10),
        "skipgram_products_per_second": scores * 3 / by_dim,
    }


def loader_rates() -> dict[str, float]:
    """Returns the rates at which examples become batches, on the CPU."""
    interactions = _interactions()
    steps = itertools.cycle(range(interactions.steps_per_epoch))
    few, many = (_record_seconds(columns) for columns in (_FEW_COLUMNS, _MANY_COLUMNS))
    of_value = max((many - few) / (_MANY_COLUMNS - _FEW_COLUMNS), few / 1000)
    return {
        "positives_per_second": _USERS * _ITEMS_EACH / median_seconds(lambda: interactions.batch(0, next(steps))),
        "records_per_second": 1 / max(few - _FEW_COLUMNS * of_value, few / 10),
        "record_values_per_second": 1 / of_value,
    }


def _timed(run: Callable[[], object], device: torch.device) -> tuple[float, Arithmetic]:
    seconds = median_seconds(run, device)
    return seconds, count(run)


def _batched_products_per_second(device: torch.device) -> float:
    """Returns the rate of the products of all pairs of features, forward and backward, as DLRM has them."""
    vectors = torch.rand(_EXAMPLES, *_FEATURES, device=device, requires_grad=True)
    grad = torch.rand(_EXAMPLES, _FEATURES[0], _FEATURES[0], device=device)
    products = 3 * vectors.numel() * _FEATURES[0]
    return products / median_seconds(lambda: torch.bmm(vectors, vectors.transpose(1, 2)).backward(grad), device)


def _layers(num_examples: int, width: int, device: torch.device) -> Callable[[], None]:
    """Returns a step of a perceptron whose input learns too."""
    layers = [layer for _ in range(_LAYERS) for layer in (nn.Linear(width, width), nn.ReLU())]
    network = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.Adam(network.parameters())
    inputs = torch.rand(num_examples, width, device=device, requires_grad=True)

    def step() -> None:
        network(inputs).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _scores(device: torch.device) -> Callable[[], None]:
    """Returns the softmax over the scores of users and candidates, with its gradient."""
    batch = _interactions().batch(0, 0)
    users, positives, candidates = (
        torch.rand(len(ids), _WIDTH, device=device, requires_grad=True)
        for ids in (batch.users, batch.positives, batch.candidates)
    )

    def step() -> None:
        pair_losses(batch, Scoring(similarity="dot"), users, positives, candidates).sum().backward()

    return step


def _interactions() -> RetrievalBatches:
    """Returns the batches of made-up interactions."""
    known = made_up_interactions(16 * _USERS, 64 * _CANDIDATES, 1.0)
    draw = DrawOptions(_USERS, _ITEMS_EACH, _CANDIDATES, in_batch=True)
    return RetrievalBatches(known, 64 * _CANDIDATES, draw, seed=0)


def _record_seconds(num_columns: int) -> float:
    """Returns the time in which an example of a click log is read, half of its columns numbers."""
    numbers, looked_up = [f"x{i}" for i in range(num_columns // 2)], [f"c{i}" for i in range(num_columns // 2)]
    num_examples = 8 * _EXAMPLES
    ids = np.arange(num_examples) % 10
    columns = {"label": ids % 2, **dict.fromkeys(looked_up, ids), **dict.fromkeys(numbers, ids.astype(np.float32))}
    schema = ClickSchema(
        file_format="parquet",
        label="label",
        dense=tuple(numbers),
        categorical=tuple(CategoricalColumn(name=name, num_rows=10, encoding="id") for name in looked_up),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clicks.parquet"
        pq.write_table(pa.table(columns), path)
        log = prepare_clicks(ClickOptions(path=str(path), schema=schema), folder, ONE_PROCESS)
        batches = ClickBatches(log, _EXAMPLES, seed=0)
        steps = itertools.cycle(range(batches.steps_per_epoch))
        return median_seconds(lambda: batches.batch(0, next(steps))) / _EXAMPLES
