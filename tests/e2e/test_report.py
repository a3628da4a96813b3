"""The page about a run, from the command line."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import Job

pytest.importorskip("matplotlib", reason="pictures need the extra plots")


def test_a_report_of_a_run(job: Job) -> None:
    trained = job.run(*job.train_arguments("run", "log.every_steps=10"))
    assert trained.returncode == 0, trained.stderr
    done = job.run("report", "run", "bxa", "cza")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "run/report.html\n"
    page = (job.folder / "run" / "report.html").read_text()
    for part in ("done at step", "<th>bxa</th>", "words per second", "input", "output", "words_per_step: 256", "<svg"):
        assert part in page

    refused = job.run("report", "run", "nowhere")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "unknown word 'nowhere'" in refused.stderr
    refused = job.run("report", "elsewhere")
    assert refused.returncode == 2
    assert "no complete checkpoint in 'elsewhere'" in refused.stderr
