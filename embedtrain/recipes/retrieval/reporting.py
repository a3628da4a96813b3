"""Report sections of a retrieval model: measures by list length and by item popularity."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from embedtrain.data.bags import Bags
from embedtrain.data.columns import read_columns
from embedtrain.data.readers import format_of, suffixes_of
from embedtrain.data.sources import expand_sources
from embedtrain.metrics.figures import Bars, Chart, Line, Section
from embedtrain.metrics.ranking import hits_of, list_measures
from embedtrain.recipes.layout import layout_of
from embedtrain.recipes.retrieval.config import SideConfig
from embedtrain.recipes.retrieval.model import ITEM, Retrieval
from embedtrain.recipes.retrieval.recommendation import catalogue_of, user_vectors

MAX_USERS = 2_000
"""Maximum number of users for the report."""
MAX_SCORES = 5_000_000_000
"""Maximum number of scores, which reduces the users for large catalogues so that the report takes some seconds."""

_LENGTHS = (1, 2, 5, 10, 20, 50, 100)
_USERS_AT_ONCE = 512
_TITLE = re.compile(r"(.*[_\s])?(title|name)(:.*)?", re.IGNORECASE)
"""Names of columns with titles, including those of RecBole's files such as `movie_title:token_seq`."""


def find_titles(side: SideConfig, words: Sequence[str]) -> dict[str, str]:
    """Returns the titles of items or users by raw id, if their files have a column whose name says title or name.

    Args:
        side: configuration of the files.
        words: the raw ids.

    Raises:
        UserError: a file cannot be read.
    """
    if side.path is None:
        return {}
    sources, layout = expand_sources(side.path, suffixes_of(side.format)), layout_of(side, "items")
    existing = format_of(sources[0], side.format).columns(sources[0], [side.id_column], layout)
    columns = [name for name in existing if _TITLE.fullmatch(name) and name != side.id_column]
    if not columns:
        return {}
    wanted, found = set(words), dict[str, str]()
    for rows in read_columns(sources, [side.id_column, columns[0]], side.format, layout):
        for name, title in zip(*(column.to_pylist() for column in rows.columns), strict=True):
            if name in wanted and title:
                found[name] = title
        if len(found) == len(wanted):
            break
    return found


def recommendation_sections(model: Retrieval, known: Bags, held_out: Bags, length: int) -> Iterator[Section]:
    """Yields a section with measures by list length and by item popularity; nothing without held-out items.

    Collective: every rank.

    Args:
        model: the model.
        known: items of each user to leave out of the lists.
        held_out: the items to find, by user; -1 for an item without a row.
        length: length of the lists for the charts by popularity.
    """
    num_items = model.sides[ITEM].num_rows
    users = np.flatnonzero(np.diff(held_out.starts))
    if not len(users):
        return
    at_most = min(MAX_USERS, max(100, MAX_SCORES // num_items))
    chosen = users[np.linspace(0, len(users) - 1, min(len(users), at_most)).round().astype(np.int64)]
    lengths = sorted({min(k, num_items) for k in (*_LENGTHS, length)})
    sums = torch.zeros(len(lengths), 4, dtype=torch.float64)
    recommended, hits = [], []
    catalogue = catalogue_of(model)
    for start in range(0, len(chosen), _USERS_AT_ONCE):
        batch = chosen[start : start + _USERS_AT_ONCE]
        items, _ = catalogue.best(batch, lengths[-1], known, user_vectors(model, batch))
        relevant, sizes = (torch.from_numpy(part) for part in held_out.of(batch))
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        found = hits_of(items, starts, relevant, num_items)
        sums += torch.stack([list_measures(found, sizes, k) for k in lengths])
        recommended.append(items.numpy())
        hits.append(found.numpy())
    lists, is_hit = np.concatenate(recommended), np.concatenate(hits)
    means = (sums / len(chosen)).numpy()
    length = min(length, num_items)
    wanted = held_out.of(chosen)[0]
    which = "All" if len(chosen) == len(users) else f"{len(chosen):,} of the"
    yield Section(
        "Recommendations for held-out users",
        [
            _by_length(lengths, means, lists, num_items),
            *_by_popularity(lists[:, :length], is_hit[:, :length], wanted[wanted >= 0], num_items, length),
        ],
        f"{which} {len(users):,} users with held-out items.",
    )


def _by_length(lengths: Sequence[int], means: NDArray[np.float64], lists: NDArray[np.int64], num_items: int) -> Chart:
    x = [float(k) for k in lengths]
    covered = [len(np.unique(lists[:, :k][lists[:, :k] >= 0])) / num_items for k in lengths]
    lines = [Line(name, x, means[:, place].tolist()) for place, name in enumerate(("recall", "NDCG", "hit"))]
    return Chart(
        "Lists of other lengths",
        [*lines, Line("coverage", x, covered, True)],
        "length of the list (k)",
        note="Recall is the share of a user's held-out items in the list. Hit is the share of users with a held-out "
        "item in the list. Coverage is the share of all items that are in any list.",
    )


def _by_popularity(
    lists: NDArray[np.int64], is_hit: NDArray[np.bool_], wanted: NDArray[np.int64], num_items: int, length: int
) -> Iterator[Bars]:
    """Yields recall and the share of the recommendations per tenth of the items, the most popular tenth first."""
    tenths = min(10, num_items)
    # Rows are in order of popularity.
    to_find = np.bincount(wanted * tenths // num_items, minlength=tenths)
    found = np.bincount(lists[is_hit] * tenths // num_items, minlength=tenths)
    shown = np.bincount(lists[lists >= 0] * tenths // num_items, minlength=tenths)
    names = [f"{100 * place // tenths}-{100 * (place + 1) // tenths}%" for place in range(tenths)]
    held = [place for place in range(tenths) if to_find[place]]
    yield Bars(
        f"Found at {length}, by popularity",
        [names[place] for place in held],
        [float(found[place] / to_find[place]) for place in held],
        f"For each tenth of the items: the share of held-out items that are among the first {length}.",
        "most popular items",
        "found",
        ".1%",
        [f"{found[place]:,} of {to_find[place]:,}" for place in held],
    )
    yield Bars(
        "What is recommended, by popularity",
        names,
        (shown / max(1, shown.sum())).tolist(),
        "Equal shares would be 10% each. Larger shares of popular items mean that the model prefers popular items.",
        "most popular items",
        "share of the lists",
        ".1%",
    )
