"""SASRec: its losses and its network against plain PyTorch, and any number of ranks against one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import embedtrain as et
from embedtrain.data.bags import Bags
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.recipes.sasrec import model as sasrec
from embedtrain.recipes.sasrec.batches import BatchOptions, SequenceBatches
from embedtrain.recipes.sasrec.encoder import PaddedEncoder, pack
from embedtrain.recipes.sasrec.model import Architecture, Sasrec
from embedtrain.testing.threads import run_threads
from embedtrain.train.step import train_step

NUM_ITEMS, DIM, MAX_LENGTH = 30, 8, 5


def random_sequences(num_users: int, seed: int) -> Bags:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 14, num_users)
    return Bags(np.append(0, lengths.cumsum()), generator.integers(0, NUM_ITEMS, lengths.sum()))


SEQUENCES = random_sequences(25, seed=1)


def make(ranks: Ranks = ONE_PROCESS, **shape: Any) -> Sasrec:
    architecture = Architecture(**{"max_length": MAX_LENGTH, "layers": 2, "heads": 2, "inner": 6, **shape})
    return Sasrec(et.TableSpec("item", NUM_ITEMS, DIM, init="normal"), architecture, ranks=ranks, seed=7)


def batches_of(ranks: Ranks = ONE_PROCESS, num_negatives: int = 0) -> SequenceBatches:
    options = BatchOptions(20, MAX_LENGTH, num_negatives)
    return SequenceBatches(SEQUENCES, NUM_ITEMS, options, seed=3, rank=ranks.rank, world_size=ranks.size)


def history_of(user: int, stop: int) -> list[int]:
    start, end = SEQUENCES.starts[user : user + 2].tolist()
    return SEQUENCES.values[start : min(end, start + stop)].tolist()


def test_an_epoch_predicts_every_item_but_the_first_from_at_most_the_newest() -> None:
    batches = batches_of()
    seen: list[tuple[int, ...]] = []
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(2, step)
        (lengths,), (targets,) = batch.lengths, batch.targets
        assert (np.diff(lengths) >= 0).all() and lengths.max() <= MAX_LENGTH
        assert batch.num_examples == batch.num_global_predictions == lengths.sum()
        for inputs, wanted in zip(batch.inputs.split(lengths.tolist()), targets.split(lengths.tolist()), strict=True):
            assert inputs[1:].equal(wanted[:-1])
            seen.append((*inputs.tolist(), int(wanted[-1])))
    expected: list[tuple[int, ...]] = []
    for user in range(len(SEQUENCES)):
        items = history_of(user, 99)
        while len(items) > 1:
            expected.append(tuple(items[-MAX_LENGTH - 1 :]))
            items = items[: -len(expected[-1]) + 1]
    assert sorted(seen) == sorted(expected)
    assert batches.examples_per_epoch == sum(len(items) - 1 for items in expected)


def test_no_step_is_empty() -> None:
    sequences = Bags(np.arange(4) * 6, np.arange(18) % NUM_ITEMS)  # 5 predictions each
    for size in (5, 6, 7, 11, 14):
        batches = SequenceBatches(sequences, NUM_ITEMS, BatchOptions(size, MAX_LENGTH), seed=3)
        sizes = [batches.batch(0, step).num_global_predictions for step in range(batches.steps_per_epoch)]
        assert min(sizes) > 0
        assert sum(sizes) == batches.examples_per_epoch


def plain_states(model: Sasrec, inputs: Tensor, lengths: np.ndarray) -> Tensor:
    """Returns what the network says of each position, sequence by sequence and with attention spelled out."""
    table, encoder, states = model.tables.gather_table("item"), model.dense, []
    for items in inputs.split(lengths.tolist()):
        x = encoder.input_norm(table[items] + encoder.positions[: len(items)].flip(0))
        for block in encoder.blocks:
            q, k, v = block.queries_keys_values(block.attention_norm(x)).chunk(3, dim=1)
            heads = []
            for a, b, c in zip(q.chunk(2, dim=1), k.chunk(2, dim=1), v.chunk(2, dim=1), strict=True):
                scores = (a @ b.T / (DIM / 2) ** 0.5).masked_fill(torch.ones(len(a), len(a)).triu(1) > 0, -torch.inf)
                heads.append(scores.softmax(dim=1) @ c)
            x = x + block.attended(torch.cat(heads, dim=1))
            x = x + block.out(F.gelu(block.hidden(block.perceptron_norm(x))))
        states.append(encoder.output_norm(x))
    return torch.cat(states)


@pytest.mark.parametrize("loss", ["full_softmax", "sampled_softmax"])
def test_losses_are_those_of_plain_pytorch(loss: sasrec.Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sasrec, "_SCORES_AT_ONCE", 3 * NUM_ITEMS)
    model = make(loss=loss, dropout=0.0)
    batch = batches_of(num_negatives=0 if loss == "full_softmax" else 9).batch(0, 0)
    table, (lengths,), (targets,) = model.tables.gather_table("item"), batch.lengths, batch.targets
    table = table.clone().requires_grad_()
    states = plain_states(model, batch.inputs, lengths).detach().requires_grad_()
    if loss == "full_softmax":
        expected = F.cross_entropy(states @ table.T, targets)
    else:
        drawn = batch.candidates
        scores = (states @ table[drawn].T - batch.log_expected).masked_fill(targets.unsqueeze(1) == drawn, -torch.inf)
        own = (states * table[targets]).sum(dim=1, keepdim=True)
        expected = F.cross_entropy(torch.cat([own, scores], dim=1), torch.zeros_like(targets))
    expected.backward()
    objective = model(batch)
    torch.testing.assert_close(objective.loss, expected.detach(), rtol=1e-5, atol=0)
    assert objective.num_predictions == len(targets)
    # Without the part that comes through the network, gradients of rows are those of the scores.
    vectors = model.dense.forward
    model.dense.forward = lambda *inputs: vectors(*inputs).detach()  # type: ignore[method-assign]
    model(batch).loss.backward()
    rows, values = model.tables.table_groups[0].gradients.rows_and_values()
    shard = model.tables.shards["item"]
    found = torch.zeros_like(table)
    found[shard.layout.id_of(rows)] = values
    torch.testing.assert_close(found, table.grad, rtol=1e-4, atol=1e-6)


def test_histories_are_encoded_in_their_order_and_a_package_encodes_them_alike() -> None:
    model = make()
    lengths = np.array([3, 1, 5, 5, 2, 4])
    items = torch.from_numpy(np.random.default_rng(5).integers(0, NUM_ITEMS, lengths.sum()))
    expected = plain_states(model, items, lengths)[lengths.cumsum() - 1]
    torch.testing.assert_close(model.encode(items, torch.from_numpy(lengths)), expected, rtol=1e-5, atol=1e-6)
    padded = torch.full((len(lengths), MAX_LENGTH), 7)
    for row, own in zip(padded, items.split(lengths.tolist()), strict=True):
        row[: len(own)] = own
    packaged = PaddedEncoder(model.dense)(model.tables.gather_table("item")[padded], torch.from_numpy(lengths))
    torch.testing.assert_close(packaged, expected, rtol=1e-5, atol=1e-6)
    assert model.encode(items[:0], torch.from_numpy(lengths[:0])).shape == (0, DIM)


def test_padding_is_bounded() -> None:
    lengths = torch.from_numpy(np.sort(np.random.default_rng(6).zipf(1.7, 300).clip(max=50)))
    runs = pack(lengths).runs
    assert sum(run.num_sequences for run in runs) == len(lengths)
    assert len(runs) < 15
    for run in runs:
        assert run.num_sequences * run.longest <= 1.5 * (run.stop - run.start)


def train(ranks: Ranks, loss: sasrec.Loss, num_parts: int = 1) -> Mapping[str, Tensor]:
    model = make(ranks, loss=loss)
    optimizer = et.optim.RowwiseAdagrad(model.tables, lr=0.1)
    dense = DenseOptimizer(model.dense, ranks=ranks, lr=0.01)
    batches = batches_of(ranks, num_negatives=0 if loss == "full_softmax" else 11)
    total = torch.zeros(2, dtype=torch.float64)
    for step in range(3):
        first, *others = batches.batch(0, step).split(num_parts)
        objective = train_step(model, optimizer, first, dense, further=others)
        total += torch.tensor([float(objective.total), objective.num_predictions], dtype=torch.float64)
    tables = {name: model.tables.gather_table("item", name) for name in ("weight", "accumulator")}
    return {**tables, **dense.tensors(), "loss": ranks.all_reduce(total)}


@pytest.mark.parametrize("loss", ["full_softmax", "sampled_softmax"])
def test_ranks_train_as_one_process(loss: sasrec.Loss) -> None:
    expected = train(ONE_PROCESS, loss)
    for world_size, num_parts in ((2, 1), (3, 1), (2, 3)):
        for found in run_threads(world_size, train, loss, num_parts):
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_dropout_leaves_out_its_share_alike_on_all_ranks_and_anew_each_step() -> None:
    def masks(ranks: Ranks, step: int) -> dict[int, Tensor]:
        batch = batches_of(ranks).batch(0, step)
        model = make(ranks, dropout=0.3)
        prepared = model.prepare(batch)
        dropout = sasrec.Dropout(0.3, batch.dropout_key, prepared.places, 5)
        return dict(zip(prepared.places.tolist(), dropout(torch.ones(len(prepared.places), 64), 2), strict=True))

    alone, again = masks(ONE_PROCESS, 0), masks(ONE_PROCESS, 1)
    for found in run_threads(3, masks, 0):
        assert all(torch.equal(mask, alone[place]) for place, mask in found.items())
    every = torch.stack([*alone.values(), *again.values()])
    assert every.unique().tolist() == pytest.approx([0.0, 1 / 0.7], rel=1e-4)
    assert float((every == 0).double().mean()) == pytest.approx(0.3, abs=0.03)
    assert not torch.equal(alone[0], again[0])
