"""Lightning Fabric's loop: Fabric looks after the dense part and the data, the tables look after themselves.

pip install lightning-fabric
python docs/examples/fabric.py
torchrun --standalone --nproc-per-node 2 docs/examples/fabric.py
"""

import os

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import embedtrain as et

ITEMS, DIM, EPOCHS = 500, 16, 5


def train() -> None:
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    fabric = Fabric(devices=devices, num_nodes=ranks // devices, strategy="ddp" if ranks > 1 else "auto")
    fabric.launch()  # torchrun's ranks join each other here; the tables then share that group
    fabric.seed_everything(0, verbose=False)

    features = [et.FeatureSpec("basket", table="item", pooling="sum")]
    tables = et.EmbeddingCollection([et.TableSpec("item", ITEMS, DIM)], features, device=fabric.device)
    rows = et.optim.RowwiseAdagrad(tables, lr=0.2)
    linear = nn.Linear(DIM, 1)
    network, dense = fabric.setup(linear, torch.optim.Adam(linear.parameters(), lr=0.01))

    baskets = torch.randint(0, ITEMS, (10_000, 4))
    data = TensorDataset(baskets, (baskets % 5 == 0).any(dim=1).float())  # what there is to learn
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=256 // ranks, shuffle=True))

    for epoch in range(EPOCHS):
        for baskets, label in loader:
            vectors = tables({"basket": baskets})["basket"]
            loss = nn.functional.binary_cross_entropy_with_logits(network(vectors).squeeze(1), label)
            fabric.backward(loss)
            for optimizer in (rows, dense):
                optimizer.step()
                optimizer.zero_grad()
        fabric.print(f"epoch {epoch + 1}: loss {fabric.all_reduce(loss.detach()).item():.3f}")


if __name__ == "__main__":
    train()
    et.shut_down()
