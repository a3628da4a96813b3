"""What every sparse optimizer must pass, on every number of ranks, dtype and implementation of the ops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

import embedtrain as et
from embedtrain.distributed.ranks import Ranks
from embedtrain.ops._backend import dispatch, library
from embedtrain.testing.ranks import run_ranks

ROWS, DIM, STEPS = 13, 3, 4
TABLE = "t"
BACKENDS = ["reference", "native"] if library.find() is not None else ["reference"]

OWN_OPTIONS: dict[str, dict] = {
    "rowwise_adagrad": {"lr_decay": 0.3, "initial_accumulator_value": 0.7, "eps": 0.1, "accumulator_decay": 0.8},
    "adagrad": {"lr_decay": 0.3, "initial_accumulator_value": 0.7, "eps": 0.1},
    "sgd": {},
    "adam": {"betas": (0.7, 0.9), "eps": 0.1},
    "rowwise_adam": {"betas": (0.7, 0.9), "eps": 0.1},
    "rmsprop": {"alpha": 0.6, "eps": 0.1},
}
COMMON_OPTIONS: dict[str, dict] = {
    "weight_decay": {"weight_decay": 0.3},
    "decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True},
    "maximize": {"maximize": True},
    "max_row_grad_norm": {"max_row_grad_norm": 0.4},
    "max_norm": {"max_norm": 0.9},
    "max_grad_norm": {"max_grad_norm": 0.8},
    "together": {
        "weight_decay": 0.3,
        "maximize": True,
        "max_row_grad_norm": 0.4,
        "max_norm": 0.9,
        "max_grad_norm": 0.8,
    },
}


@dataclass(frozen=True)
class Case:
    optimizer: str
    dtype: torch.dtype
    option: str
    options: tuple[tuple[str, object], ...]
    backend: str
    looks_later: bool


def cases(with_options: bool) -> Iterator[Case]:
    """Yields every optimizer on every implementation, with each of its options if `with_options`."""
    assert OWN_OPTIONS.keys() == et.optim.OPTIMIZERS.keys()
    for name, own in OWN_OPTIONS.items():
        sets = {"plain": {}} | {option: {option: value} for option, value in own.items()} | COMMON_OPTIONS
        sets["everything"] = own | COMMON_OPTIONS["together"]
        if not with_options:
            sets = {option: sets[option] for option in ("plain", "everything")}
        for option, options in sets.items():
            # bfloat16 changes how rows are read and written, not what an option means.
            dtypes = (torch.float32, torch.bfloat16) if option in ("plain", "everything") else (torch.float32,)
            for dtype in dtypes:
                # What is looked at later is the same formula, whichever implementation runs it and with any options.
                later = [(BACKENDS[-1], True)] if option in ("plain", "everything") else []
                for backend, looks_later in [*zip(BACKENDS, itertools.repeat(False)), *later]:
                    yield Case(name, dtype, option, tuple({"lr": 0.2, **options}.items()), backend, looks_later)


def ids_of(step: int, rank: int) -> list[int]:
    """Ids repeat within a rank and across ranks; row 12 is never touched, and rank 1 has none in step 2."""
    return [] if (step, rank) == (2, 1) else [(3 * step + rank) % 11, 5, 5, (7 + step) % 12, rank]


def factors_of(step: int, rank: int) -> list[list[float]]:
    """The gradient of each looked-up vector: known without autograd, whatever the weights."""
    return [
        [math.sin(1.7 * i + 0.9 * d + 2.3 * step + rank) for d in range(DIM)] for i in range(len(ids_of(step, rank)))
    ]


def make(case: Case, ranks: Ranks) -> tuple[et.EmbeddingCollection, et.optim.SparseOptimizer]:
    spec = et.TableSpec(TABLE, ROWS, DIM, dtype=case.dtype, init="normal", init_scale=0.7)
    tables = et.EmbeddingCollection([spec], ranks=ranks, seed=3)
    optimizer = et.optim.OPTIMIZERS[case.optimizer](tables, **dict(case.options))
    optimizer.looks_later = case.looks_later
    return tables, optimizer


def train(
    tables: et.EmbeddingCollection, optimizer: et.optim.SparseOptimizer, rank: int, first: int, stop: int
) -> None:
    for step in range(first, stop):
        vectors = tables({TABLE: et.Jagged.from_ids(torch.tensor(ids_of(step, rank), dtype=torch.int64))})[TABLE]
        (vectors * torch.tensor(factors_of(step, rank)).reshape(-1, DIM)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tables: et.EmbeddingCollection) -> dict[str, torch.Tensor]:
    names = ("weight", *tables.shards[TABLE].state)
    return {name: tables.gather_table(TABLE, name).clone() for name in names}


def train_all_cases(ranks: Ranks, with_options: bool) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Returns what each case begins and ends with; half-way everything moves to new objects through state dicts."""
    rank = ranks.rank
    results = []
    for case in cases(with_options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(dispatch.VARIABLE, case.backend)
            dispatch.cpu_backend.cache_clear()
            tables, optimizer = make(case, ranks)
            before = whole(tables)
            train(tables, optimizer, rank, 0, STEPS // 2)
            moved_tables, moved = make(case, ranks)
            moved_tables.load_state_dict(tables.state_dict())
            moved.load_state_dict(optimizer.state_dict())
            train(tables, optimizer, rank, STEPS // 2, STEPS)
            train(moved_tables, moved, rank, STEPS // 2, STEPS)
            after = whole(tables)
            for name, tensor in whole(moved_tables).items():
                assert torch.equal(tensor, after[name]), f"{case}: {name} after the round trip of the state dicts"
            results.append((before, after))
    dispatch.cpu_backend.cache_clear()
    return results


@pytest.fixture(
    scope="module",
    params=[
        (2, True),
        (1, False),
        pytest.param((3, False), marks=pytest.mark.slow),
        pytest.param((1, True), marks=pytest.mark.slow),
        pytest.param((3, True), marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "1 rank, few options", "3 ranks, few options", "1 rank", "3 ranks"],
)
def trained(request: pytest.FixtureRequest) -> tuple[int, list[Case], list]:
    world_size, with_options = request.param
    results = run_ranks(world_size, train_all_cases, with_options, timeout_seconds=120)
    return world_size, list(cases(with_options)), results[0]


def test_equals_a_plain_loop(trained: tuple) -> None:
    world_size, all_cases, results = trained
    for case, (before, after) in zip(all_cases, results, strict=True):
        expected = plain_loop(case, before["weight"].tolist(), world_size)
        assert expected.keys() == after.keys(), case
        for name, tensor in after.items():
            # Python computes in float64: what is left is float32's rounding, and for bfloat16 rows, of which each
            # step rounds up or down at random, a few steps of 2^-8.
            bound = {"rtol": 1e-5, "atol": 2e-6} if case.dtype == torch.float32 else {"rtol": 0.04, "atol": 0.04}
            found, wanted = tensor.float(), torch.tensor(expected[name])
            torch.testing.assert_close(found, wanted, **bound, msg=lambda m, c=case, n=name: f"{c} {n}: {m}")


def test_rows_that_nobody_touched_keep_every_bit(trained: tuple) -> None:
    world_size, all_cases, results = trained
    touched = {id for step in range(STEPS) for rank in range(world_size) for id in ids_of(step, rank)}
    untouched = sorted(set(range(ROWS)) - touched)
    assert 12 in untouched
    for case, (before, after) in zip(all_cases, results, strict=True):
        for name, tensor in after.items():
            assert torch.equal(tensor[untouched], before[name][untouched]), f"{case} {name}"
            if name == "weight":
                assert not torch.equal(tensor[5], before[name][5]), case


def test_every_option_changes_the_result(trained: tuple) -> None:
    _, all_cases, results = trained
    plain = {
        (case.optimizer, case.dtype, case.backend, case.looks_later): after["weight"]
        for case, (_, after) in zip(all_cases, results, strict=True)
        if case.option == "plain"
    }
    for case, (_, after) in zip(all_cases, results, strict=True):
        if case.option != "plain":
            without = plain[case.optimizer, case.dtype, case.backend, case.looks_later]
            assert not torch.equal(after["weight"], without), case


def test_implementations_round_bfloat16_rows_alike(trained: tuple) -> None:
    if len(BACKENDS) < 2:
        pytest.skip(library.how_to_build())
    _, all_cases, results = trained
    by_case: dict[tuple, list[torch.Tensor]] = {}
    for case, (_, after) in zip(all_cases, results, strict=True):
        if case.dtype == torch.bfloat16 and not case.looks_later:
            by_case.setdefault((case.optimizer, case.option), []).append(after["weight"])
    # The last bit of a float32 sum may differ, and then, rarely, its rounding.
    shares = torch.tensor([float((first == second).float().mean()) for first, second in by_case.values()])
    assert shares.mean() > 0.98


def plain_loop(case: Case, weight: list[list[float]], world_size: int) -> dict[str, list]:
    """The formulas, written once more, with floats and lists."""
    settings = {**DEFAULTS[case.optimizer], **dict(case.options)}
    states = {
        name: [[fill] * DIM if per_element else fill for _ in range(ROWS)]
        for name, (per_element, fill) in layout(case.optimizer, settings).items()
    }
    for step in range(1, STEPS + 1):
        grads: dict[int, list[float]] = {}
        for rank in range(world_size):
            for row, factor in zip(ids_of(step - 1, rank), factors_of(step - 1, rank), strict=True):
                grads[row] = [g + f / world_size for g, f in zip(grads.get(row, [0.0] * DIM), factor, strict=True)]
        norm = math.sqrt(sum(g * g for grad in grads.values() for g in grad))
        scale = min(1.0, settings.get("max_grad_norm", math.inf) / norm)
        for row, grad in grads.items():
            grad = [scale * g for g in grad]
            weight[row] = plain_row(case.optimizer, settings, step, weight[row], grad, states, row)
    return {"weight": weight, **states}


DEFAULTS: dict[str, dict] = {
    "rowwise_adagrad": {"eps": 1e-10},
    "adagrad": {"eps": 1e-10},
    "sgd": {},
    "adam": {"eps": 1e-8, "betas": (0.9, 0.999)},
    "rowwise_adam": {"eps": 1e-8, "betas": (0.9, 0.999)},
    "rmsprop": {"eps": 1e-8, "alpha": 0.99},
}


def layout(optimizer: str, settings: dict) -> dict[str, tuple[bool, float]]:
    start = settings.get("initial_accumulator_value", 0.0)
    return {
        "rowwise_adagrad": {"accumulator": (False, start)},
        "adagrad": {"accumulator": (True, start)},
        "sgd": {},
        "adam": {"exp_avg": (True, 0.0), "exp_avg_sq": (True, 0.0)},
        "rowwise_adam": {"exp_avg": (True, 0.0), "exp_avg_sq": (False, 0.0)},
        "rmsprop": {"square_avg": (True, 0.0)},
    }[optimizer]


def plain_row(
    optimizer: str, s: dict, step: int, row: list[float], grad: list[float], states: dict, at: int
) -> list[float]:
    lr = s["lr"] / (1 + (step - 1) * s.get("lr_decay", 0.0))
    decay = s.get("weight_decay", 0.0)
    is_decoupled = s.get("decoupled_weight_decay", False)
    if s.get("maximize"):
        grad = [-g for g in grad]
    grad = limited(grad, s.get("max_row_grad_norm", math.inf))
    if not is_decoupled:
        grad = [g + decay * w for g, w in zip(grad, row, strict=True)]
    taken = plain_direction(optimizer, s, step, grad, states, at)
    kept = 1 - lr * decay if is_decoupled else 1.0
    return limited([kept * w - lr * t for w, t in zip(row, taken, strict=True)], s.get("max_norm", math.inf))


def limited(values: list[float], bound: float) -> list[float]:
    norm = math.sqrt(sum(v * v for v in values))
    return [v * bound / norm for v in values] if norm > bound else values


def plain_direction(optimizer: str, s: dict, step: int, grad: list[float], states: dict, at: int) -> list[float]:
    mean_square = sum(g * g for g in grad) / DIM
    if optimizer == "sgd":
        return grad
    if optimizer == "rowwise_adagrad":
        decay = s.get("accumulator_decay")
        old = states["accumulator"][at]
        new = old + mean_square if decay is None else decay * old + (1 - decay) * mean_square
        states["accumulator"][at] = new
        return [g / (math.sqrt(new) + s["eps"]) for g in grad]
    if optimizer == "adagrad":
        sums = states["accumulator"][at] = [a + g * g for a, g in zip(states["accumulator"][at], grad, strict=True)]
        return [g / (math.sqrt(a) + s["eps"]) for g, a in zip(grad, sums, strict=True)]
    if optimizer == "rmsprop":
        share = s["alpha"]
        old = states["square_avg"][at]
        new = states["square_avg"][at] = [share * a + (1 - share) * g * g for a, g in zip(old, grad, strict=True)]
        return [g / (math.sqrt(a) + s["eps"]) for g, a in zip(grad, new, strict=True)]
    beta1, beta2 = s["betas"]
    first = [beta1 * m + (1 - beta1) * g for m, g in zip(states["exp_avg"][at], grad, strict=True)]
    states["exp_avg"][at] = first
    if optimizer == "adam":
        old = states["exp_avg_sq"][at]
        second = [beta2 * v + (1 - beta2) * g * g for v, g in zip(old, grad, strict=True)]
        states["exp_avg_sq"][at] = second
    else:
        states["exp_avg_sq"][at] = beta2 * states["exp_avg_sq"][at] + (1 - beta2) * mean_square
        second = [states["exp_avg_sq"][at]] * DIM
    roots = [math.sqrt(v) / math.sqrt(1 - beta2**step) for v in second]
    return [m / (1 - beta1**step) / (root + s["eps"]) for m, root in zip(first, roots, strict=True)]
