"""Report sections of word vectors: human scores of word pairs against cosines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from embedtrain.export.vectors import FloatRows
from embedtrain.metrics.figures import PointMap, Section
from embedtrain.metrics.word_lookup import WordLookup
from embedtrain.metrics.word_similarity import evaluate_similarity, read_pairs

MAX_PAIRS = 2_000


def similarity_sections(unit: FloatRows, words: Sequence[str], pairs: Mapping[str, Sequence[str]]) -> Iterator[Section]:
    """Yields a section per file of word pairs, with a map of human scores against cosines.

    Args:
        unit: [n, dim] vectors of length 1.
        words: [n] words.
        pairs: lines of each file of word pairs, by path.
    """
    lookup = WordLookup(words, case_insensitive=True)
    for path, lines in pairs.items():
        report = evaluate_similarity(unit, words, lines, source=path)
        known = [
            (first, second, score, float(unit[a] @ unit[b]))
            for first, second, score in read_pairs(lines, path)
            if (a := lookup.row_of(first)) is not None and (b := lookup.row_of(second)) is not None
        ]
        kept = np.linspace(0, len(known) - 1, min(len(known), MAX_PAIRS)).round().astype(int).tolist()
        shown = [known[place] for place in kept]
        drawn = PointMap(
            "",
            [f"{first} · {second}" for first, second, _, _ in shown],
            [score for *_, score, _ in shown],
            [cosine for *_, cosine in shown],
            "Pairs far below the others are more similar to people than to the model, pairs far above less.",
            "human score",
            "cosine of the vectors",
            has_labels=False,
        )
        note = f"{path}: Spearman correlation {report.spearman:.3f} over {report.num_pairs:,} pairs of known words."
        yield Section("Agreement with human scores", [drawn], note)
