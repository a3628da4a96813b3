"""From a configuration to what the plan computes with: tables, and what a step asks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from embedtrain.config.optimizer import OptimizerConfig
from embedtrain.config.sections import CheckpointConfig, Config, TableConfig
from embedtrain.data.negatives import NUM_COMMON_WORDS, num_parts_of
from embedtrain.data.retrieval_batches import DrawOptions, RetrievalBatches
from embedtrain.data.skipgram import keep_shares
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import UserError
from embedtrain.metrics.classification import TRAINING_BINS, classification_sums
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.planning.counting import count, count_step
from embedtrain.planning.made_up import made_up_interactions
from embedtrain.recipes.optimizers import states_of_row
from embedtrain.recipes.ranking.config import FeatureConfig, RankingConfig
from embedtrain.recipes.ranking.model import NetworkOptions, build_network
from embedtrain.recipes.ranking.recipe import click_schema
from embedtrain.recipes.registry import MODELS
from embedtrain.recipes.retrieval.config import FeatureConfig as SideFeatureConfig
from embedtrain.recipes.retrieval.config import RetrievalConfig, SideConfig
from embedtrain.recipes.retrieval.model import ITEM, USER, Scoring, pair_losses, perceptron
from embedtrain.recipes.word2vec.config import Word2VecConfig
from embedtrain.recipes.word2vec.model import INPUT, OUTPUT
from embedtrain.sharding.layout import MAX_ROWS
from embedtrain.sharding.plan import Arithmetic, Law, TableLoad, Workload
from embedtrain.train.run_folder import RunFolder


@dataclass(frozen=True)
class Assumptions:
    """What the configuration leaves to the data.

    Attributes:
        rows_of_table: as the user says.
        rows_of_others: of every other table, as the user says; None where they do not.
        run_path: a run's folder, whose newest checkpoint knows the rows of its tables.
        exponent: ids are taken to be drawn by Zipf's law with it; 0 is uniform.
        bag_length: ids of a bag on average; None where the user does not say.
        bag_length_of_table: likewise, of those tables where it is known.
    """

    rows_of_table: Mapping[str, int] = field(default_factory=dict)
    rows_of_others: int | None = None
    run_path: str | None = None
    exponent: float = 1.0
    bag_length: float | None = None
    bag_length_of_table: Mapping[str, float] = field(default_factory=dict)

    def rows_of(self, table: str) -> int:
        """Returns the rows of a table.

        Raises:
            UserError: nobody knows.
        """
        if table in self.rows_of_table:
            return _at_most_all(self.rows_of_table[table], table)
        if self.rows_of_others is not None:
            return _at_most_all(self.rows_of_others, table)
        rows = self._rows_of_run()
        if table not in rows:
            raise UserError(
                f"the rows of table {table!r} come from the data: give --rows {table}=N (or --rows N for all tables), "
                f"or a run.path with a checkpoint of this model ({self.run_path!r} has none with this table)"
            )
        return rows[table]

    def length_of(self, table: str) -> float:
        """Returns how many ids a bag holds that is looked up in a table.

        Raises:
            UserError: nobody knows.
        """
        if table in self.bag_length_of_table:
            return self.bag_length_of_table[table]
        if self.bag_length is None:
            raise UserError(f"how many ids a bag of {table!r} holds comes from the data: give --bag-length L")
        return self.bag_length

    def require_known(self, tables: list[str]) -> None:
        """Refuses rows of tables that the model does not have.

        Raises:
            UserError: there are such.
        """
        unknown = sorted(self.rows_of_table.keys() - set(tables))
        if unknown:
            raise UserError(f"--rows names {', '.join(unknown)}; the tables are {', '.join(tables)}")

    def _rows_of_run(self) -> dict[str, int]:
        path = None if self.run_path is None else latest_checkpoint(RunFolder(self.run_path).checkpoints_path)
        if path is None:
            return {}
        with CheckpointReader(path) as reader:
            return {
                name.removesuffix("/weight"): info.shape[0]
                for name, info in reader.tensors.items()
                if name.endswith("/weight")
            }


def _at_most_all(num_rows: int, table: str) -> int:
    if num_rows > MAX_ROWS:
        raise UserError(f"expected at most {MAX_ROWS:,} rows in table {table!r}, got {num_rows:,}")
    return num_rows


def workload_of(config: Config, assumptions: Assumptions) -> Workload:
    """Returns what a configuration asks of its machines.

    Raises:
        UserError: something is not known, or the rows of a table are given that does not exist.
    """
    for kind, of_kind in _WORKLOADS.items():
        if isinstance(config, kind):
            return of_kind(config, assumptions)
    raise UserError(f"plan does not know model {config.model!r} yet; it knows {', '.join(_known_models())}")


def _word2vec(config: Any, assumptions: Assumptions) -> Workload:
    assert isinstance(config, Word2VecConfig)
    assumptions.require_known([INPUT, OUTPUT])
    settings = config.word2vec
    words = float(config.train.words_per_step)
    num_rows = assumptions.rows_of(INPUT)
    if assumptions.rows_of(OUTPUT) != num_rows:
        raise UserError("both tables of word2vec have a row a word: give the same --rows for both, or --rows N")
    text = Law.zipf(num_rows, assumptions.exponent)
    law, kept = text.thinned(lambda shares: keep_shares(shares, settings.sample))
    words_kept = words * kept
    drawn = words_kept * settings.negatives
    parts = num_parts_of(num_rows, settings.negative_parts)
    draws, home_draws = _negatives(drawn, Law.of_weights(text.shares**settings.power, text.num_rows), parts)
    sizes = {name: _table_sizes(config.table, config.optimizer, name, config.table.dim) for name in (INPUT, OUTPUT)}
    contexts = min(settings.window + 1, config.train.block_words)
    # Each prediction meets the positive and the negatives: the score, and the gradients of both sides.
    scores = words_kept * (contexts if settings.architecture == "skipgram" else 1) * (1 + settings.negatives)
    return Workload(
        tables=(
            TableLoad(INPUT, num_rows, draws=((words_kept, law),), **sizes[INPUT]),
            TableLoad(
                OUTPUT,
                num_rows,
                draws=((words_kept, law), *draws),
                home_draws=home_draws,
                home_parts=parts,
                **sizes[OUTPUT],
            ),
        ),
        num_features=2,
        draws=words + drawn,
        skipgram_scores=scores,
        skipgram_products=scores * config.table.dim * 3,
        **_checkpoints(config.checkpoint),
    )


def _negatives(drawn: float, law: Law, num_parts: int) -> tuple[tuple[tuple[float, Law], ...], ...]:
    """Returns the draws of negatives among words that all parts have, and those among the others: `part_vocabulary`."""
    if num_parts == 1:
        return ((drawn, law),), ()
    is_common = law.num_rows.cumsum() <= NUM_COMMON_WORDS
    common, share = law.thinned(lambda _: is_common.astype(float))
    others, _ = law.thinned(lambda _: (~is_common).astype(float))
    return ((drawn * share, common),), ((drawn * (1 - share), others),)


def _ranking(config: Any, assumptions: Assumptions) -> Workload:
    assert isinstance(config, RankingConfig)
    schema = click_schema(config.data)
    assumptions.require_known([column.name for column in schema.categorical])
    examples = float(config.train.global_batch_size)
    tables = []
    for column in schema.categorical:
        if column.num_rows is not None and assumptions.rows_of_table.get(column.name, 0) not in (0, column.num_rows):
            raise UserError(f"the configuration gives {column.name!r} {column.num_rows:,} rows: leave out its --rows")
        num_rows = assumptions.rows_of(column.name) if column.num_rows is None else column.num_rows
        num_ids = examples * assumptions.length_of(column.name) if column.is_bag else examples
        dim = config.data.features.get(column.name, FeatureConfig()).dim or config.table.dim
        law = Law.zipf(num_rows, assumptions.exponent)
        sizes = _table_sizes(config.table, config.optimizer, column.name, dim)
        num_bags = examples if column.is_bag else None
        tables.append(TableLoad(column.name, num_rows, draws=((num_ids, law),), num_bags=num_bags, **sizes))
    options = NetworkOptions(
        architecture=config.ranking.architecture,
        bottom=tuple(config.ranking.bottom),
        top=tuple(config.ranking.top),
        num_cross_layers=config.ranking.num_cross_layers,
        low_rank=config.ranking.low_rank,
    )
    network = build_network(len(schema.dense), [table.dim for table in tables], options, config.seed)
    num_values = sum(parameter.numel() for parameter in network.parameters())
    return Workload(
        tables=tuple(tables),
        num_features=len(tables),
        dense_bytes=4 * num_values * (1 + _DENSE_STATES[config.dense_optimizer.name]),
        dense_gradient_bytes=4 * num_values,
        dense_collectives=1,
        records=examples,
        record_values=examples * len(schema.dense) + sum(table.num_ids for table in tables),
        dense=_network_arithmetic(config, network, [table.dim for table in tables], examples),
        **_checkpoints(config.checkpoint),
    )


def _network_arithmetic(config: RankingConfig, network: nn.Module, dims: Sequence[int], examples: float) -> Arithmetic:
    optimizer = DenseOptimizer(network, name=config.dense_optimizer.name, ranks=ONE_PROCESS)
    num_dense = len(click_schema(config.data).dense)

    def step(num: int) -> None:
        vectors = [torch.rand(num, dim, requires_grad=True) for dim in dims]
        logits = network(torch.rand(num, num_dense), vectors)
        F.binary_cross_entropy_with_logits(logits, torch.ones(num), reduction="none").sum().backward()
        classification_sums(logits, torch.ones(num), TRAINING_BINS)
        optimizer.average_gradients()
        optimizer.step(1.0)
        optimizer.zero_grad()

    return count_step(step, examples)


def _retrieval(config: Any, assumptions: Assumptions) -> Workload:
    assert isinstance(config, RetrievalConfig)
    sides = {USER: config.users, ITEM: config.items}
    assumptions.require_known([name for side in sides for name in (side, *_feature_tables(side, sides[side]))])
    settings, dim = config.retrieval, config.table.dim
    users = float(config.train.global_batch_size)
    positives = users * config.train.items_per_example
    items = Law.zipf(assumptions.rows_of(ITEM), assumptions.exponent)
    drawn = (float(settings.negatives), Law.of_weights(items.shares**settings.power, items.num_rows))
    draws = {USER: ((users, Law.zipf(assumptions.rows_of(USER), 0.0)),), ITEM: ((positives, items), drawn)}
    tables: list[TableLoad] = []
    num_values, layers = 0, Arithmetic()
    for side, section in sides.items():
        num_vectors = sum(number for number, _ in draws[side])
        sizes = _table_sizes(config.table, config.optimizer, side, dim)
        tables.append(TableLoad(side, assumptions.rows_of(side), draws=draws[side], **sizes))
        for table, feature in _feature_tables(side, section).items():
            # Each id looked up brings a bag of categories.
            length = assumptions.length_of(table) if feature.separator is not None else 1.0
            law = Law.zipf(assumptions.rows_of(table), assumptions.exponent)
            tables.append(
                TableLoad(
                    table,
                    assumptions.rows_of(table),
                    draws=((num_vectors * length, law),),
                    num_bags=num_vectors,
                    **_table_sizes(config.table, config.optimizer, table, dim),
                )
            )
        if section.hidden:
            network = perceptron((1 + len(section.features)) * dim, section.hidden, dim)
            num_values += sum(parameter.numel() for parameter in network.parameters())
            layers = layers + _perceptron_arithmetic(config, network, num_vectors)
    candidates = settings.negatives + (positives if settings.in_batch else 0.0)
    return Workload(
        tables=tuple(tables),
        num_features=len(tables),
        dense_bytes=4 * num_values * (1 + _DENSE_STATES[config.dense_optimizer.name]),
        # The candidates' vectors go to all ranks and their gradients come back, as those of the dense part do.
        dense_gradient_bytes=4 * num_values + round(4 * candidates * dim),
        dense_collectives=2 + (num_values > 0),
        positives=positives,
        dense=layers,
        scores=_score_arithmetic(config, assumptions, users * candidates),
        **_checkpoints(config.checkpoint),
    )


def _perceptron_arithmetic(config: RetrievalConfig, network: nn.Sequential, num_vectors: float) -> Arithmetic:
    optimizer = DenseOptimizer(network, name=config.dense_optimizer.name, ranks=ONE_PROCESS)
    first = network[0]
    assert isinstance(first, nn.Linear)
    width = first.in_features

    def step(num: int) -> None:
        network(torch.rand(num, width, requires_grad=True)).sum().backward()
        optimizer.average_gradients()
        optimizer.step(1.0)
        optimizer.zero_grad()

    return count_step(step, num_vectors)


def _score_arithmetic(config: RetrievalConfig, assumptions: Assumptions, num_scores: float) -> Arithmetic:
    """Counts what is computed for the scores of users and candidates, by those of a step of the same shape."""
    settings, each = config.retrieval, config.train.items_per_example
    num_users, num_negatives = min(config.train.global_batch_size, 512), min(settings.negatives, 2048)
    num_items = min(assumptions.rows_of(ITEM), 1 << 16)
    known = made_up_interactions(num_users, num_items, assumptions.exponent)
    draw = DrawOptions(num_users, each, num_negatives, settings.power, settings.in_batch)
    batch = RetrievalBatches(known, num_items, draw, seed=0).batch(0, 0)
    scoring = Scoring(settings.loss, settings.similarity, settings.temperature, settings.logq)
    users, positives, candidates = (
        torch.rand(len(ids), config.table.dim, requires_grad=True)
        for ids in (batch.users, batch.positives, batch.candidates)
    )
    work = count(lambda: pair_losses(batch, scoring, users, positives, candidates).sum().backward())
    # A smaller step's are multiplied up.
    share = num_scores / (num_users * len(batch.candidates))
    return Arithmetic(work.ops, values=work.values * share, products=work.products * share)


def _feature_tables(side: str, section: SideConfig) -> dict[str, SideFeatureConfig]:
    return {f"{side}.{name}": feature for name, feature in section.features.items()}


_DENSE_STATES = {"adam": 2, "adamw": 2, "adagrad": 1, "sgd": 0}
"""Numbers that torch's optimizers keep for each parameter."""

