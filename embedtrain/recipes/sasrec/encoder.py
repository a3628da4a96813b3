"""The network over sequences: causal attention over packed vectors, with little padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedtrain.ops._backend.mix import GOLDEN, mix64
from embedtrain.ops._backend.transfer import to_device

_INIT_SCALE = 0.02
_MOST_PADDING = 0.5
"""Maximum padding of a run, relative to its real positions. A larger bound would give fewer runs and so fewer kernels,
but more padding."""
_LEVELS = 1 << 16
"""Levels of the 16 random bits per element of a dropout mask."""


@dataclass(frozen=True)
class Run:
    """Describes consecutive sequences of similar length, whose attention is computed in one call.

    Attributes:
        num_sequences: number of sequences.
        longest: length of the longest sequence.
        start, stop: half-open range of their positions among all positions.
        padded: [num_sequences * longest] int64; the position to copy to each place of the padded batch. None without
            padding.
        real: [stop - start] int64; the place of each position in the padded batch. None without padding.
    """

    num_sequences: int
    longest: int
    start: int
    stop: int
    padded: Tensor | None
    real: Tensor | None


@dataclass(frozen=True)
class Packing:
    """Describes sequences that are stored one after another, shorter sequences first.

    Attributes:
        runs: the sequences in groups of similar length.
        from_end: [num_positions] int64; distance of each position from the last position of its sequence.
        last: [num_sequences] int64; last position of each sequence.
    """

    runs: Sequence[Run]
    from_end: Tensor
    last: Tensor

    def to(self, device: torch.device) -> Packing:
        """Returns the packing on a device."""

        def moved(places: Tensor | None) -> Tensor | None:
            return None if places is None else to_device(places, device)

        runs = [
            Run(run.num_sequences, run.longest, run.start, run.stop, moved(run.padded), moved(run.real))
            for run in self.runs
        ]
        return Packing(runs, to_device(self.from_end, device), to_device(self.last, device))


def pack(lengths: Tensor) -> Packing:
    """Returns the packing of sequences with ascending lengths [num_sequences] int64 of at least 1, on the CPU."""
    stops = lengths.cumsum(0)
    num_positions = int(stops[-1]) if len(stops) else 0
    sequence_stops = torch.repeat_interleave(stops, lengths, output_size=num_positions)
    return Packing(_runs(lengths, stops), sequence_stops - 1 - torch.arange(num_positions), stops - 1)


def _runs(lengths: Tensor, stops: Tensor) -> list[Run]:
    sizes, ends = lengths.tolist(), [0, *stops.tolist()]
    runs: list[Run] = []
    first = 0
    for stop in range(1, len(sizes) + 1):
        with_next = ends[min(stop + 1, len(sizes))] - ends[first]
        if stop == len(sizes) or sizes[stop] * (stop + 1 - first) > (1 + _MOST_PADDING) * with_next:
            runs.append(_run(lengths[first:stop], sizes[stop - 1], ends[first], ends[stop]))
            first = stop
    return runs


def _run(lengths: Tensor, longest: int, start: int, stop: int) -> Run:
    if len(lengths) * longest == stop - start:
        return Run(len(lengths), longest, start, stop, None, None)
    place = torch.arange(longest)
    starts = (start + lengths.cumsum(0) - lengths).unsqueeze(1)
    # Padding comes after the real positions, which attend only to earlier positions, so its values do not matter.
    padded = starts + torch.minimum(place, lengths.unsqueeze(1) - 1)
    (real,) = torch.nonzero((place < lengths.unsqueeze(1)).flatten(), as_tuple=True)
    return Run(len(lengths), longest, start, stop, padded.flatten(), real)


@dataclass(frozen=True)
class Dropout:
    """Applies dropout masks that depend on the step and the global number of a position, not on the number of ranks.

    Attributes:
        rate: share of elements that become zero.
        key: key of the step.
        places: [num_positions] int64; number of each position, unique in the step over all ranks.
        num_masks: number of masks per step.
    """

    rate: float
    key: int
    places: Tensor
    num_masks: int

    def __call__(self, values: Tensor, number: int) -> Tensor:
        """Returns values [num_positions, dim] after mask `number`; kept elements are scaled by 1 / (1 - rate)."""
        dropped = round(self.rate * _LEVELS)
        if not dropped:
            return values
        num_words = -(-values.shape[1] // 4)
        firsts = (self.places * self.num_masks + number) * num_words
        counters = firsts.unsqueeze(1) + torch.arange(num_words, device=values.device)
        bits = mix64(counters * GOLDEN + self.key).view(torch.int16)[:, : values.shape[1]]
        kept = (bits >= dropped - _LEVELS // 2).to(values.dtype)
        return values * kept.mul_(_LEVELS / (_LEVELS - dropped))


class Block(nn.Module):
    """Computes attention and a perceptron, each with layer normalisation before it and a residual connection.

    Args:
        dim: length of the vectors.
        heads: number of attention heads; must divide `dim`.
        inner: width of the perceptron's hidden layer.
    """

    def __init__(self, dim: int, heads: int, inner: int) -> None:
        super().__init__()
        self._heads = heads
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.queries_keys_values, self.attended = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.hidden, self.out = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def attend(self, values: Tensor, runs: Sequence[Run]) -> Tensor:
        """Returns each position's attention to itself and earlier positions of its sequence; [num_positions, dim]."""
        projected = self.queries_keys_values(self.attention_norm(values))
        parts = [self._attend_run(projected, run) for run in runs]
        attended: Tensor = self.attended(torch.cat([projected[:0, : values.shape[1]], *parts]))
        return attended

    def _attend_run(self, projected: Tensor, run: Run) -> Tensor:
        own = projected[run.start : run.stop] if run.padded is None else F.embedding(run.padded, projected)
        attended = self._attention(own.unflatten(0, (run.num_sequences, run.longest))).flatten(0, 1)
        return attended if run.real is None else F.embedding(run.real, attended)

    def _attention(self, projected: Tensor) -> Tensor:
        """Returns the causal attention of sequences [n, length, 3 * dim]; [n, length, dim]."""
        queries, keys, values = projected.unflatten(-1, (3, self._heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True).transpose(1, 2).flatten(2)

    def attend_padded(self, values: Tensor) -> Tensor:
        """Returns the result of `attend` for padded sequences [n, length, dim]."""
        attended: Tensor = self.attended(self._attention(self.queries_keys_values(self.attention_norm(values))))
        return attended

    def transform(self, values: Tensor) -> Tensor:
        """Returns the perceptron's output for each position."""
        transformed: Tensor = self.out(F.gelu(self.hidden(self.perceptron_norm(values))))
        return transformed


class Encoder(nn.Module):
    """Encodes sequences of item vectors: the dot product of a position's output with an item scores it as next item.

    Args:
        dim: length of the vectors.
        max_length: maximum length of the sequences.
        layers: number of blocks.
        heads: number of attention heads.
        inner: width of the perceptrons' hidden layers.

    Source: Kang and McAuley 2018, "Self-attentive sequential recommendation". Unlike there, layer normalisation comes
    before each part of a block, and positions are counted from the end.
    """

    def __init__(self, dim: int, max_length: int, layers: int, heads: int, inner: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.positions = nn.Parameter(torch.empty(max_length, dim))
        self.input_norm, self.output_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, inner) for _ in range(layers))
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=_INIT_SCALE)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @property
    def num_masks(self) -> int:
        """Number of dropout masks per step."""
        return 1 + 2 * len(self.blocks)

    def forward(self, vectors: Tensor, packing: Packing, dropout: Dropout | None = None) -> Tensor:
        """Returns a vector for each position, [num_positions, dim].

        Args:
            vectors: [num_positions, dim]; item vectors, sequence after sequence.
            packing: how the sequences are packed.
            dropout: dropout of the step; None outside training.
        """
        drop = dropout or _keep
        values = drop(self.input_norm(vectors + F.embedding(packing.from_end, self.positions)), 0)
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            values = values + drop(block.attend(values, packing.runs), 1 + 2 * number)
            values = values + drop(block.transform(values), 2 + 2 * number)
        states: Tensor = self.output_norm(values)
        return states


def _keep(values: Tensor, number: int) -> Tensor:
    return values


class PaddedEncoder(nn.Module):
    """Wraps the encoder for a package: takes padded sequences, and returns the output of each last position.

    Args:
        encoder: the trained encoder.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self._encoder = encoder

    def forward(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """Returns the vectors of the sequences, [n, dim].

        Args:
            vectors: [n, max_length, dim]; item vectors. Values after the first `lengths` positions are ignored.
            lengths: [n] int64.
        """
        encoder = self._encoder
        place = torch.arange(encoder.max_length, device=vectors.device)
        from_end = (lengths.unsqueeze(1) - 1 - place).clamp(min=0)
        values = encoder.input_norm(vectors + F.embedding(from_end, encoder.positions))
        for block in encoder.blocks:
            assert isinstance(block, Block)
            values = values + block.attend_padded(values)
            values = values + block.transform(values)
        last = (lengths - 1).view(-1, 1, 1).expand(-1, 1, values.shape[2])
        states: Tensor = encoder.output_norm(values.gather(1, last).squeeze(1))
        return states
