"""Compiles every Triton kernel, as the ops launch it, for GPUs that need not be there. A program of its own.

Triton's interpreter accepts what its compiler does not. Each op is called on small CPU tensors while launches are
caught, and what would have been launched is compiled to machine code instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from embedtrain.ops.gather_rows import triton as gather_rows
from embedtrain.ops.pool_rows import Bags
from embedtrain.ops.pool_rows import triton as pool_rows
from embedtrain.ops.row_update import Moments, RowStep
from embedtrain.ops.row_update import triton as moment_update
from embedtrain.ops.segment_sum import triton as segment_sum
from embedtrain.ops.skipgram_block import TextBlock
from embedtrain.ops.skipgram_block import triton as skipgram_block
from embedtrain.ops.sort_unique import sort_unique

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}

ARCHITECTURE = 90

compiled: dict[Any, int] = {}
"""What was compiled, and the bytes of shared memory that it takes."""


def compile_launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
    """Stands in for `JITFunction.run`."""
    values = dict(zip([parameter.name for parameter in kernel.params], args, strict=False))
    values |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        # The compiler too takes an integer that is 1 for a constant.
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if value < 1 << 31 else "i64"
    key = (kernel.__name__, *signature.items(), *sorted(constants.items()))
    if key not in compiled:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        binary = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=options)
        assert binary.asm["ptx"]
        compiled[key] = binary.metadata.shared


def launch_all(dim: int, dtype: torch.dtype, num_rows: int) -> None:
    """Calls every op, with and without each of its options."""
    source = torch.zeros(num_rows, dim, dtype=dtype)
    rows = torch.arange(5) % num_rows
    for wanted in (torch.float32, torch.bfloat16):
        gather_rows.gather_rows(source, rows, wanted)
    lengths, weights = torch.tensor([2, 0, 3]), torch.ones(5)
    keys = sort_unique(rows)
    for feature in (Bags(5), Bags(5, lengths), Bags(5, lengths, weights, is_mean=True), Bags(5, weights=weights)):
        pool_rows.pool_rows(source, rows, [feature])
        pool_rows.pool_rows_backward([torch.zeros(feature.num_bags, dim)], [feature], keys, dim, 0.5)
    segment_sum.segment_sum(torch.zeros(5, dim), keys, 0.5)
    rounding_keys = rows if dtype == torch.bfloat16 else None
    for bound in (1.0, math.inf):
        factor = 0.5 if bound == 1.0 else torch.tensor(0.5)
        row_step = RowStep(
            lr=0.1, grad_factor=factor, max_row_grad_norm=bound, max_norm=bound, rounding_keys=rounding_keys
        )
        for first in (None, torch.zeros(num_rows, dim)):
            for second in (None, torch.zeros(num_rows), torch.zeros(num_rows, dim)):
                moment_update.moment_update(source, first, second, rows, torch.zeros(5, dim), row_step, Moments())
    launch_skipgram(dim, num_rows)


def launch_skipgram(dim: int, num_rows: int) -> None:
    """Calls it with windows that fit into one band, and with wider ones."""
    places = torch.arange(20)
    targets = (places % num_rows).view(20, 1).repeat(1, 4)
    block = TextBlock(places % num_rows, targets, (places - 2).clamp(min=0), places + 1)
    for reach in (1, 40):
        skipgram_block.skipgram_block(torch.zeros(num_rows, dim), block, 1.0, reach)


if __name__ == "__main__":
    JITFunction.run = compile_launch
    launch_all(100, torch.float32, 9)
    launch_all(1, torch.bfloat16, 1)
    narrow = dict(compiled)
    launch_skipgram(skipgram_block.MAX_DIM, 9)
    names = sorted({key[0] for key in compiled})
    print(f"Triton {triton.__version__}: {len(compiled)} binaries of {len(names)} kernels: {', '.join(names)}")
    # A program has at most 227 KiB on an H100, 99 KiB on smaller cards.
    assert max(narrow.values()) <= 99 << 10
    assert max(compiled.values()) <= 227 << 10
