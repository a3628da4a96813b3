"""The page about a run, from the command line."""

from __future__ import annotations

from tests.e2e.conftest import Job


def test_a_report_of_a_run(job: Job) -> None:
    trained = job.run(*job.train_arguments("run", "log.every_steps=10"))
    assert trained.returncode == 0, trained.stderr
    questions = job.folder / "questions.txt"
    questions.write_text(": of letters\nbxa bxe cxa cxe\nbxa bxe nowhere cxe\n")
    done = job.run("report", "run", "--word", "bxa", "--word", "cza", "--analogies", "questions.txt")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "run/report.html\n"
    page = (job.folder / "run" / "report.html").read_text()
    for part in (
        "done at step",
        ">bxa</th>",
        "words per second",
        "input",
        "output",
        "words_per_step: 256",
        "of letters",
        "left out: 1.",
        "embedtrain train",
    ):
        assert part in page

    refused = job.run("report", "run", "--word", "nowhere")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "unknown word 'nowhere'" in refused.stderr
    refused = job.run("report", "elsewhere")
    assert refused.returncode == 2
    assert "no run folder at 'elsewhere'" in refused.stderr
