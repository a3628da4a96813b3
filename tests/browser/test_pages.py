"""What a user sees in a browser: TensorBoard on a finished run, and the page of a report."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.browser.chromium import Page, find_chromium, open_page
from tests.e2e.conftest import Job, make_job

ARTEFACTS = Path(__file__).resolve().parents[2] / "artefacts"
"""Where screenshots are kept; git ignores it."""

GROUPS = ("Loss", "progress", "stage", "ids", "memory")
"""Of scalars, each with a heading of its own in TensorBoard."""


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    program = find_chromium()
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium, which scripts/setup_env.sh does where it may")
    with open_page(program, tmp_path / "profile") as opened:
        yield opened


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A folder with a finished run and its vectors for the projector."""
    job = make_job(tmp_path_factory.mktemp("browser"))
    for command in (
        job.train_arguments("run", "log.tensorboard=true"),
        ["export", "run", "--format", "projector", "--output", "projector"],
        ["report", "run", "--word", "bxa"],
    ):
        done = job.run(*command)
        assert done.returncode == 0, done.stderr
    return job


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Starts TensorBoard on a free port; yields its address."""
    log = folder.parent / "tensorboard.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0", "--bind_all"],
            stdout=output,
            stderr=output,
        )
        try:
            yield _address(process, log)
        finally:
            process.terminate()
            process.wait(20)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 60
    while "Press CTRL+C" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    port = log.read_text().rpartition(":")[2].partition("/")[0]
    address = f"http://localhost:{port}"
    with urllib.request.urlopen(f"{address}/data/runs", timeout=20) as answer:
        assert answer.status == 200
    return address


@pytest.mark.slow
def test_tensorboard_shows_the_scalars_and_the_projector(job: Job, page: Page) -> None:
    with tensorboard(job.folder / "run" / "tensorboard") as address:
        page.open(f"{address}/#timeseries")
        for tag in ("Loss /loss", *GROUPS):  # TensorBoard sets the group apart from the name
            page.wait_for_text(tag)
        page.wait_for("document.querySelectorAll('line-chart, svg.line-chart, canvas').length > 0")
        page.screenshot(ARTEFACTS / "tensorboard-scalars.png")
        page.open(f"{address}/#hparams")
        page.wait_for_text("optimizer.lr")

    with tensorboard(job.folder / "projector") as address:
        page.open(f"{address}/#projector")
        page.wait_for_text("Points: 320")
        page.wait_for_text("Dimension: 16")
        page.wait_for_text("Supervise with word count")
        page.screenshot(ARTEFACTS / "tensorboard-projector.png")
    assert (ARTEFACTS / "tensorboard-projector.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_report_stands_alone_and_shows_its_charts(job: Job, page: Page) -> None:
    report = (job.folder / "run" / "report.html").as_uri()
    page.open(report)
    page.wait_for("document.readyState === 'complete'")
    page.wait_for_text("done at step")
    assert "bxa" in page.text()
    charts = "document.querySelectorAll('section .plot')"
    for place in range(page.evaluate(f"{charts}.length")):
        page.evaluate(f"{charts}[{place}].scrollIntoView()")
        page.wait_for(f"{charts}[{place}].querySelector('canvas')?.getBoundingClientRect().height > 150")
    page.evaluate("const box = document.querySelector('input'); box.value = 'bx'; box.oninput()")
    page.wait_for("document.querySelector('output').textContent.includes('found: bx')")
    background = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(background)
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate(background) != before
    for width in (390, 1280, 1920):
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
        page.wait_for(f"document.documentElement.scrollWidth <= {width}")
        page.screenshot(ARTEFACTS / f"report-{width}.png")
    assert [url for url in page.requests if not url.startswith("data:")] == [report]
    assert page.errors == []
