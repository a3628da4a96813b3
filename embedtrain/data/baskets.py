"""Baskets as sentences: items that were turned to together, in their order, for word2vec to read (item2vec)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from embedtrain.data.events import read_pairs
from embedtrain.data.prepared import prepared_entry
from embedtrain.data.readers import Layout, suffixes_of
from embedtrain.data.seal import Unverified
from embedtrain.data.sources import Source, take_sources
from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import UserError

TEXT_NAME = "baskets.txt"
_FORMAT_VERSION = 1
_PARTS_WORDS = "[\\x00-\\x20]"
"""What `data.text` splits words at."""


@dataclass(frozen=True)
class Baskets:
    """A text of baskets.

    Attributes:
        text_path: the text.
        unverified: see `prepared_entry`.
    """

    text_path: str
    unverified: Unverified


def write_baskets(
    path: str | Sequence[str],
    names: tuple[str, str],
    cache_path: str,
    ranks: Ranks,
    *,
    format: str,
    layout: Layout | None = None,
) -> Baskets:
    """Writes a line for each basket to a text in the cache, unless it is there.

    The items of a basket stand in the order in which the files have them, whether their rows follow each other
    or not. They pass through rank 0's memory.

    Collective: every rank, with the same arguments.

    Args:
        path: interactions, as `expand_sources` takes them.
        names: the columns of the basket's id, such as a user or a session, and of the item's.
        cache_path: local folder, made if missing.
        format, layout: as in `read_columns`.

    Raises:
        UserError: on every rank; as `read_pairs`, or an item's id holds white space or a control character.
    """

    layout = layout or Layout()

    # Listed once, by rank 0, which alone reads them: the entry is named by the files that are read.
    sources: list[Source] = []

    def name() -> str:
        sources.extend(take_sources(path, suffixes_of(format)))
        facts = [_FORMAT_VERSION, [source.identity for source in sources], format, names, vars(layout)]
        return f"baskets-{xxhash.xxh3_64_hexdigest(json.dumps(facts).encode())}"

    def write(work_path: str) -> None:
        baskets, items = read_pairs(sources, names, format, layout, ("data.basket_column", "data.item_column"))
        ids = items.names
        parted = np.flatnonzero(np.asarray(pc.match_substring_regex(ids, _PARTS_WORDS)))
        if len(parted):
            raise UserError(
                f"{path}: the item id {ids[int(parted[0])].as_py()!r} holds white space or a control character, which "
                "parts items in a text"
            )
        order = np.argsort(baskets.codes, kind="stable")
        ends = np.flatnonzero(np.diff(baskets.codes[order], append=-1))
        words = ids.take(pa.array(items.codes[order])).to_pylist()
        with open(os.path.join(work_path, TEXT_NAME), "w", encoding="utf-8") as file:
            start = 0
            for end in (ends + 1).tolist():
                file.write(" ".join(words[start:end]) + "\n")
                start = end

    def prepare(work_path: str) -> None:
        ranks.run_on_first(lambda: write(work_path))

    def open_entry(path: str, unverified: Unverified) -> Baskets:
        return Baskets(os.path.join(path, TEXT_NAME), unverified)

    return prepared_entry(cache_path, ranks.run_on_first(name), open_entry, prepare, ranks)
