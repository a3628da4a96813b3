"""The header of a safetensors file, and tensors as blocks of bytes, for a writer that streams.

A file is: the header's length (8 bytes, little-endian); the header in JSON, name -> {dtype, shape, data_offsets};
the bytes of the tensors without gaps.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from embedtrain.embedding.copy_stream import host_blocks

# A manifest uses the names of torch and numpy; a safetensors header has names of its own.
DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RESERVED_NAME = "__metadata__"
_STAGED_BYTES = 4 * 2**20


def encode_header(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """Returns the header of a file, and the offset of each tensor's first byte in the file, in file order.

    Raises:
        ValueError: a safetensors file cannot hold a tensor of this name or dtype.
    """
    # With the widest elements first, every tensor starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, object] = {}
    end = 0
    ends = {}
    for name in names:
        tensor = tensors[name]
        if name in ("", _RESERVED_NAME) or tensor.dtype not in _SAFETENSORS_DTYPES:
            raise ValueError(
                f"cannot save tensor {name!r} of {tensor.dtype}: it needs a name and one of the dtypes {list(DTYPES)}"
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        ends[name] = start
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in ends.items()}


def row_blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Yields a tensor's rows in contiguous CPU blocks of about 4 MiB, without a copy if it is contiguous on the CPU."""
    if tensor.numel() == 0:
        return
    rows = tensor.detach() if tensor.dim() else tensor.detach().unsqueeze(0)
    for block in host_blocks(torch.split(rows, _rows_staged(rows)), tensor.device):
        yield block.contiguous()


def selected_blocks(tensor: Tensor, rows: Tensor) -> Iterator[Tensor]:
    """Yields the rows `rows` ([n] int64) of a tensor, in this order, in contiguous CPU blocks of about 4 MiB."""
    if tensor[:1].numel() == 0:
        return
    selected = (tensor.detach().index_select(0, some) for some in torch.split(rows, _rows_staged(tensor)))
    for block in host_blocks(selected, tensor.device):
        yield block.contiguous()


def as_bytes(tensor: Tensor) -> memoryview:
    """Returns a writable view of the bytes of a contiguous CPU tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _rows_staged(tensor: Tensor) -> int:
    return max(1, _STAGED_BYTES // (math.prod(tensor.shape[1:]) * tensor.element_size()))
