"""A recipe of its own: `embedtrain train` with `model: ratings` predicts ratings. docs/own_recipe.md explains it."""

import hashlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch

import embedtrain as et
from embedtrain.recipes import api as recipes


@dataclass
class RatingsData:
    path: str = "???"  # lines of `user,item,rating`, all whole numbers
    held_out_path: str | None = None
    batch_size: int = 256


@dataclass
class RatingsConfig(recipes.Config):
    data: RatingsData = field(default_factory=RatingsData)

    def table_names(self):
        return ["user", "item"]


class Batches:
    def __init__(self, lines, config, runtime):
        self.lines, self.config, self.runtime = lines, config, runtime
        self.examples_per_epoch, self.steps_per_epoch = len(lines), -(-len(lines) // config.data.batch_size)

    def batch(self, epoch, step):  # a function of seed, epoch and step: a run resumes from these numbers alone
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.lines))
        places = order[step * self.config.data.batch_size :][: self.config.data.batch_size]
        mine = self.lines[places[self.runtime.rank :: self.runtime.world_size]]
        return SimpleNamespace(lines=mine, num_examples=len(mine), weight=self.runtime.world_size / len(places))


def prepare(config, runtime):
    paths = [path for path in (config.data.path, config.data.held_out_path) if path is not None]
    files = [np.loadtxt(path, dtype=np.int64, delimiter=",", ndmin=2) for path in paths]
    users, items, _ = (np.concatenate(files).max(axis=0) + 1).tolist()
    sizes = recipes.Sizes({"user": users, "item": items})
    return (files, sizes), sizes


def build(config, runtime, data):
    (lines, *held_out), sizes = data
    specs = [recipes.table_spec(config, name, sizes.rows_of(name)) for name in config.table_names()]
    tables = et.EmbeddingCollection(specs, **recipes.collection_options(config, runtime))

    def squared_errors(lines):
        users, items, ratings = torch.from_numpy(lines).unbind(1)
        vectors = tables({"user": et.Jagged.from_ids(users), "item": et.Jagged.from_ids(items)})
        return ((vectors["user"] * vectors["item"]).sum(dim=1) - ratings.to(tables.device)).square()

    def model(batch):  # the gradient of the first is averaged over the ranks
        total = squared_errors(batch.lines).sum()
        return recipes.Objective(total * batch.weight, total.detach().double(), batch.num_examples)

    @torch.no_grad()
    def measure(alive):  # every rank looks up all held-out lines
        return {"rmse": squared_errors(held_out[0]).mean().sqrt().item()}

    optimizer = recipes.build_optimizer(config.optimizer, tables)
    evaluation = recipes.Evaluation(measure) if held_out else None
    task = recipes.Task(
        model, tables, optimizer, Batches(lines, config, runtime), evaluation=evaluation, unit="ratings"
    )
    return recipes.Parts(task, {"data_fingerprint": hashlib.sha256(lines).hexdigest()})


def workload(config, sizes):
    draws = {name: ((float(config.data.batch_size), sizes.ids_of(name)),) for name in config.table_names()}
    return recipes.Workload(tuple(recipes.table_load(config, t, sizes.rows_of(t), ids) for t, ids in draws.items()))


RECIPE = recipes.Recipe(RatingsConfig, prepare, build, workload, held_out="data.held_out_path")