_WORKLOADS: dict[type[Config], Callable[[Any, Assumptions], Workload]] = {
    Word2VecConfig: _word2vec,
    RankingConfig: _ranking,
    RetrievalConfig: _retrieval,
}
"""What each model asks, by its configuration."""


def _known_models() -> list[str]:
    return [name for name, kind in MODELS.items() if kind in _WORKLOADS]


def _table_sizes(table: TableConfig, optimizer: OptimizerConfig, name: str, dim: int) -> dict[str, Any]:
    """Returns the sizes of the table of a name and a dim, its optimizer's state among them."""
    dtype = getattr(torch, table.dtype)
    wire_bytes = None if table.wire_dtype is None else getattr(torch, table.wire_dtype).itemsize
    state = states_of_row(optimizer.of_table(name), dtype)
    return {
        "dim": dim,
        "value_bytes": dtype.itemsize,
        "state_row_bytes": sum(tensor.itemsize for tensor in state if tensor.dim() == 1),
        "state_value_bytes": sum(tensor.itemsize for tensor in state if tensor.dim() == 2),
        "wire_bytes": wire_bytes,
    }


def _checkpoints(section: CheckpointConfig) -> dict[str, Any]:
    return {
        "save_bytes": section.max_extra_memory_bytes if section.mode == "async" else 0,
        "num_checkpoints": 1 + (section.keep_last or 1) + (section.keep_best or 0),
    }
