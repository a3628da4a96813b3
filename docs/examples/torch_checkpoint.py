"""Saving with torch.distributed.checkpoint: the tables are DTensors of the model's state dict.

Trains for so many steps, saves, and goes on from there when it is started again, on any number of ranks:

    torchrun --standalone --nproc-per-node 2 docs/examples/torch_checkpoint.py saved --steps 20
    torchrun --standalone --nproc-per-node 3 docs/examples/torch_checkpoint.py saved --steps 20
"""

import argparse
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import embedtrain as et


class Job:
    """A model with its optimizers, and what is saved of them."""

    def __init__(self, runtime: et.Runtime, path: Path) -> None:
        self.path, self.is_alone = path, runtime.world_size == 1
        torch.manual_seed(0)
        self.tables = et.EmbeddingCollection([et.TableSpec("item", 1001, 8)], device=runtime.device)
        self.linear = nn.Linear(8, 1, device=runtime.device)
        self.model = nn.ModuleDict({"tables": self.tables, "linear": self.linear})
        self.rows = et.optim.RowwiseAdagrad(self.tables, lr=0.1)
        self.dense = torch.optim.Adam(self.linear.parameters(), lr=0.01)

    @property
    def step(self) -> int:
        return self.rows.param_groups[0]["step"]

    def everything(self) -> dict:
        # The model has the accumulators and the count of steps too; the optimizer of the rows has its learning rate.
        return {
            "model": get_model_state_dict(self.model),
            "rows": get_optimizer_state_dict(self.model, self.rows),
            "dense": get_optimizer_state_dict(self.linear, self.dense),
        }

    def save(self) -> None:
        # A folder for each step, and never one that is there already: a save that is cut off harms no older one.
        dcp.save(self.everything(), checkpoint_id=self.path / f"step-{self.step:06}", no_dist=self.is_alone)

    def load_newest(self) -> None:
        complete = sorted(self.path.glob("step-*/.metadata"))
        if not complete:
            return
        saved = self.everything()
        dcp.load(saved, checkpoint_id=complete[-1].parent, no_dist=self.is_alone)
        set_model_state_dict(self.model, saved["model"])
        set_optimizer_state_dict(self.model, self.rows, saved["rows"])
        set_optimizer_state_dict(self.linear, self.dense, saved["dense"])


def train(job: Job, runtime: et.Runtime, num_steps: int) -> None:
    for step in range(job.step, job.step + num_steps):
        # The batch is a function of the step; a rank takes every world_size-th example of it.
        ids = torch.randint(0, 1001, (60,), generator=torch.Generator().manual_seed(step))
        ids = ids[runtime.rank :: runtime.world_size].to(runtime.device)
        scores = job.linear(job.tables({"item": et.Jagged.from_ids(ids)})["item"]).squeeze(1)
        (scores - ids % 7).square().mean().backward()
        for parameter in job.linear.parameters() if not job.is_alone else ():  # as DistributedDataParallel would
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= runtime.world_size
        for optimizer in (job.rows, job.dense):
            optimizer.step()
            optimizer.zero_grad()


def main(runtime: et.Runtime) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path, help="folder of the checkpoints")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    job = Job(runtime, options.path)
    job.load_newest()
    first = job.step
    train(job, runtime, options.steps)
    job.save()
    weights, accumulators = job.tables.gather_table("item"), job.tables.gather_table("item", "accumulator")
    if runtime.rank == 0:
        print(f"steps {first} to {job.step}: rows {weights.norm():.5f}, state {accumulators.sum():.4f}", end=", ")
        print(f"dense {job.linear.weight.norm():.5f}")


if __name__ == "__main__":
    main(et.init_distributed())
    et.shut_down()
