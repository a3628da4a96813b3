"""Compiles every Triton kernel, as the ops launch it, for GPUs that need not be there, and measures the machine code.

    python tests/ops/compile_kernels.py --dims 32,64,100,128,256 --update     # after a kernel has changed

Triton's interpreter accepts what its compiler does not. Each op is called on small CPU tensors while launches are
caught, and what would have been launched is compiled instead, with the launch's constants and numbers of warps. What
the machine code takes is held against `kernel_budget.json`, and how fast it can move rows by `roofline.py` against
`kernel_roofline.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from embedtrain.ops.damp_rows import Damping
from embedtrain.ops.damp_rows import triton as damp_rows
from embedtrain.ops.gather_rows import triton as gather_rows
from embedtrain.ops.pool_rows import Bags
from embedtrain.ops.pool_rows import triton as pool_rows
from embedtrain.ops.row_update import Moments, RowStep
from embedtrain.ops.row_update import triton as moment_update
from embedtrain.ops.sample_text import SamplingTables
from embedtrain.ops.sample_text import triton as sample_text
from embedtrain.ops.segment_sum import triton as segment_sum
from embedtrain.ops.skipgram_block import Architecture, TextBlock
from embedtrain.ops.skipgram_block import triton as skipgram_block
from embedtrain.ops.sort_unique import sort_unique
from embedtrain.ops.top_eigenpairs import triton as top_eigenpairs
from tests.ops.roofline import CARDS, Launch, bytes_per_second, flight_of

BUDGET = Path(__file__).with_name("kernel_budget.json")
ROOFLINE = Path(__file__).with_name("kernel_roofline.json")
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_N, _NUM_ROWS = 997, 503
"""Sizes of the tensors: no multiples of 16, which is what most steps launch."""
_SPARE_REGISTERS = 8
"""What the next version of the compiler may take more."""
_SLOWER = 0.75
"""The share of the predicted speed that the code of another version of the compiler keeps."""


@dataclass(frozen=True)
class Code:
    """What the machine code of a kernel takes.

    Attributes:
        registers: of a thread.
        spilled_bytes: of a thread, which did not fit into its registers.
        shared_bytes: of a program.
        row_bytes: the widest access of a thread to float32 or bfloat16 values.
        num_products: instructions that multiply matrices.
        num_atomics: instructions that change memory atomically.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    row_bytes: int
    num_products: int
    num_atomics: int


