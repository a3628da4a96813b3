"""A warm process has imported what commands need: else each command of the tests imports for a second or more."""

from __future__ import annotations

import json

from tests.e2e.conftest import Job

SCRIPT = """\
import json, sys
before = set(sys.modules)
from embedtrain import cli
statuses = [cli.main(arguments) for arguments in {commands}]
print(json.dumps([statuses, sorted(sys.modules.keys() - before)]))
"""


def test_a_training_and_its_export_import_next_to_nothing(job: Job) -> None:
    train = job.train_arguments("run", "train.epochs=1", "checkpoint.mode=sync")
    export = ["export", "run", "--format", "npy", "--output", "vectors.npy"]
    (job.folder / "script.py").write_text(SCRIPT.format(commands=[train, export]))
    done = job.run_script("script.py", is_warm=True)
    assert done.returncode == 0, done.stderr
    statuses, imported = json.loads(done.stdout.splitlines()[-1])
    assert statuses == [0, 0]
    assert [name for name in imported if name.startswith(("embedtrain.commands", "embedtrain.train", "torch."))] == []
    assert len(imported) < 20, imported
