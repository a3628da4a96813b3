"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import launching

EXAMPLES = re.findall(
    r"```python\n(.*?)```", (launching.ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
)


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs_on_one_rank_and_on_two(tmp_path: Path, example: str, ranks: int) -> None:
    path = tmp_path / "example.py"
    path.write_text(example, encoding="utf-8")
    # As a reader starts it: from a file, by Python and by torchrun.
    launcher = launching.torchrun(ranks if ranks > 1 else None)
    done = launching.run([*launcher, str(path)], cwd=launching.ROOT, is_warm=False)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert losses[-1] < losses[0]
