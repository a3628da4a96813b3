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
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import embedtrain as et

parser = argparse.ArgumentParser()
parser.add_argument("path", type=Path, help="folder of the checkpoints")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

runtime = et.init_distributed()
is_alone = runtime.world_size == 1
torch.manual_seed(0)
tables = et.EmbeddingCollection([et.TableSpec("item", 1001, 8)], device=runtime.device)
linear = nn.Linear(8, 1, device=runtime.device)
model = nn.ModuleDict({"tables": tables, "linear": linear})
rows = et.optim.RowwiseAdagrad(tables, lr=0.1)  # its accumulators are in the model's state dict too
dense = torch.optim.Adam(linear.parameters(), lr=0.01)


def everything() -> dict:
    return {
        "model": model.state_dict(),
        "dense": get_optimizer_state_dict(linear, dense),
        "step": rows.param_groups[0]["step"],
    }


# A folder for each step, and never one that is there already: a save that is cut off cannot harm an older one.
if complete := sorted(options.path.glob("step-*/.metadata")):
    saved = everything()
    dcp.load(saved, checkpoint_id=complete[-1].parent, no_dist=is_alone)
    model.load_state_dict(saved["model"])
    set_optimizer_state_dict(linear, dense, saved["dense"])
    rows.param_groups[0]["step"] = saved["step"]
first = rows.param_groups[0]["step"]
last = first + options.steps
for step in range(first, last):
    # The batch is a function of the step; a rank takes every world_size-th example of it.
    ids = torch.randint(0, 1001, (60,), generator=torch.Generator().manual_seed(step))
    ids = ids[runtime.rank :: runtime.world_size].to(runtime.device)
    loss = (linear(tables({"item": et.Jagged.from_ids(ids)})["item"]).squeeze(1) - ids % 7).square().mean()
    loss.backward()
    for parameter in linear.parameters() if not is_alone else ():  # as DistributedDataParallel would
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= runtime.world_size
    for optimizer in (rows, dense):
        optimizer.step()
        optimizer.zero_grad()
dcp.save(everything(), checkpoint_id=options.path / f"step-{last:06}", no_dist=is_alone)
weights, accumulators = tables.gather_table("item"), tables.gather_table("item", "accumulator")
if runtime.rank == 0:
    print(f"steps {first} to {last}: rows {weights.norm():.5f}, state {accumulators.sum():.4f}", end=", ")
    print(f"dense {linear.weight.norm():.5f}")
et.shut_down()
