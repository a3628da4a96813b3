"""Learns from a stream of clicks in one pass: every example is predicted first, then trained on, once.

Each line is a label, 0 or 1, and any number of features, words of any kind:

    1 site=news hour=9 ad=417

The stream is standard input, a file, or a folder that files are added to. The features have no vocabulary: each is
hashed into one table, the model is logistic regression, and every row has a learning rate of its own. The same command
goes on at the exact example where the last checkpoint stopped.

    generate | python docs/examples/online.py - runs/online
    torchrun --standalone --nproc-per-node 2 docs/examples/online.py clicks/ runs/online --poll-seconds 5
"""

from __future__ import annotations

import argparse
import zlib

import torch

import embedtrain as et
from embedtrain.checkpoint import CheckpointReader, CheckpointSaver, SaveOptions, agree_on_latest, load_shards
from embedtrain.data.stream import LineStream, StreamPosition

ROWS = 1 << 20


class ClickModel(torch.nn.Module):
    """Logistic regression over hashed features: a table of one column."""

    def __init__(self, runtime: et.Runtime) -> None:
        super().__init__()
        weights = et.TableSpec("weights", ROWS, dim=1, init="zeros")
        self.tables = et.EmbeddingCollection(
            [weights], [et.FeatureSpec("weights", pooling="sum")], device=runtime.device
        )

    def forward(self, lines: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns log-odds and labels [n] of this rank's lines."""
        fields = [line.split() for line in lines]
        labels = torch.tensor([float(field[0]) for field in fields])
        bags = et.Jagged.from_lists([[zlib.crc32(word.encode()) % ROWS for word in field[1:]] for field in fields])
        return self.tables({"weights": bags})["weights"].reshape(-1), labels


def train(options: argparse.Namespace, runtime: et.Runtime) -> None:
    model = ClickModel(runtime)
    optimizer = et.optim.RowwiseAdagrad(model.tables, lr=options.lr, accumulator_decay=options.accumulator_decay)
    saver = CheckpointSaver(options.run, runtime.ranks, runtime.ranks.for_thread(60.0), SaveOptions(full_every=10))
    state = {"step": 0, "examples": 0, "loss": 0.0, "position": vars(StreamPosition())}
    if (newest := agree_on_latest(options.run, runtime.ranks)) is not None:
        with CheckpointReader(newest) as reader:
            load_shards(reader, model.tables.shard_views())
            state = reader.state["stream"]
            optimizer.load_state_dict(reader.state["optimizer"])
    # Rank 0 reads for all: a stream has one reader, and its position one home.
    stream = LineStream(options.data, StreamPosition(**state["position"]), poll_seconds=options.poll_seconds)
    while lines := runtime.ranks.run_on_first(lambda: stream.read(options.batch)):
        logits, labels = model(lines[runtime.rank :: runtime.world_size])
        # A mean over the ranks of sums over their examples, whose number differs: divided to be the batch's mean.
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        (loss * (runtime.world_size / len(lines))).backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().double()
        runtime.ranks.all_reduce(total)
        state["step"] += 1
        state["examples"] += len(lines)
        state["loss"] += float(total)
        state["position"] = runtime.ranks.run_on_first(lambda: vars(stream.position))
        if state["step"] % options.save_every == 0:
            save(saver, model, optimizer, state)
        if state["step"] == options.stop_after:
            break
    save(saver, model, optimizer, state, is_last=True)
    if runtime.rank == 0:
        print(f"{state['examples']} examples, each predicted before it was trained on: loss "
              f"{state['loss'] / max(state['examples'], 1):.6f}")  # fmt: skip


def save(saver: CheckpointSaver, model: ClickModel, optimizer, state: dict, *, is_last: bool = False) -> None:
    """Saves rows, accumulators and the stream's position as one; nothing where the step is saved."""
    if is_last:
        saver.settle()
    if saver.step != state["step"]:
        saved = {"stream": dict(state), "optimizer": optimizer.state_dict()}
        saver.save(state["step"], model.tables.shard_views(), saved, is_last=is_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="- for standard input, a file, or a folder")
    parser.add_argument("run", help="folder of the checkpoints")
    parser.add_argument("--batch", type=int, default=64, help="examples a step, over all ranks")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--accumulator-decay", type=float, help="forget old gradients, where the world changes: 0.999")
    parser.add_argument("--poll-seconds", type=float, help="wait for new files of the folder; without it, end")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--stop-after", type=int, metavar="STEPS", help="stop as if interrupted, for a trial")
    options = parser.parse_args()
    runtime = et.init_distributed(device="cpu")
    torch.set_num_threads(1)
    train(options, runtime)
    et.shut_down()


if __name__ == "__main__":
    main()
