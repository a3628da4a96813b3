"""TSV: fields between tabs, which nothing quotes unless the layout says so."""

from __future__ import annotations

from embedtrain.data.readers.csv import Csv


class Tsv(Csv):
    """Lines of fields between tabs."""

    suffixes: tuple[str, ...] = (".tsv",)
    other_suffixes = (".txt", "")
    delimiter = "\t"
