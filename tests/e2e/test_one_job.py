"""Two jobs on one run folder."""

from __future__ import annotations

from tests.e2e.conftest import Job, Wait


def test_a_second_job_on_a_run_folder_is_refused(job: Job, wait_until: Wait) -> None:
    command = job.train_arguments("run", "train.epochs=1000", "checkpoint.every_steps=40")
    first = job.start(*command)
    wait_until(lambda: (job.folder / "run" / "owner-00000001.json").exists(), first)
    second = job.run(*command, ranks=2)
    assert second.returncode != 0
    (line,) = [line for line in second.stderr.splitlines() if line.startswith("embedtrain: error: ")]
    assert f"run is in use by process {first.pid} on " in line
    assert "give this one another run.path" in line
    assert first.poll() is None
    first.terminate()
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 75, errors
    assert not list((job.folder / "run").glob("owner-*"))
