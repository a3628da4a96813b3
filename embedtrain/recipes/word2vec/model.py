"""Word vectors: skip-gram or CBOW with negative sampling, on sharded tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from embedtrain.data.skipgram import TextBatch
from embedtrain.distributed.stages import stage
from embedtrain.embedding.collection import CollectionOptions, EmbeddingCollection
from embedtrain.embedding.input_dist import Asked
from embedtrain.jagged import Jagged
from embedtrain.ops._backend.transfer import to_device
from embedtrain.ops.skipgram_block import (
    Architecture,
    TextBlock,
    count_of_rows,
    count_predictions,
    reach_of,
    skipgram_block,
)
from embedtrain.recipes.word2vec.config import INPUT as INPUT
from embedtrain.recipes.word2vec.config import OUTPUT as OUTPUT
from embedtrain.spec import DEFAULT_OPTIMIZER, FeatureSpec, TableSpec
from embedtrain.train.task import Objective

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class PreparedText:
    """A batch on the device, for which the ids were exchanged.

    Attributes:
        rows: the distinct rows of the block, asked for.
        block: the predictions of the step, by position among the rows.
        num_predictions: see `Objective`.
        counts: [at least num_distinct] float32; in how many predictions each row takes part; None if nobody asks.
    """

    rows: Asked
    block: TextBlock
    num_predictions: int
    counts: Tensor | None = None


def word2vec_tables(
    num_words: int, dim: int, dtype: torch.dtype, optimizers: Mapping[str, str] | None = None
) -> list[TableSpec]:
    """Returns the tables of the model; `optimizers` names the optimizer of each table that has its own."""
    trained_by = {INPUT: DEFAULT_OPTIMIZER, OUTPUT: DEFAULT_OPTIMIZER, **(optimizers or {})}
    return [
        TableSpec(INPUT, num_words, dim, dtype, "uniform", 0.5 / dim, trained_by[INPUT]),
        TableSpec(OUTPUT, num_words, dim, dtype, "zeros", optimizer=trained_by[OUTPUT]),
    ]


class Word2Vec(nn.Module):
    """word2vec over a block of text a step: each distinct row is fetched once and its gradient goes home once.

    As in word2vec, every word counts in full: a step's gradient is the sum over the words of all ranks, not
    their mean, so that a learning rate and an initial accumulator mean the same for every size of step.

    Args:
        num_words: size of the vocabulary.
        dim: of the vectors.
        architecture: "skipgram" or "cbow".
        dtype: storage of both tables.
        optimizers: by table, the `TableSpec.optimizer` of one that does not share the other's.
        options: see `EmbeddingCollection`. First values: input rows uniform within 0.5 / dim, output rows zero.

    Attributes:
        counts_rows: whether the counts that `optim.CurvatureDamping` needs travel with the gradients.
    """

    def __init__(
        self,
        num_words: int,
        dim: int,
        *,
        architecture: Architecture = "skipgram",
        dtype: torch.dtype = torch.float32,
        optimizers: Mapping[str, str] | None = None,
        **options: Unpack[CollectionOptions],
    ) -> None:
        super().__init__()
        self.tables = EmbeddingCollection(
            word2vec_tables(num_words, dim, dtype, optimizers),
            [FeatureSpec(INPUT), FeatureSpec(OUTPUT)],
            **options,
        )
        self._architecture = architecture
        self.counts_rows = False

    def forward(self, batch: TextBatch | PreparedText) -> Objective:
        """Returns the loss of this rank's batch. Collective: every rank, and its backward too."""
        if isinstance(batch, TextBatch):
            batch = self._ask(batch, is_ahead=False)
        vectors = self.tables.distinct_rows(batch.rows, counts=batch.counts)
        # The exchange averages over the ranks; word2vec's step is a sum.
        num_ranks = self.tables.ranks.size
        loss: Tensor = _SkipGramLoss.apply(vectors, batch.block, self._architecture, num_ranks)  # type: ignore[no-untyped-call]
        return Objective(loss=loss, total=loss.detach() / num_ranks, num_predictions=batch.num_predictions)

    def prepare(self, batch: TextBatch) -> PreparedText:
        """Does all of a step that needs no row, for `forward` later. Collective: every rank, in order of steps."""
        return self._ask(batch, is_ahead=True)

    def bring_rows(self, prepared: PreparedText) -> None:
        """Copies rows of a step that live in host memory to the device."""
        self.tables.bring_rows(prepared.rows)

    def _ask(self, batch: TextBatch, *, is_ahead: bool) -> PreparedText:
        """Asks for the block's distinct rows and points the block at their places."""
        sample, windows, device = batch.sample, batch.windows, self.tables.device
        ids = {INPUT: Jagged.from_ids(sample.words), OUTPUT: Jagged.from_ids(sample.targets.flatten())}
        rows = self.tables.ask(ids, is_ahead=is_ahead)
        places = rows.places()
        block = TextBlock(
            inputs=places[INPUT],
            targets=places[OUTPUT].view_as(sample.targets),
            starts=to_device(sample.starts, device),
            stops=to_device(sample.stops, device),
            # Found here, because the windows are in host memory here.
            reach=reach_of(windows.starts, windows.stops) if device.type == "cuda" else None,
        )
        counts = count_of_rows(block, self._most_rows(rows, block), self._architecture) if self.counts_rows else None
        return PreparedText(rows, block, int(count_predictions(windows, self._architecture)), counts)

    @staticmethod
    def _most_rows(rows: Asked, block: TextBlock) -> int:
        """Returns a bound of the number of distinct rows for which the host does not wait."""
        if block.inputs.is_cuda:
            return block.inputs.numel() + block.targets.numel()
        return sum(part.distinct.unique.numel() for part in rows.parts)


class _SkipGramLoss(torch.autograd.Function):
    """The loss times a factor. The op computes its gradient on the way forward, so backward hands it on."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, block: TextBlock, architecture: Architecture, factor: int) -> Tensor:
        with stage("kernel"):
            loss, grad = skipgram_block(vectors, block, architecture, factor)
        ctx.save_for_backward(grad)
        return loss * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_of_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        # If backward was called on the loss itself, this would be a pass over the gradient for nothing.
        # On a GPU the host would have to wait to know.
        is_one = not grad.is_cuda and float(grad_of_loss) == 1.0
        scaled = grad if is_one else grad * grad_of_loss.to(grad.dtype)
        return scaled, None, None, None
