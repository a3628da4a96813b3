"""A run that trains on damaged prepared data saves nothing, of whichever of its entries they are; others only read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.commands.fuzz import call
from tests.unit.commands.fuzz_files import write_data

BASKETS = ["data.path=baskets.csv", "data.format=csv", "data.basket_column=b", "data.item_column=i"]
RUNS = [("words", BASKETS), ("pairs", []), ("clicks", [])]


def forge(seal: Path) -> None:
    """Has a seal say of one file that it held something else: training goes on as if nothing had happened."""
    found = json.loads(seal.read_text())
    next(iter(found["files"].values()))["xxh3"] = "0" * 32
    seal.write_text(json.dumps(found))


@pytest.mark.parametrize(("name", "settings"), RUNS)
def test_a_run_on_damaged_data_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, settings: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    Path("baskets.csv").write_text("b,i\n" + "".join(f"{n // 4},item{n % 7}\n" for n in range(400)))
    cache = tmp_path / "new-cache"
    command = ["train", f"{name}.yaml", *settings, "checkpoint.every_steps=1000", f"data.cache_path={cache}"]
    assert call([*command, "run.path=first"]).status == 0
    # A text before the baskets that it was made of: once these are prepared anew, so is it.
    seals = sorted(cache.glob("*/seal.json"), reverse=True)
    assert len(seals) == {"words": 2, "pairs": 1, "clicks": 2}[name]
    for number, seal in enumerate(seals):
        forge(seal)
        if number == 0:
            # It saves nothing, hence compares nothing.
            assert call([*command, "run.path=tried", "--dry-run"]).status == 0
            assert seal.exists()
        refused = call([*command, f"run.path=damaged-{number}"])
        assert refused.status != 0
        assert "is damaged: its checksum differs" in refused.printed, refused.printed
        assert not list(Path(f"damaged-{number}").glob("checkpoints/*"))
        assert not seal.exists()
        assert call([*command, f"run.path=damaged-{number}"]).status == 0
