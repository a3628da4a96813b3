"""Word vectors: skip-gram or CBOW with negative sampling, on sharded tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from embedtrain.data.skipgram import TextBatch
from embedtrain.distributed.runtime import size_of
from embedtrain.embedding.collection import CollectionOptions, EmbeddingCollection
from embedtrain.jagged import Jagged
from embedtrain.models.objective import Objective
from embedtrain.ops.skipgram_block import Architecture, TextBlock, count_predictions, reach_of, skipgram_block
from embedtrain.spec import FeatureSpec, TableSpec
from embedtrain.stages import stage

if TYPE_CHECKING:
    from typing_extensions import Unpack

INPUT, OUTPUT = "input", "output"
"""Names of the tables; "input" holds the word vectors."""


class Word2Vec(nn.Module):
    """word2vec over a block of text a step: each distinct row is fetched once and its gradient goes home once.

    As in word2vec, every word counts in full: a step's gradient is the sum over the words of all ranks, not
    their mean, so that a learning rate and an initial accumulator mean the same for every size of step.

    Args:
        num_words: size of the vocabulary.
        dim: of the vectors.
        architecture: "skipgram" or "cbow".
        dtype: storage of both tables.
        options: see `EmbeddingCollection`. First values: input rows uniform within 0.5 / dim, output rows zero.
    """

    def __init__(
        self,
        num_words: int,
        dim: int,
        *,
        architecture: Architecture = "skipgram",
        dtype: torch.dtype = torch.float32,
        **options: Unpack[CollectionOptions],
    ) -> None:
        super().__init__()
        self.tables = EmbeddingCollection(
            [
                TableSpec(INPUT, num_words, dim, dtype=dtype, init="uniform", init_scale=0.5 / dim),
                TableSpec(OUTPUT, num_words, dim, dtype=dtype, init="zeros"),
            ],
            [FeatureSpec(INPUT), FeatureSpec(OUTPUT)],
            **options,
        )
        self._architecture = architecture

    def forward(self, batch: TextBatch) -> Objective:
        """Returns the loss of this rank's batch. Collective: every rank, and its backward too."""
        vectors, block = self._fetch(batch)
        total: Tensor = _SkipGramLoss.apply(vectors, block, self._architecture)  # type: ignore[no-untyped-call]
        return Objective(
            # The exchange averages over the ranks; word2vec's step is a sum.
            loss=total * size_of(self.tables.process_group),
            total=total.detach(),
            num_predictions=int(count_predictions(block, self._architecture)),
        )

    def _fetch(self, batch: TextBatch) -> tuple[Tensor, TextBlock]:
        """Fetches the block's distinct rows and points the block at them."""
        device = self.tables.device
        words, drawn = batch.sample.words.to(device), batch.sample.negatives.to(device)
        # A negative left out needs a row all the same: its centre's, which is there anyway.
        is_left_out = drawn < 0
        negatives = torch.where(is_left_out, words.unsqueeze(1), drawn)
        vectors, inverse = self.tables.distinct_rows(
            {INPUT: Jagged.from_ids(words), OUTPUT: Jagged.from_ids(torch.cat([words, negatives.flatten()]))}
        )
        outputs, negative_rows = inverse[OUTPUT].split([words.numel(), negatives.numel()])
        return vectors, TextBlock(
            inputs=inverse[INPUT],
            outputs=outputs,
            negatives=negative_rows.view_as(negatives).masked_fill(is_left_out, -1),
            starts=batch.sample.starts.to(device),
            stops=batch.sample.stops.to(device),
            # Found here, where the sample is in host memory.
            reach=reach_of(batch.sample.starts, batch.sample.stops) if device.type == "cuda" else None,
        )


class _SkipGramLoss(torch.autograd.Function):
    """The op computes its gradient on the way forward, so backward only scales it."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, block: TextBlock, architecture: Architecture) -> Tensor:
        with stage("kernel"):
            loss, grad = skipgram_block(vectors, block, architecture)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_of_loss: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_of_loss.to(grad.dtype), None, None
