"""word2vec, skip-gram or CBOW with negative sampling, on sharded tables."""

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
    """Holds a batch on the device whose ids were exchanged.

    Attributes:
        rows: pending look-ups of the block's distinct rows.
        block: predictions of the step, with indices into the distinct rows.
        num_predictions: see `Objective`.
        counts: [num_distinct or more] float32; number of predictions that use each row; None if not needed.
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
    """Trains word vectors on blocks of text. Each step fetches each distinct row once and sends its gradient once.

    A step's gradient is the sum over the words of all ranks, not their mean, as in the original word2vec. So learning
    rate and initial accumulator do not depend on the size of a step.

    Initial values are uniform within 0.5 / dim for input rows, and zero for output rows.

    Args:
        num_words: size of the vocabulary.
        dim: length of the vectors.
        architecture: "skipgram" or "cbow".
        dtype: dtype of both tables.
        optimizers: `TableSpec.optimizer` by table; other tables have the default.
        options: see `EmbeddingCollection`.

    Attributes:
        counts_rows: whether gradients are sent with the counts that `optim.CurvatureDamping` needs.
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
        # The factor makes this a sum over all ranks, because the exchange averages gradients over the ranks.
        num_ranks = self.tables.ranks.size
        # Only the kernel of skip-gram writes to a buffer.
        has_use = vectors.requires_grad and self._architecture == "skipgram"
        buffer = batch.rows.gradient_buffer(len(vectors)) if has_use else None
        loss: Tensor = _SkipGramLoss.apply(vectors, batch.block, self._architecture, num_ranks, buffer)  # type: ignore[no-untyped-call]
        return Objective(loss=loss, total=loss.detach() / num_ranks, num_predictions=batch.num_predictions)

    def prepare(self, batch: TextBatch) -> PreparedText:
        """Prepares a batch for `forward` without reading rows. Collective: every rank, in the order of steps."""
        return self._ask(batch, is_ahead=True)

    def bring_rows(self, prepared: PreparedText) -> None:
        """Copies rows of a step from host memory to the device."""
        self.tables.bring_rows(prepared.rows)

    def _ask(self, batch: TextBatch, *, is_ahead: bool) -> PreparedText:
        """Exchanges the block's ids, and returns the block with indices into its distinct rows."""
        sample, windows, device = batch.sample, batch.windows, self.tables.device
        ids = {INPUT: Jagged.from_ids(sample.words), OUTPUT: Jagged.from_ids(sample.targets.flatten())}
        rows = self.tables.ask(ids, is_ahead=is_ahead)
        places = rows.places()
        block = TextBlock(
            inputs=places[INPUT],
            targets=places[OUTPUT].view_as(sample.targets),
            starts=to_device(sample.starts, device),
            stops=to_device(sample.stops, device),
            # Computed here, because here the windows are in host memory.
            reach=reach_of(windows.starts, windows.stops) if device.type == "cuda" else None,
        )
        counts = count_of_rows(block, self._most_rows(rows, block), self._architecture) if self.counts_rows else None
        return PreparedText(rows, block, int(count_predictions(windows, self._architecture)), counts)

    @staticmethod
    def _most_rows(rows: Asked, block: TextBlock) -> int:
        """Returns an upper bound of the number of distinct rows, without a device sync."""
        if block.inputs.is_cuda:
            return block.inputs.numel() + block.targets.numel()
        return sum(part.distinct.unique.numel() for part in rows.parts)


class _SkipGramLoss(torch.autograd.Function):
    """Computes the loss times a factor, and its gradient, which backward only scales."""

    @staticmethod
    def forward(
        ctx: Any, vectors: Tensor, block: TextBlock, architecture: Architecture, factor: int, buffer: Tensor | None
    ) -> Tensor:
        with stage("kernel"):
            loss, grad = skipgram_block(vectors, block, architecture, factor, buffer)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_of_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        # The common factor 1 is skipped to save a pass over the gradient, but not on a GPU, where it costs a sync.
        is_one = not grad.is_cuda and float(grad_of_loss) == 1.0
        scaled = grad if is_one else grad * grad_of_loss.to(grad.dtype)
        return scaled, None, None, None, None
