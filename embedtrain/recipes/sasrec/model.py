"""SASRec on a sharded table of items, which is both its input and its output table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedtrain.embedding.collection import CollectionOptions, EmbeddingCollection
from embedtrain.embedding.input_dist import Asked
from embedtrain.jagged import Jagged
from embedtrain.ops._backend.transfer import to_device
from embedtrain.recipes.sasrec.batches import SequenceBatch
from embedtrain.recipes.sasrec.config import ITEM as ITEM
from embedtrain.recipes.sasrec.encoder import Dropout, Encoder, Packing, pack
from embedtrain.recipes.sasrec.softmax import full_softmax
from embedtrain.spec import TableSpec
from embedtrain.train.task import Objective

if TYPE_CHECKING:
    from typing_extensions import Unpack

Loss = Literal["full_softmax", "sampled_softmax"]

_SCORES_AT_ONCE = 1 << 22
"""Scores per part of the full softmax: 16 MiB in float32."""
_NOT_A_NEGATIVE = -1e30


@dataclass(frozen=True)
class Architecture:
    """Holds the sizes of the network and the loss.

    Attributes:
        max_length: maximum number of items from which a prediction is made.
        layers: number of blocks.
        heads: number of attention heads.
        inner: width of the perceptrons' hidden layers.
        dropout: dropout rate in training.
        loss: softmax over all items, or over sampled items.
    """

    max_length: int = 50
    layers: int = 2
    heads: int = 2
    inner: int = 128
    dropout: float = 0.3
    loss: Loss = "full_softmax"


@dataclass(frozen=True)
class PreparedSequences:
    """Holds a batch whose ids were exchanged.

    Attributes:
        batch: the batch.
        packing: how its sequences are packed.
        places: [m] int64; number of each position, unique in the step over all ranks.
        targets: full softmax: for the targets of all ranks, the index among this rank's rows, -1 if another rank owns
            the target. Sampled softmax: this rank's target items.
        log_expected: [c] float32; see `SequenceBatch`.
        vectors: pending look-ups of the vectors of the items.
    """

    batch: SequenceBatch
    packing: Packing
    places: Tensor
    targets: Tensor
    log_expected: Tensor
    vectors: Asked


class Sasrec(nn.Module):
    """Predicts the next item of a sequence; an item's score is the dot product of its vector and the encoded sequence.

    Args:
        table: the table of items.
        architecture: sizes of the network and the loss.
        options: see `EmbeddingCollection`; the encoder has the same seed.

    Attributes:
        dense: the encoder.
    """

    def __init__(self, table: TableSpec, architecture: Architecture, **options: Unpack[CollectionOptions]) -> None:
        super().__init__()
        self.architecture = architecture
        self.tables = EmbeddingCollection([table], **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.get("seed", 0))
            self.dense = Encoder(
                table.dim, architecture.max_length, architecture.layers, architecture.heads, architecture.inner
            )
        self.dense.to(self.tables.device)

    def forward(self, batch: SequenceBatch | PreparedSequences) -> Objective:
        """Returns the loss of this rank's batch. Collective: every rank, and its backward too."""
        prepared = self.prepare(batch, is_ahead=False) if isinstance(batch, SequenceBatch) else batch
        batch = prepared.batch
        vectors = self.tables.look_up(prepared.vectors)[ITEM]
        num_inputs = batch.inputs.numel()
        dropout = Dropout(self.architecture.dropout, batch.dropout_key, prepared.places, self.dense.num_masks)
        states = self.dense(vectors[:num_inputs], prepared.packing, dropout).float()
        if self.architecture.loss == "full_softmax":
            total = self._full(prepared, states)
        else:
            total = self._sampled(prepared, states, vectors[num_inputs:])
        # The factor makes this a mean over the global batch, because the exchange averages gradients over the ranks.
        loss = total * (self.tables.ranks.size / max(1, batch.num_global_predictions))
        return Objective(loss, total.detach().double(), num_inputs)

    def _full(self, prepared: PreparedSequences, states: Tensor) -> Tensor:
        """Returns the summed loss of the predictions, of all ranks, whose targets this rank owns."""
        ranks = self.tables.ranks
        shard = self.tables.shards[ITEM]
        every = ranks.all_gather_rows(states, [len(targets) for targets in prepared.batch.targets])
        states_at_once = max(1, _SCORES_AT_ONCE // shard.layout.rows_per_rank)
        return full_softmax(every, self.tables.own_rows(ITEM), prepared.targets, ranks, states_at_once)

    def _sampled(self, prepared: PreparedSequences, states: Tensor, vectors: Tensor) -> Tensor:
        """Returns the summed loss of this rank's predictions."""
        ranks, batch = self.tables.ranks, prepared.batch
        targets, own_negatives = vectors[: len(states)], vectors[len(states) :]
        negatives = ranks.all_gather_rows(own_negatives, [len(share) for share in batch.shares])
        positive = (states * targets).sum(dim=1)
        scores = F.linear(states, negatives).float() - prepared.log_expected
        is_target = prepared.targets.unsqueeze(1) == to_device(batch.candidates, scores.device)
        negative = torch.logsumexp(scores.masked_fill(is_target, _NOT_A_NEGATIVE), dim=1)
        return (torch.logaddexp(positive, negative) - positive).sum()

    def prepare(self, batch: SequenceBatch, *, is_ahead: bool = True) -> PreparedSequences:
        """Exchanges the ids of a step, for `forward` later. Collective: every rank, in order of steps."""
        device = self.tables.device
        lengths = torch.from_numpy(batch.lengths[batch.rank])
        packing = pack(lengths)
        firsts = torch.repeat_interleave(batch.numbers * self.architecture.max_length, lengths)
        asked, targets = [batch.inputs], batch.targets[batch.rank]
        if self.architecture.loss == "full_softmax":
            targets = self._own_places(torch.cat(batch.targets))
        else:
            share = batch.shares[batch.rank]
            asked += [targets, batch.candidates[share.start : share.stop]]
        return PreparedSequences(
            batch,
            packing.to(device),
            to_device(firsts + packing.from_end, device),
            to_device(targets, device),
            to_device(batch.log_expected, device),
            self.tables.ask({ITEM: Jagged.from_ids(torch.cat(asked))}, is_ahead=is_ahead),
        )

    def _own_places(self, items: Tensor) -> Tensor:
        """Returns the index of each item among this rank's rows; -1 if another rank owns the item."""
        shard = self.tables.shards[ITEM]
        start, stop = shard.slots
        slots = shard.layout.slot_of(items)
        return torch.where((slots >= start) & (slots < stop), slots - start, -1)

    def bring_rows(self, prepared: PreparedSequences) -> None:
        """Copies rows of a step from host memory to the device."""
        self.tables.bring_rows(prepared.vectors)

    @torch.no_grad()
    def encode(self, items: Tensor, lengths: Tensor) -> Tensor:
        """Returns the vectors [n, dim] of histories; dot products with item vectors score the next item.

        Collective: every rank; the histories may differ.

        Args:
            items: [sum(lengths)] int64 rows of items, history after history, the newest last.
            lengths: [n] int64; items per history, 1 to `max_length`.
        """
        order = torch.argsort(lengths, stable=True)
        firsts = lengths.cumsum(0) - lengths
        sorted_lengths = lengths[order]
        offsets = sorted_lengths.cumsum(0) - sorted_lengths
        positions = torch.arange(int(lengths.sum())) + torch.repeat_interleave(firsts[order] - offsets, sorted_lengths)
        packing = pack(sorted_lengths).to(self.tables.device)
        vectors = self.tables({ITEM: Jagged.from_ids(items[positions])})[ITEM]
        states: Tensor = self.dense(vectors, packing)[packing.last].float()
        return states[torch.argsort(order).to(states.device)]