class Compiler:
    """Compiles what is launched while it stands in for `JITFunction.run`.

    Attributes:
        architecture: of the GPUs, such as 90.
        label: of the launches that follow.
        codes: by kernel, label of the first launch that needed it, and architecture.
        speeds: by the same, the gigabytes per second of a multiprocessor; of kernels that do not multiply matrices.
    """

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.label = ""
        self.codes: dict[str, Code] = {}
        self.speeds: dict[str, float] = {}
        self._seen: set[tuple[str, ...]] = set()

    def run(self, kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        """Compiles a launch."""
        values = dict(zip([parameter.name for parameter in kernel.params], args, strict=False))
        values |= {name: options.pop(name) for name in kernel.arg_names if name in options}
        signature, constants, attributes = {}, {}, {}
        for position, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            is_special = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or (is_special and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = _POINTERS[value.dtype]
                attributes[(position,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if value < 1 << 31 else "i64"
                if is_special and value % 16 == 0:
                    attributes[(position,)] = [["tt.divisibility", 16]]
        launch = (kernel.__name__, *map(str, (signature, constants, attributes, options)))
        if launch in self._seen:
            return
        self._seen.add(launch)
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        target = GPUTarget("cuda", self.architecture, 32)
        name = f"{kernel.__name__} {self.label} sm_{self.architecture}"
        assert name not in self.codes, name
        binary = triton.compile(source, target=target, options=options)
        listing, self.codes[name] = _measure(binary)
        if "DIM" in constants and not self.codes[name].num_products:
            columns = constants.get("COLUMNS", constants.get("TILE_COLUMNS"))
            code, num_warps = self.codes[name], binary.metadata.num_warps
            taken = Launch(num_warps, code.registers, code.shared_bytes, share=constants["DIM"] / columns)
            self.speeds[name] = bytes_per_second(flight_of(listing), taken, CARDS[self.architecture]) / 1e9


def _measure(binary: Any) -> tuple[str, Code]:
    """Returns the listing of the machine code, and what it takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, listing = (
            subprocess.run([_TOOLS / tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "--print-code"))
        )
    taken = {name: int(size) for name, size in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    accesses = re.findall(r"\b(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bf](16|32)\b", binary.asm["ptx"])
    return listing, Code(
        registers=taken["REG"],
        spilled_bytes=taken["STACK"] + taken["LOCAL"],
        shared_bytes=binary.metadata.shared,
        row_bytes=max((int(vector or 1) * int(bits) // 8 for vector, bits in accesses), default=0),
        num_products=len(re.findall(r"\b(?:HMMA|HGMMA|QGMMA)\.", listing)),
        num_atomics=len(re.findall(r"\b(?:ATOM|ATOMG|ATOMS|RED|REDG)\b", listing)),
    )


def launch_all(compiler: Compiler, dim: int, dtype: torch.dtype, num_rows: int = _NUM_ROWS) -> None:
    """Calls every op, with and without each of its options."""

    def label(variant: str) -> None:
        compiler.label = f"{variant}, dim {dim} {str(dtype).removeprefix('torch.')}"

    source = torch.zeros(num_rows, dim, dtype=dtype)
    rows = torch.arange(_N) * 7 % num_rows
    for wanted in (torch.float32, torch.bfloat16):
        label(f"to {str(wanted).removeprefix('torch.')}")
        gather_rows.gather_rows(source, rows, wanted)
    lengths, weights = torch.full((_N,), 1), torch.ones(_N)
    keys = sort_unique(rows)
    for variant, feature in (
        ("values", Bags(_N)),
        ("bags", Bags(_N, lengths)),
        ("weighted means", Bags(_N, lengths, weights, is_mean=True)),
    ):
        label(variant)
        pool_rows.pool_rows(source, rows, [feature])
        pool_rows.pool_rows_backward([torch.zeros(feature.num_bags, dim)], [feature], keys, dim, 0.5)
    rounding_keys = rows if dtype == torch.bfloat16 else None
    for variant, bound, factor in (("plain", float("inf"), torch.tensor(0.5)), ("bounded", 1.0, 0.5)):
        step = RowStep(lr=0.1, grad_factor=factor, max_row_grad_norm=bound, max_norm=bound, rounding_keys=rounding_keys)
        for name, first, second in (
            ("sgd", None, None),
            ("rowwise_adagrad", None, torch.zeros(num_rows)),
            ("adagrad", None, torch.zeros(num_rows, dim)),
            ("adam", torch.zeros(num_rows, dim), torch.zeros(num_rows, dim)),
            ("rowwise_adam", torch.zeros(num_rows, dim), torch.zeros(num_rows)),
        ):
            label(f"{name} {variant}")
            moment_update.moment_update(source, first, second, rows, torch.zeros(_N, dim), step, Moments())
    if dtype == torch.float32:
        label("values")
        segment_sum.segment_sum(torch.zeros(_N, dim), keys, 0.5)
        _launch_damping(dim)
        _launch_words(label, dim, num_rows)
        compiler.label = "words"
        _launch_sampling()


def _launch_words(label: Callable[[str], None], dim: int, num_rows: int) -> None:
    places = torch.arange(_N)
    targets = ((places.view(_N, 1) + torch.arange(6)) * 3) % num_rows
    architectures: tuple[Architecture, ...] = ("skipgram", "cbow")
    for architecture in architectures:
        for reach in (5, 40):
            block = TextBlock(places % num_rows, targets, (places - reach).clamp(min=0), places + 1)
            label(f"reach {reach}")
            skipgram_block.skipgram_block(torch.zeros(num_rows, dim), block, architecture, 1.0, reach)


def _launch_damping(dim: int) -> None:
    gradient, tables, times = torch.zeros(_N, dim), torch.zeros(_N, dtype=torch.int64), torch.ones(_N)
    damp_rows.damp_rows(gradient, Damping(tables, times, torch.ones(2, 4), torch.zeros(2, 4, dim)))
    top_eigenpairs.top_eigenpairs(torch.zeros(2, dim, dim), 4)


def _launch_sampling() -> None:
    tokens, positions = torch.zeros(_N, dtype=torch.int32), torch.arange(_N)
    columns = torch.zeros(_NUM_ROWS, 2, dtype=torch.int64)
    tables = SamplingTables(torch.zeros(_NUM_ROWS, dtype=torch.int32), columns, torch.tensor([0, _NUM_ROWS]))
    sample_text.sample_text(tokens, positions, torch.zeros_like(tokens), tables, 5, 5, 1, num_kept=_N)


def excesses(name: str, code: Code, budget: dict[str, Any]) -> list[str]:
    """Returns what a kernel takes more than its budget allows."""
    least = ("row_bytes", "num_products")
    found = [
        f"{name}: {key} {value}, {'at least' if key in least else 'at most'} {budget[key]} expected"
        for key, value in asdict(code).items()
        if (value < budget[key] if key in least else value > budget[key])
    ]
    return found


def predictions(speeds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Returns for each kernel the gigabytes per second of a multiprocessor, and of a card of its architecture."""
    found = {}
    for name, speed in speeds.items():
        card = CARDS[int(name.rpartition("sm_")[2])]
        of_card = min(speed * card.num_multiprocessors, card.bandwidth / 1e9)
        found[name] = {"of_multiprocessor": round(speed, 1), "of_card": round(of_card)}
    return found


def shortfalls(speeds: dict[str, float], stored: dict[str, dict[str, float]]) -> list[str]:
    """Returns the kernels that can move much less than is stored."""
    return [
        f"{name}: {speed:.1f} GB/s per multiprocessor, {stored[name]['of_multiprocessor']} expected"
        for name, speed in speeds.items()
        if speed < _SLOWER * stored[name]["of_multiprocessor"]
    ]


def main() -> int:
    """Compiles, and compares with the budget or writes it anew; returns 1 if the budget is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default="80,90")
    parser.add_argument("--dims", default="100")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the tables; --update needs both")
    parser.add_argument("--update", action="store_true", help="write what was compiled anew")
    options = parser.parse_args()
    codes: dict[str, Code] = {}
    speeds: dict[str, float] = {}
    for architecture in map(int, options.architectures.split(",")):
        compiler = Compiler(architecture)
        JITFunction.run = lambda kernel, *args, compiler=compiler, **given: compiler.run(kernel, *args, **given)
        for dim in map(int, options.dims.split(",")):
            for dtype in options.dtypes.split(","):
                launch_all(compiler, dim, getattr(torch, dtype))
        codes |= compiler.codes
        speeds |= compiler.speeds
    names = sorted({name.partition(" ")[0] for name in codes})
    print(f"Triton {triton.__version__}: {len(codes)} binaries of {len(names)} kernels: {', '.join(names)}")
    if options.update:
        spared = {name: asdict(code) | {"registers": code.registers + _SPARE_REGISTERS} for name, code in codes.items()}
        for path, found in ((BUDGET, spared), (ROOFLINE, predictions(speeds))):
            _write(path, _others(path, options.dims.split(","), options.architectures.split(",")) | found)
        return 0
    budget = json.loads(BUDGET.read_text())
    found = [line for name, code in codes.items() for line in excesses(name, code, budget[name])]
    found += shortfalls(speeds, json.loads(ROOFLINE.read_text()))
    print("\n".join(found), file=sys.stderr)
    return int(bool(found))


def _others(path: Path, dims: list[str], architectures: list[str]) -> dict[str, Any]:
    """Returns what a file holds of other dims and architectures than those that were compiled."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    now = tuple(
        f"dim {dim} {dtype} sm_{sm}" for dim in dims for dtype in ("float32", "bfloat16") for sm in architectures
    )
    of_none = tuple(f"words sm_{sm}" for sm in architectures)
    return {name: value for name, value in stored.items() if not name.endswith((*now, *of_none))}


def _write(path: Path, values: dict[str, Any]) -> None:
    """Writes a line per kernel."""
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(values.items()))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
