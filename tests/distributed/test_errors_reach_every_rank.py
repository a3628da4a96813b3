"""What one rank finds wrong, every rank raises, at once and with nothing applied."""

from __future__ import annotations

import pytest
import torch

import embedtrain as et
from embedtrain.distributed.ranks import Ranks
from embedtrain.testing.threads import run_threads


def catch(function: object) -> tuple[str, str]:
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def look_up_bad_id(ranks: Ranks) -> tuple[tuple[str, str], bool]:
    rank = ranks.rank
    features = [et.FeatureSpec("clicked", "item"), et.FeatureSpec("user")]
    tables = et.EmbeddingCollection([et.TableSpec("item", 10, 4), et.TableSpec("user", 5, 3)], features, ranks=ranks)
    before = tables.gather_table("item").clone()
    batch = {
        "user": et.Jagged.from_lists([[1], [2]]),
        "clicked": et.Jagged.from_lists([[3], [17 if rank == 1 else 4]]),
    }
    caught = catch(lambda: tables(batch))
    # The ranks are still in step: the next lookup works.
    out = tables({"clicked": et.Jagged.from_lists([[3]])})["clicked"]
    unchanged = torch.equal(tables.gather_table("item"), before)
    return caught, unchanged and torch.equal(out[0], before[3])


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_bad_id_on_one_rank(world_size: int) -> None:
    for (kind, message), is_intact in run_threads(world_size, look_up_bad_id):
        assert kind == "BadIdError"
        for part in ("feature 'clicked'", "table 'item'", "id 17", "position 1", "rank 1", "0 to 9"):
            assert part in message
        assert is_intact


def look_up_unknown_feature(ranks: Ranks) -> tuple[str, str]:
    tables = et.EmbeddingCollection([et.TableSpec("item", 10, 4)], ranks=ranks)
    name = "itme" if ranks.rank == 0 else "item"
    return catch(lambda: tables({name: et.Jagged.from_lists([[3]])}))


def test_an_unknown_feature_on_one_rank() -> None:
    for _, message in run_threads(2, look_up_unknown_feature):
        assert "['item'], got ['itme']" in message


def train_on_nan(ranks: Ranks, nonfinite: str, where: str, looks_later: bool) -> tuple:
    rank = ranks.rank
    tables = et.EmbeddingCollection([et.TableSpec("item", 10, 4)], seed=1, ranks=ranks)
    optimizer = et.optim.RowwiseAdagrad(tables, lr=0.1, nonfinite=nonfinite)
    optimizer.looks_later = looks_later
    before = tables.gather_table("item").clone()
    out = tables({"item": et.Jagged.from_lists([[3], [rank]])})["item"]
    factor = float("nan") if rank == 1 and where == "gradient" else 1.0
    (out * torch.tensor([[factor], [1.0]])).sum().backward()
    if where == "loss":
        optimizer.watch(torch.tensor(float("nan") if rank == 1 else 2.0))
    if looks_later:
        optimizer.step()
        caught = catch(optimizer.settle)
    else:
        caught = catch(optimizer.step)
    unchanged = torch.equal(tables.gather_table("item"), before)
    optimizer.zero_grad()
    tables({"item": et.Jagged.from_lists([[3]])})["item"].sum().backward()
    optimizer.step()
    return caught, unchanged, optimizer.num_skipped, not torch.equal(tables.gather_table("item"), before)


@pytest.mark.parametrize("looks_later", [False, True])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_step_that_is_not_finite_on_one_rank_is_refused_on_all(where: str, looks_later: bool) -> None:
    for (kind, message), unchanged, _, trains_on in run_threads(2, train_on_nan, "error", where, looks_later):
        assert kind == "NonFiniteError"
        assert message.startswith("step 1: ")
        named = "table 'item', row 3" if where == "gradient" else "the loss is nan, on rank 1"
        assert named in message
        assert unchanged and trains_on


@pytest.mark.parametrize("looks_later", [False, True])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(where: str, looks_later: bool) -> None:
    for (kind, _), unchanged, num_skipped, trains_on in run_threads(2, train_on_nan, "skip", where, looks_later):
        assert (kind, unchanged, num_skipped, trains_on) == ("", True, 1, True)


def train_on_uneven_data(ranks: Ranks) -> tuple[list[bool], float]:
    rank = ranks.rank
    tables = et.EmbeddingCollection([et.TableSpec("item", 10, 4)], seed=1, ranks=ranks)
    optimizer = et.optim.RowwiseAdagrad(tables, lr=0.1)
    had_data = []
    for ids in ranks.lockstep([[1, 2]] * (2 + 3 * rank)):
        had_data.append(ids is not None)
        batch = {"item": et.Jagged.from_lists([ids] if ids is not None else [])}
        tables(batch)["item"].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return had_data, tables.gather_table("item").sum().item()


def test_ranks_whose_data_end_at_different_times_stop_together() -> None:
    (first, first_sum), (second, second_sum) = run_threads(2, train_on_uneven_data)
    assert first == [True] * 2 + [False] * 3
    assert second == [True] * 5
    assert first_sum == second_sum


def raise_on_rank_1(ranks: Ranks, error: Exception) -> tuple[str, str]:
    return catch(lambda: ranks.fail_together(error if ranks.rank == 1 else None))


def test_an_error_of_the_users_has_the_same_words_on_every_rank() -> None:
    assert run_threads(2, raise_on_rank_1, et.UserError("no such file")) == [("UserError", "no such file")] * 2


def test_any_other_error_names_its_rank_and_keeps_its_traceback() -> None:
    (kind, message), own = run_threads(2, raise_on_rank_1, KeyError("lost"))
    assert kind == "RuntimeError"
    assert "rank 1 failed" in message and "KeyError: 'lost'" in message
    assert own == ("KeyError", "'lost'")


def fail_on_first(ranks: Ranks) -> tuple[str, str]:
    def refuse() -> None:
        raise et.UserError("not here")

    return catch(lambda: ranks.run_on_first(refuse))


def test_run_on_first_raises_everywhere() -> None:
    assert run_threads(2, fail_on_first) == [("UserError", "not here")] * 2


def share_result(ranks: Ranks) -> int:
    return ranks.run_on_first(lambda: 10 + ranks.rank)


def test_run_on_first_returns_rank_0s_result_everywhere() -> None:
    assert run_threads(2, share_result) == [10, 10]
