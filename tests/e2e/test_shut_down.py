"""A job ends without an abort: Gloo's threads end with the group, and nothing of ours keeps it."""

from __future__ import annotations

from tests.e2e.conftest import Job

SCRIPT = """
import weakref
import torch.distributed as dist
import embedtrain as et

runtime = et.init_distributed(device="cpu")
tables = et.EmbeddingCollection([et.TableSpec("item", 10, 4)])
optimizer = et.optim.RowwiseAdagrad(tables, lr=0.1)
vectors = tables({"item": et.Jagged.from_lists([[1]])})["item"]
loss = vectors.sum()
loss.backward()
optimizer.step()
group = weakref.ref(dist.group.WORLD)
et.shut_down()
assert group() is None, "something keeps the process group"
try:
    tables.ranks.all_gather(None)
except RuntimeError as error:
    print(error)
"""


def test_nothing_keeps_the_process_group_after_shut_down(cold_job: Job) -> None:
    (cold_job.folder / "script.py").write_text(SCRIPT)
    done = cold_job.run_script("script.py", ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("a job that has ended") == 2
