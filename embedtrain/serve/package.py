"""Packages a trained model for programs without embedtrain: tables, vocabularies, network and a scorer."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedtrain import storage
from embedtrain.data.sources import file_system_of
from embedtrain.data.token_hash import text_bytes, text_hashes
from embedtrain.errors import UserError
from embedtrain.export.storage import new_files
from embedtrain.recipes.base import NETWORK_NAME, Packed, PackedNetwork, PackedTable
from embedtrain.serve import scorer

TableDtype = Literal["float32", "bfloat16", "int8"]
SCORER_NAME = "scorer.py"
ONNX_NAME = "network.onnx"
"""Inputs: `numbers` [n, width], and `vectors.NAME` [n, dim] per categorical column NAME. Output: `logits` [n]."""

_LEVELS = 255
_LOWEST = -128
_NAMES = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}
_SIZES = {"float32": 4, "bfloat16": 2, "int8": 1}


def write_package(
    packed: Packed, output: str, *, dtype: TableDtype = "float32", has_onnx: bool = False, overwrite: bool = False
) -> None:
    """Writes a package: a folder with the model and `scorer.py`, which scores from it; streams the tables.

    Args:
        packed: the model.
        output: path or fsspec URL of the new folder; its manifest appears last.
        dtype: dtype of the tables; "int8" adds a float32 scale and bias per row.
        has_onnx: whether to write the network as ONNX too.
        overwrite: whether to replace an existing package.

    Raises:
        UserError: the output exists or cannot be written; or ONNX is requested, but the model has no network or the
            ONNX packages are not installed.
    """
    if dtype not in get_args(TableDtype):
        raise UserError(f"the table dtype of a package must be one of {', '.join(get_args(TableDtype))}, got {dtype!r}")
    manifest = {
        "format": scorer.FORMAT,
        "version": scorer.VERSION,
        "model": packed.model,
        "step": packed.step,
        "table_dtype": dtype,
        **packed.facts,
    }
    onnx = _onnx_network(packed) if has_onnx else None
    networks = [NETWORK_NAME] if packed.network is not None else []
    networks += [ONNX_NAME] if onnx is not None else []
    contents = [*packed.tables, *packed.texts, *networks, *packed.programs, SCORER_NAME]
    with _new_package(output, [*contents, scorer.MANIFEST_NAME], overwrite) as files:
        for name, table in packed.tables.items():
            write_table(files[name], table, dtype)
        for name, texts in packed.texts.items():
            write_texts(files[name], texts)
        if packed.network is not None:
            files[NETWORK_NAME].write(export_network(packed.network))
        if onnx is not None:
            files[ONNX_NAME].write(onnx)
        for name, text in packed.programs.items():
            files[name].write(text.encode())
        files[SCORER_NAME].write(Path(scorer.__file__).read_bytes())
        files[scorer.MANIFEST_NAME].write(json.dumps(manifest, indent=1).encode())


@contextmanager
def _new_package(output: str, names: Sequence[str], overwrite: bool) -> Iterator[dict[str, BinaryIO]]:
    """Opens the files of a new package; they appear when the block ends, the last of `names` after the others.

    Raises:
        UserError: there is a package and `overwrite` is false, or the folder holds other files.
    """
    file_system, place = file_system_of(output)
    there = (
        {each.rpartition("/")[2] for each in file_system.ls(place, detail=False)}
        if file_system.exists(place)
        else set()
    )
    if there and scorer.MANIFEST_NAME not in there:
        raise UserError(f"{output} exists and is not a package: choose another output")
    if there and not overwrite:
        raise UserError(f"{output} already exists: choose another output, or replace it with --overwrite")
    with new_files([storage.join(output, name) for name in names], overwrite) as files:
        yield dict(zip(names, files, strict=True))
        if there:
            # Without its manifest the old package cannot be opened while its files are replaced.
            file_system.rm_file(f"{place}/{scorer.MANIFEST_NAME}")


def write_table(file: BinaryIO, table: PackedTable, dtype: TableDtype) -> None:
    """Writes a table as a safetensors file: `weight` [num_rows, dim], and for int8 `scale` and `bias` [num_rows]."""
    num_rows, dim = table.num_rows, table.dim
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {
        "weight": (_NAMES[dtype], (num_rows, dim), num_rows * dim * _SIZES[dtype])
    }
    if dtype == "int8":
        tensors["scale"] = tensors["bias"] = ("F32", (num_rows,), 4 * num_rows)
    file.write(_header(tensors))
    scales, biases = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for block in table.blocks():
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
    """Quantises rows to int8 [n, dim] with a scale [n] and a bias [n]: value = level * scale + bias.

    The levels of a row are evenly spaced between its smallest and its largest value.
    """
    least, greatest = rows.min(dim=1).values, rows.max(dim=1).values
    scale = (greatest - least) / _LEVELS
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    levels = ((rows - least.unsqueeze(1)) / divisor.unsqueeze(1)).round().clamp(0, _LEVELS) + _LOWEST
    return levels.to(torch.int8), scale, least - _LOWEST * scale


def write_texts(file: BinaryIO, values: pa.LargeBinaryArray) -> None:
    """Writes distinct texts for lookup through a memory map: their sorted hashes, and the texts in list order."""
    hashes = text_hashes(values)
    order = np.argsort(hashes, kind="stable")
    starts, lengths, texts = text_bytes(values)
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
    """Returns the header of a safetensors file; see `embedtrain.export.formats.arrays`."""
    header, at = {}, 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + num_bytes]}
        at += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def export_network(network: PackedNetwork) -> bytes:
    """Returns the network as a `torch.export` program for any number of rows of at least 2."""
    with torch.no_grad():
        program = torch.export.export(network.module.eval(), network.arguments, dynamic_shapes=_any_rows(network))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _onnx_network(packed: Packed) -> bytes:
    """Returns the network as ONNX for any number of rows."""
    network = packed.network
    if network is None or not network.names:
        raise UserError(f"--onnx: a package of a {packed.model} model holds no network that can be written as ONNX")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("--onnx needs the packages onnx and onnxscript: pip install 'embedtrain[onnx]'") from error
    # torch.onnx warns about optional packages that this network does not need.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network.module.eval(),
                network.arguments,
                dynamo=True,
                dynamic_shapes=_any_rows(network),
                input_names=network.names,
                output_names=["logits"],
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None, "dynamo=True returns a program"
    return bytes(program.model_proto.SerializeToString())


def _any_rows(network: PackedNetwork) -> tuple[Any, ...]:
    """Returns dynamic shapes of the arguments of a network, with a number of rows of at least 2."""
    rows = torch.export.Dim("rows", min=2)
    return tuple(
        [{0: rows} for _ in argument] if isinstance(argument, list) else {0: rows} for argument in network.arguments
    )
