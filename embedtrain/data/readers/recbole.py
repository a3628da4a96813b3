"""RecBole's atomic files: fields between tabs, and a first line of `name:type` for each column."""

from __future__ import annotations

from embedtrain.data.readers.rows import Layout
from embedtrain.data.readers.tsv import Tsv
from embedtrain.data.sources import Source

_TYPES = ("token", "token_seq", "float", "float_seq")


class RecBole(Tsv):
    """Lines of fields between tabs; a column is called `user_id` if the first line says `user_id:token`."""

    suffixes = (".inter", ".user", ".item")

    def first_fields(self, source: Source, layout: Layout) -> list[str]:
        """See `Csv.first_fields`; the types of the columns are dropped."""
        return [_name_of(field) for field in super().first_fields(source, layout)]


def _name_of(field: str) -> str:
    name, _, kind = field.rpartition(":")
    return name if name and kind in _TYPES else field
