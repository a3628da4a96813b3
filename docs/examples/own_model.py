"""A model and a loop of your own: sharded tables, DistributedDataParallel for the rest, torch's schedulers.

python docs/examples/own_model.py
torchrun --standalone --nproc-per-node 2 docs/examples/own_model.py
"""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import embedtrain as et

USERS, ITEMS, DIM, EPOCHS = 2000, 500, 16, 5


class Clicks(nn.Module):
    """The log-odds that a user clicks on an item."""

    def __init__(self, runtime: et.Runtime) -> None:
        super().__init__()
        specs = [et.TableSpec("user", USERS, DIM), et.TableSpec("item", ITEMS, DIM)]
        self.tables = et.EmbeddingCollection(specs, device=runtime.device)
        dense = nn.Sequential(nn.Linear(2 * DIM, 32), nn.ReLU(), nn.Linear(32, 1)).to(runtime.device)
        # Rows are no parameters: a rank has its own part of them, and each row's gradient goes to its owner.
        self.dense = DistributedDataParallel(dense) if runtime.world_size > 1 else dense

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        vectors = self.tables({"user": users, "item": items})
        return self.dense(torch.cat([vectors["user"], vectors["item"]], dim=1)).squeeze(1)


def train(runtime: et.Runtime) -> None:
    torch.manual_seed(0)
    users, items = (torch.randint(0, n, (20_000,)) for n in (USERS, ITEMS))
    data = TensorDataset(users, items, (users % 5 == items % 5).float())  # what there is to learn
    sampler = DistributedSampler(data, runtime.world_size, runtime.rank)
    loader = DataLoader(data, batch_size=256 // runtime.world_size, sampler=sampler)

    model = Clicks(runtime)
    optimizers = [et.optim.RowwiseAdagrad(model.tables, lr=0.2), torch.optim.Adam(model.dense.parameters(), lr=0.01)]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(each, EPOCHS * len(loader)) for each in optimizers]
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        total = torch.zeros((), device=runtime.device)
        for batch in loader:
            *ids, label = (column.to(runtime.device) for column in batch)
            loss = nn.functional.binary_cross_entropy_with_logits(model(*ids), label)  # mean over the local batch
            loss.backward()
            for each in (*optimizers, *schedulers):
                each.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            total += loss.detach()
        if runtime.rank == 0:
            rate = schedulers[0].get_last_lr()[0]
            print(f"epoch {epoch + 1}: loss {total.item() / len(loader):.3f}, rate {rate:.3f}")


if __name__ == "__main__":
    train(et.init_distributed())
    et.shut_down()  # when nothing holds the process group any more, as DistributedDataParallel does
