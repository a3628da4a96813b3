"""Triton's compiler takes every kernel that its interpreter took, within a budget, for cards that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.ops.compile_kernels import BUDGET, ROOFLINE, Code, excesses, shortfalls
from tests.ops.roofline import CARDS, Launch, bytes_per_second, flight_of

FOLDER = Path(__file__).parents[2] / "embedtrain" / "ops"
SHARED_BYTES = 99 << 10
"""What a program may have on the cards that have least."""


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--dims", "100", "--architectures", "90", "--dtypes", "float32"], id="one width"),
        pytest.param(["--dims", "32,64,100,128,256"], id="all", marks=[pytest.mark.slow, pytest.mark.timeout(1500)]),
    ],
)
def test_every_kernel_stays_within_its_budget(tmp_path: Path, options: list[str]) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(FOLDER.parents[1])}
    environment.pop("TRITON_INTERPRET", None)
    program = [sys.executable, Path(__file__).with_name("compile_kernels.py"), *options]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    # A kernel is a decorated function that is launched over a grid; the others are its parts.
    lines = [line.strip() for path in FOLDER.rglob("triton*.py") for line in path.read_text().splitlines()]
    launched = [line.partition("[")[0] for line in lines if "[(" in line]
    kernels = {name for name in launched if name.startswith("_") and name.isidentifier()}
    assert len(kernels) == 11
    assert not [name for name in kernels if name not in done.stdout]


def test_what_the_budget_allows() -> None:
    for name, budget in json.loads(BUDGET.read_text()).items():
        assert budget["num_atomics"] == 0, name
        # On sm_80 the assembler rounds the registers of this one down and puts two to four numbers aside.
        is_squeezed = name.startswith("_update_tile adagrad") and name.endswith("bfloat16 sm_80")
        assert budget["spilled_bytes"] <= (16 if is_squeezed else 0), name
        assert budget["shared_bytes"] <= SHARED_BYTES, name
        # A warp reads a row of 32 or 64 columns in one access of fewer bytes per thread; tokens are no rows.
        is_narrow = name.startswith("_sum_chunk") and ("dim 32" in name or "dim 64" in name)
        is_narrow |= name.endswith(("words sm_80", "words sm_90"))
        assert budget["row_bytes"] == 16 or "bfloat16" in name or is_narrow, name
        assert (budget["num_products"] > 0) == name.startswith("_block"), name


def test_an_excess_is_named() -> None:
    allowed = {"registers": 40, "spilled_bytes": 0, "shared_bytes": 0, "row_bytes": 16, "num_products": 0}
    found = excesses("kernel", Code(41, 8, 0, 4, 0, 0), {**allowed, "num_atomics": 0})
    assert found == [
        "kernel: registers 41, at most 40 expected",
        "kernel: spilled_bytes 8, at most 0 expected",
        "kernel: row_bytes 4, at least 16 expected",
    ]


PLACES_AND_ROWS = """
        /*0000*/              @!P0 LDG.E.64 R6, desc[UR4][R10.64] ;
        /*0010*/              @!P1 LDG.E.64 R24, desc[UR4][R10.64+0x20] ;
        /*0020*/                   IMAD.WIDE.U32 R6, R6, 0x190, R8 ;
        /*0030*/                   IMAD.WIDE.U32 R24, R24, 0x190, R8 ;
        /*0040*/               @P0 LDG.E.128 R8, desc[UR4][R6.64] ;
        /*0050*/               @P2 LDG.E.128 R12, desc[UR4][R24.64] ;
        /*0060*/               @P0 STG.E.128 desc[UR4][R2.64], R8 ;
        /*0070*/               @P2 STG.E.128 desc[UR4][R4.64], R12 ;
        /*0080*/                   EXIT ;
"""
LOOP = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/                   LDG.E.64 R20, desc[UR4][R22.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0030*/                   SHFL.BFLY PT, R12, R4, 0x8, 0x1f ;
        /*0040*/                   IMAD.WIDE R2, R20, 0x190, R30 ;
        /*0050*/                   IMAD.MOV.U32 R4, RZ, RZ, R8 ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
"""


def test_bytes_in_flight_are_counted_between_waits() -> None:
    flight = flight_of(PLACES_AND_ROWS)
    assert (flight.num_waits, flight.loaded_bytes, flight.stored_bytes) == (2, 32, 32)
    loop = flight_of(LOOP)
    # The row before this turn's is added while this turn's two loads are under way.
    assert (loop.num_waits, loop.loaded_bytes, loop.stored_bytes) == (1, 16, 0)


def test_a_multiprocessor_moves_what_its_warps_have_in_flight_over_the_latency() -> None:
    card = CARDS[90]
    # 64 registers of 32 threads: 32 warps fit; shared memory of 100 KiB leaves room for two programs of four.
    assert Launch(4, 64, 0, 1.0).warps_on(card) == 32
    assert Launch(4, 64, 100 << 10, 1.0).warps_on(card) == 8
    assert Launch(1, 16, 0, 1.0).warps_on(card) == card.programs
    found = bytes_per_second(flight_of(PLACES_AND_ROWS), Launch(4, 64, 0, 100 / 128), card)
    assert found == pytest.approx(32 * 32 * 64 * 100 / 128 / (2 * 600e-9))


def test_what_is_stored_is_bounded_by_the_card_and_held() -> None:
    stored = json.loads(ROOFLINE.read_text())
    assert {name.partition(" ")[0] for name in stored} == {
        "_add_heads", "_copy_tile", "_damp_tile", "_iterate", "_pool_bag", "_sum_chunk", "_update_tile",
    }  # fmt: skip
    for name, speed in stored.items():
        card = CARDS[int(name[-2:])]
        expected = min(speed["of_multiprocessor"] * card.num_multiprocessors, card.bandwidth / 1e9)
        assert speed["of_card"] == pytest.approx(expected, rel=0.01), name
    name, speed = next(iter(stored.items()))
    assert shortfalls({name: speed["of_multiprocessor"]}, stored) == []
    assert len(shortfalls({name: speed["of_multiprocessor"] / 2}, stored)) == 1
