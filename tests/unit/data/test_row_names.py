"""What the rows of tables are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embedtrain.data.row_names import (
    HASHES,
    IDS,
    STATE_KEY,
    of_hashes,
    of_ids,
    of_values,
    read_row_names,
    rows_among,
    values_source,
    vocabulary_source,
    write_values,
)
from embedtrain.data.token_hash import hashed_rows
from embedtrain.data.vocabulary import COUNTS_SCHEMA, Vocabulary
from embedtrain.errors import CorruptCheckpointError, UserError


def values(*words: str) -> pa.Table:
    counts = list(range(len(words), 0, -1))
    return pa.table([pa.array([w.encode() for w in words], pa.large_binary()), counts], schema=COUNTS_SCHEMA)


def test_words_and_values_come_back_from_the_run_folder_and_no_others(tmp_path: Path) -> None:
    vocabulary = Vocabulary(["a", "b"], np.array([5, 2]))
    vocabulary.save(str(tmp_path / "items.tsv"))
    cities = values("", "New York", "Öl\tx\n")
    write_values(str(tmp_path), "a/city", cities, has_others=True)
    write_values(str(tmp_path), "user.age", values("30", "4"), has_others=False)
    state = {
        STATE_KEY: {
            "item": vocabulary_source("items.tsv", vocabulary, "item"),
            "a/city": values_source("a/city", cities),
            "user.age": values_source("user.age", values("30", "4")),
            "shop": IDS,
            "site": HASHES,
        }
    }
    run = str(tmp_path)
    items = read_row_names(run, state, "item", 2)
    assert (items.words, items.counts.tolist(), items.noun) == (["a", "b"], [5, 2], "item")
    # A vocabulary may be smaller than its table.
    named = read_row_names(run, state, "a/city", 9)
    assert (named.words, named.counts.tolist()) == (["<unk>", "", "New York", "Öl\tx\n"], [0, 3, 2, 1])
    assert dict(named.rows) == {"<unk>": 0, "": 1, "New York": 2, "Öl\tx\n": 3}
    assert read_row_names(run, state, "user.age", 2).words == ["30", "4"]
    assert list(read_row_names(run, state, "shop", 3).words) == ["0", "1", "2"]
    assert list(read_row_names(run, state, "site", 2).words) == ["hash:0/2", "hash:1/2"]

    Vocabulary(["b", "a"], np.array([5, 2])).save(str(tmp_path / "items.tsv"))
    write_values(run, "user.age", values("4", "30"), has_others=False)
    for table in ("item", "user.age"):
        with pytest.raises(UserError, match=f"does not hold the names that table '{table}' was trained with"):
            read_row_names(run, state, table, 2)
    (tmp_path / "features/user.age.parquet").unlink()
    with pytest.raises(UserError, match=r"table 'user.age' needs the file of its row names .*, which does not exist"):
        read_row_names(run, state, "user.age", 2)
    (tmp_path / "features/user.age.parquet").write_text("nonsense")
    with pytest.raises(UserError, match=r"user\.age\.parquet is not a valid file of row names"):
        read_row_names(run, state, "user.age", 2)
    for wrong in ({"file": "../../x.tsv"}, {}):
        with pytest.raises(UserError, match="names none"):
            read_row_names(run, {STATE_KEY: {"x": wrong}}, "x", 2)
    for broken in ({"x": {"file": 3}}, {"x": []}, [], 7):
        with pytest.raises(CorruptCheckpointError, match=r"row_names.*: expected a valid"):
            read_row_names(run, {STATE_KEY: broken}, "x", 2)


def test_a_value_that_is_called_as_the_row_of_all_others_keeps_its_row() -> None:
    names = of_values(values("<unk>", "<<unk>>"), has_others=True)
    assert names.words == ["<<<unk>>>", "<unk>", "<<unk>>"]


def test_any_text_has_a_row_in_a_hashed_table_and_ids_have_their_own() -> None:
    names = of_hashes(1000)
    assert names.find is not None
    row = int(hashed_rows(pa.array(["New York"], pa.large_string()), 1000)[0])
    assert names.find("New York") == names.find(f"hash:{row}/1000") == row
    # The hash of another size is a text as any other.
    assert names.find("hash:7/999") == hashed_rows(pa.array(["hash:7/999"]), 1000)[0]
    rows = of_ids(12).rows
    assert (rows.get("11"), rows.get("12"), rows.get("03"), rows.get("x"), len(rows)) == (11, None, None, None, 12)


def test_names_are_found_among_others() -> None:
    assert rows_among(["b", "", "Ö", "a"], ["a", "b", "Ö"]).tolist() == [1, -1, 2, 0]
    assert rows_among(pa.chunked_array([["b"], ["c"]], pa.large_string()), ["a", "b"]).tolist() == [1, -1]
    assert rows_among([], ["a"]).tolist() == rows_among([], []).tolist() == []
