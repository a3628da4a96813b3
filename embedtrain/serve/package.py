"""Packs a trained model for programs that do not know embedtrain: network, tables, preparation and a scorer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embedtrain import storage
from embedtrain.checkpoint import CheckpointReader
from embedtrain.data.click_schema import CRITEO
from embedtrain.data.token_hash import text_bytes, text_hashes
from embedtrain.data.vocabulary import WordRows
from embedtrain.errors import UserError
from embedtrain.export.storage import file_system_of, new_files
from embedtrain.optim.dense import load_module
from embedtrain.recipes.ranking.config import RankingConfig
from embedtrain.recipes.ranking.model import build_network
from embedtrain.recipes.ranking.options import click_schema, feature_options, network_options, ranking_tables
from embedtrain.recipes.ranking.scoring import SavedLayout, read_vocabularies
from embedtrain.serve import scorer
from embedtrain.sharding.layout import read_layout
from embedtrain.spec import TableSpec

TableDtype = Literal["float32", "bfloat16", "int8"]
NETWORK_NAME, SCORER_NAME = "network.pt2", "scorer.py"

_BLOCK_BYTES = 8 << 20
_LEVELS = 255
_LOWEST = -128
_NAMES = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}
_SIZES = {"float32": 4, "bfloat16": 2, "int8": 1}


def write_package(
    config: RankingConfig, checkpoint: str, output: str, *, dtype: TableDtype = "float32", overwrite: bool = False
) -> list[str]:
    """Writes a folder that `scorer.py`, which is part of it, scores rows with.

    Tables are read and written some MiB at a time.

    Args:
        config: of the run.
        checkpoint: its path.
        output: path or fsspec URL of the new folder.
        dtype: of the tables; "int8" keeps a scale and a bias, float32, beside each row.
        overwrite: whether a package that is there already is replaced.

    Returns:
        The paths written; the last one, the manifest, appears when all others are there.

    Raises:
        UserError: the output is there already or cannot be written, or the run folder lacks a vocabulary.
    """
    assert dtype in get_args(TableDtype)
    with CheckpointReader(checkpoint) as reader:
        packed = _Packed(config, reader)
        manifest = {**packed.facts(), "step": reader.step, "table_dtype": dtype}
        with _new_package(output, packed.file_names, overwrite) as files:
            for column, spec, facts in zip(packed.columns, packed.tables, manifest["features"], strict=True):
                write_table(files[facts["table"]], spec, table_blocks(reader, spec), dtype)
                if facts["vocabulary"] is not None:
                    write_vocabulary(files[facts["vocabulary"]], packed.vocabularies[column.name])
            files[NETWORK_NAME].write(export_network(packed.network, len(packed.schema.dense), packed.dims))
            files[SCORER_NAME].write(Path(scorer.__file__).read_bytes())
            files[scorer.MANIFEST_NAME].write(json.dumps(manifest, indent=1).encode())
        return [storage.join(output, name) for name in packed.file_names]


class _Packed:
    """What a package of a ranking model consists of."""

    def __init__(self, config: RankingConfig, reader: CheckpointReader) -> None:
        self.schema = click_schema(config.data)
        self.layout = SavedLayout(self.schema, reader.state)
        self.columns = (*self.schema.single, *self.schema.bags)
        self.tables = ranking_tables(config, self.layout)
        self.dims = [spec.dim for spec in self.tables]
        self.vocabularies = read_vocabularies(config.run.path, self.schema, reader.state, self.layout.num_rows)
        self.pooling = {column.name: feature_options(config, column.name).pooling for column in self.columns}
        self.network = build_network(len(self.schema.dense), self.dims, network_options(config.ranking), config.seed)
        load_module(self.network, reader.replicated())

    @property
    def file_names(self) -> list[str]:
        """The files; the manifest comes last."""
        tables = [facts[key] for facts in self.features() for key in ("table", "vocabulary") if facts[key] is not None]
        return [*tables, NETWORK_NAME, SCORER_NAME, scorer.MANIFEST_NAME]

    def features(self) -> list[dict[str, Any]]:
        """Returns what the manifest says of each looked-up column, in the order of the network's arguments."""
        return [
            {
                "name": column.name,
                "table": f"table-{number:03d}.safetensors",
                "vocabulary": f"vocabulary-{number:03d}.safetensors" if column.encoding == "vocabulary" else None,
                "encoding": column.encoding,
                "num_rows": spec.num_rows,
                "bag": column.is_bag,
                "separator": column.separator,
                "pooling": self.pooling[column.name],
                "hexadecimal": self.schema.file_format == CRITEO and not column.is_bag,
            }
            for number, (column, spec) in enumerate(zip(self.columns, self.tables, strict=True))
        ]

    def facts(self) -> dict[str, Any]:
        """Returns what the manifest says, beside the checkpoint's step and the tables' dtype."""
        schema, layout = self.schema, self.layout
        quoting = schema.layout.quoting(schema.delimiter)
        return {
            "format": scorer.FORMAT,
            "version": scorer.VERSION,
            "model": "ranking",
            "network": NETWORK_NAME,
            "lines": {
                "format": schema.reader,
                "columns": schema.columns,
                "delimiter": schema.delimiter,
                "quote": None if quoting is None else quoting.quote,
            },
            "dense": schema.dense,
            "dense_transform": schema.dense_transform,
            "dense_mean": layout.dense_mean.tolist(),
            "dense_std": layout.dense_std.tolist(),
            "features": self.features(),
        }


