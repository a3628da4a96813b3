"""The workload of a word2vec run, for planning."""

from __future__ import annotations

from dataclasses import replace

from embedtrain.data.negatives import NUM_COMMON_WORDS, num_parts_of
from embedtrain.data.skipgram import keep_shares
from embedtrain.errors import UserError
from embedtrain.recipes.word2vec.config import Word2VecConfig
from embedtrain.recipes.word2vec.model import INPUT, OUTPUT
from embedtrain.recipes.workload import Draws, IdDistribution, Sizes, Workload, table_load


def workload(config: Word2VecConfig, sizes: Sizes) -> Workload:
    """Returns the workload of a word2vec run; see `Recipe.workload`."""
    settings = config.word2vec
    num_rows = sizes.rows_of(INPUT)
    if sizes.rows_of(OUTPUT) != num_rows:
        raise UserError(
            f"both tables of word2vec have one row per word: expected equal numbers of rows, got {num_rows:,} for "
            f"{INPUT} and {sizes.rows_of(OUTPUT):,} for {OUTPUT}"
        )
    text = sizes.ids_of(INPUT)
    kept, share_kept = text.thinned(lambda shares: keep_shares(shares, settings.sample))
    num_words = config.train.words_per_step * share_kept
    words: Draws = (num_words, kept)
    num_parts = num_parts_of(num_rows, settings.negative_parts)
    weighted = IdDistribution.of_weights(text.shares**settings.power, text.num_rows)
    negatives, home_negatives = _negatives(num_words * settings.negatives, weighted, num_parts)
    output = table_load(config, OUTPUT, num_rows, (words, *negatives))
    return Workload(
        (
            table_load(config, INPUT, num_rows, (words,)),
            replace(output, home_draws=home_negatives, home_parts=num_parts),
        ),
        # For each kept word, 8 bytes for the word, for each end of its window, and for each of its targets.
        batch_bytes=round(num_words * 8 * (3 + 1 + settings.negatives)),
    )


def _negatives(number: float, ids: IdDistribution, num_parts: int) -> tuple[tuple[Draws, ...], tuple[Draws, ...]]:
    """Returns the draws of negatives from the words of all parts, and from the words of one part.

    See `part_vocabulary`.
    """
    if num_parts == 1:
        return ((number, ids),), ()
    is_common = ids.num_rows.cumsum() <= NUM_COMMON_WORDS
    common, share = ids.thinned(lambda _: is_common.astype(float))
    others, _ = ids.thinned(lambda _: (~is_common).astype(float))
    return ((number * share, common),), ((number * (1 - share), others),)
