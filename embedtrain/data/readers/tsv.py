"""TSV: fields separated by tabs, without quotes unless the layout sets a quote."""

from __future__ import annotations

from embedtrain.data.readers.csv import Csv


class Tsv(Csv):
    """Reads lines of fields separated by tabs."""

    suffixes: tuple[str, ...] = (".tsv",)
    other_suffixes = (".txt", "")
    delimiter = "\t"