@contextmanager
def _new_package(output: str, names: Sequence[str], overwrite: bool) -> Iterator[dict[str, BinaryIO]]:
    """Opens the files of a new package, which appear when the block ends: the last one when all others are there.

    Raises:
        UserError: there is a package and `overwrite` is false, or the folder holds something else.
    """
    file_system, place = file_system_of(output)
    there = (
        {each.rpartition("/")[2] for each in file_system.ls(place, detail=False)}
        if file_system.exists(place)
        else set()
    )
    if there and scorer.MANIFEST_NAME not in there:
        raise UserError(f"{output} is there already and is no package: choose another output")
    if there and not overwrite:
        raise UserError(f"{output} is already there; choose another output, or replace it by --overwrite")
    with new_files([storage.join(output, name) for name in names], overwrite) as files:
        yield dict(zip(names, files, strict=True))
        if there:
            # Nobody takes the old package for one while its files are replaced.
            file_system.rm_file(f"{place}/{scorer.MANIFEST_NAME}")


def table_blocks(reader: CheckpointReader, spec: TableSpec) -> Iterator[Tensor]:
    """Yields the rows of a table in the order of the ids, some MiB at a time."""
    name = f"{spec.name}/weight"
    layout = read_layout(reader.tensors[name].layout, spec.num_rows, spec.name)
    at_once = max(1, _BLOCK_BYTES // (4 * spec.dim))
    for start in range(0, spec.num_rows, at_once):
        ids = torch.arange(start, min(start + at_once, spec.num_rows))
        yield reader.gather(name, layout.slot_of(ids))


def write_table(file: BinaryIO, spec: TableSpec, blocks: Iterable[Tensor], dtype: TableDtype) -> None:
    """Writes a table as a safetensors file: `weight`, and of int8 `scale` and `bias` per row.

    Args:
        file: the new file.
        spec: of the table.
        blocks: its rows in order.
        dtype: of the weight.
    """
    num_rows, dim = spec.num_rows, spec.dim
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {
        "weight": (_NAMES[dtype], (num_rows, dim), num_rows * dim * _SIZES[dtype])
    }
    if dtype == "int8":
        tensors["scale"] = tensors["bias"] = ("F32", (num_rows,), 4 * num_rows)
    file.write(_header(tensors))
    scales, biases = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for block in blocks:
        if dtype != "int8":
            rows = block.to(getattr(torch, dtype))
            file.write((rows.view(torch.int16) if dtype == "bfloat16" else rows).numpy().data)
            continue
        levels, scale, bias = quantised(block.float())
        file.write(levels.numpy().data)
        scales.append(scale.numpy())
        biases.append(bias.numpy())
    if dtype == "int8":
        file.write(np.concatenate(scales).data)
        file.write(np.concatenate(biases).data)


def quantised(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rows as int8 [n, dim], with the scale and bias [n] by which `level * scale + bias` is near each value.

    The levels of a row lie evenly between its least value and its greatest.
    """
    least, greatest = rows.min(dim=1).values, rows.max(dim=1).values
    scale = (greatest - least) / _LEVELS
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    levels = ((rows - least.unsqueeze(1)) / divisor.unsqueeze(1)).round().clamp(0, _LEVELS) + _LOWEST
    return levels.to(torch.int8), scale, least - _LOWEST * scale


def write_vocabulary(file: BinaryIO, values: WordRows) -> None:
    """Writes the values of a column so that a memory map finds them: their hashes in order, and their texts by row."""
    hashes = text_hashes(values.words)
    order = np.argsort(hashes, kind="stable")
    starts, lengths, texts = text_bytes(values.words)
    offsets = np.append(starts, lengths.sum()).astype(np.int64)
    arrays: dict[str, NDArray[Any]] = {
        "hashes": hashes[order],
        "places": order.astype(np.int64),
        "offsets": offsets,
        "texts": texts,
    }
    kinds = {"hashes": "U64", "places": "I64", "offsets": "I64", "texts": "U8"}
    file.write(_header({name: (kinds[name], array.shape, array.nbytes) for name, array in arrays.items()}))
    for array in arrays.values():
        file.write(np.ascontiguousarray(array).data)


def _header(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """Returns the beginning of a safetensors file; see `embedtrain.export.formats.arrays`."""
    header, at = {}, 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + num_bytes]}
        at += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def export_network(network: nn.Module, num_dense: int, dims: Sequence[int]) -> bytes:
    """Returns the network as a program of `torch.export`, for any number of rows from two on.

    It takes the dense features [n, num_dense] and a list of one vector [n, dim] per looked-up feature, and returns
    logits [n].
    """
    rows = torch.export.Dim("rows", min=2)
    arguments = torch.zeros(3, num_dense), [torch.zeros(3, dim) for dim in dims]
    with torch.no_grad():
        program = torch.export.export(network.eval(), arguments, dynamic_shapes=({0: rows}, [{0: rows} for _ in dims]))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()
