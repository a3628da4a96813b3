"""One process, no process group: the same object, the same results."""

from __future__ import annotations

import pytest
import torch

import embedtrain as et
from embedtrain.embedding.init import initial_rows

TABLES = [et.TableSpec("word", 20, 4), et.TableSpec("user", 6, 4), et.TableSpec("item", 9, 3)]


def expected_rows(tables: et.EmbeddingCollection, name: str, ids: list[int]) -> torch.Tensor:
    return tables.gather_table(name)[torch.tensor(ids, dtype=torch.int64)]


def test_each_pooling_gives_what_its_name_says() -> None:
    features = [
        et.FeatureSpec("none", "word"),
        et.FeatureSpec("sum", "word", "sum"),
        et.FeatureSpec("mean", "word", "mean"),
    ]
    tables = et.EmbeddingCollection(TABLES, features, seed=5)
    bags = et.Jagged.from_lists([[3, 3, 7], [], [19]])
    weighted = et.Jagged(bags.values, bags.lengths, torch.tensor([0.5, 2.0, 1.0, 3.0]))
    rows = expected_rows(tables, "word", [3, 3, 7, 19])
    for weights, batch in ((torch.ones(4), bags), (weighted.weights, weighted)):
        out = tables({"none": batch, "sum": batch, "mean": batch})
        scaled = rows * weights.unsqueeze(1)
        torch.testing.assert_close(out["none"], scaled)
        expected = torch.stack([scaled[:3].sum(0), torch.zeros(4), scaled[3]])
        torch.testing.assert_close(out["sum"], expected)
        torch.testing.assert_close(out["mean"], expected / torch.tensor([[3.0], [1.0], [1.0]]))


def test_a_batch_may_name_some_of_the_features_only() -> None:
    tables = et.EmbeddingCollection(TABLES)
    out = tables({"item": et.Jagged.from_lists([[1]])})
    assert list(out) == ["item"]
    assert out["item"].shape == (1, 3)


def test_vectors_are_float32_whatever_the_storage() -> None:
    tables = et.EmbeddingCollection([et.TableSpec("word", 20, 4, dtype=torch.bfloat16)])
    out = tables({"word": et.Jagged.from_lists([[1]])})["word"]
    assert out.dtype == torch.float32
    assert tables.shards["word"].weight.dtype == torch.bfloat16


def test_weights_of_ids_get_their_gradient() -> None:
    tables = et.EmbeddingCollection(TABLES, [et.FeatureSpec("word", pooling="sum")])
    weights = torch.tensor([0.5, 2.0], requires_grad=True)
    bags = et.Jagged(torch.tensor([3, 4]), torch.tensor([2]), weights)
    tables({"word": bags})["word"].sum().backward()
    torch.testing.assert_close(weights.grad, expected_rows(tables, "word", [3, 4]).sum(dim=1))


@pytest.mark.parametrize("num_ids", [3, 100_000])
def test_vectors_may_be_changed_in_place(num_ids: int) -> None:
    features = [et.FeatureSpec("word"), et.FeatureSpec("other", "word")]
    tables = et.EmbeddingCollection(TABLES, features)
    ids = et.Jagged.from_ids(torch.arange(num_ids) % 20)
    out = tables({"word": ids, "other": ids})
    (out["word"].mul_(2.0).sum() + out["other"].sum()).backward()
    rows, grad = tables.table_groups[0].gradients.rows_and_values()
    counts = torch.bincount(tables.table_groups[0].keys_of([0], [ids.values])[0])
    torch.testing.assert_close(grad, 3.0 * counts[rows].unsqueeze(1).expand(-1, 4).float())


def test_rows_have_no_gradient_without_backward_and_under_no_grad() -> None:
    tables = et.EmbeddingCollection(TABLES)
    with torch.no_grad():
        out = tables({"word": et.Jagged.from_lists([[1]])})["word"]
    assert not out.requires_grad
    assert tables.table_groups[0].gradients.rows_and_values()[0].numel() == 0


def test_each_row_is_fetched_and_delivered_once() -> None:
    features = [et.FeatureSpec("word"), et.FeatureSpec("history", "word")]
    tables = et.EmbeddingCollection(TABLES, features)
    asked = tables.ask({"word": et.Jagged.from_lists([[3], [3]]), "history": et.Jagged.from_lists([[5, 3]])})
    vectors, inverse = tables.distinct_rows(asked), asked.places()
    assert vectors.shape == (2, 4)
    assert inverse["word"][0] == inverse["word"][1] == inverse["history"][1]
    vectors.sum().backward()
    rows, grad = tables.table_groups[0].gradients.rows_and_values()
    assert rows.numel() == 2
    torch.testing.assert_close(grad, torch.ones(2, 4))


def test_distinct_rows_of_tables_of_two_optimizers_find_their_way() -> None:
    tables = et.EmbeddingCollection([et.TableSpec("a", 9, 4), et.TableSpec("b", 7, 4, optimizer="other")])
    asked = tables.ask({"b": et.Jagged.from_lists([[6, 2, 6]]), "a": et.Jagged.from_lists([[6]])})
    vectors, inverse = tables.distinct_rows(asked), asked.places()
    assert vectors.shape == (3, 4)
    torch.testing.assert_close(vectors[inverse["b"]], tables.gather_table("b")[[6, 2, 6]])
    torch.testing.assert_close(vectors[inverse["a"]], tables.gather_table("a")[[6]])
    (vectors * torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
    delivered = {
        group.table_names[0]: group.gradients.rows_and_values()[1][:, 0].tolist() for group in tables.table_groups
    }
    assert delivered == {"a": [1.0], "b": [2.0, 3.0]}


def test_distinct_rows_of_features_that_are_pooled_are_refused() -> None:
    tables = et.EmbeddingCollection(TABLES, [et.FeatureSpec("word", pooling="sum")])
    asked = tables.ask({"word": et.Jagged.from_lists([[1]])})
    with pytest.raises(ValueError, match="features without pooling; pooled features are word"):
        tables.distinct_rows(asked)


def test_distinct_rows_of_tables_of_two_sizes_are_refused() -> None:
    tables = et.EmbeddingCollection(TABLES)
    asked = tables.ask({"word": et.Jagged.from_lists([[1]]), "item": et.Jagged.from_lists([[1]])})
    with pytest.raises(ValueError, match="tables of one dim"):
        tables.distinct_rows(asked)


def test_an_unknown_feature_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"\['word', 'user', 'item'\], got \['words'\]"):
        et.EmbeddingCollection(TABLES)({"words": et.Jagged.from_lists([[1]])})


@pytest.mark.parametrize("bad_id", [-1, 20])
def test_a_bad_id_is_named(bad_id: int) -> None:
    tables = et.EmbeddingCollection(TABLES)
    before = tables.gather_table("word").clone()
    with pytest.raises(et.BadIdError) as caught:
        tables({"word": et.Jagged.from_lists([[3], [4, bad_id]])})
    for part in (
        "feature 'word'",
        "table 'word'",
        f"id {bad_id}",
        "position 2",
        "bag 1",
        "rank 0",
        "0 to 19",
    ):
        assert part in str(caught.value)
    assert torch.equal(tables.gather_table("word"), before)


def test_bad_ids_can_be_hashed_into_the_table() -> None:
    tables = et.EmbeddingCollection(TABLES, [et.FeatureSpec("word", invalid_ids="hash")])
    batch = {"word": et.Jagged.from_lists([[-1, 10**12, 2**63 - 1, 3]])}
    first, second = tables(batch)["word"], tables(batch)["word"]
    assert torch.equal(first, second)
    table = tables.gather_table("word")
    assert all((row == table).all(dim=1).any() for row in first.detach())
    torch.testing.assert_close(first[3], table[3])


def test_bad_ids_can_be_dropped_from_their_bags() -> None:
    features = [et.FeatureSpec("word", pooling="mean", invalid_ids="drop")]
    tables = et.EmbeddingCollection(TABLES, features)
    bags = et.Jagged(torch.tensor([3, 99, -5]), torch.tensor([2, 1]), torch.tensor([1.0, 5.0, 5.0]))
    out = tables({"word": bags})["word"]
    torch.testing.assert_close(out[0], expected_rows(tables, "word", [3])[0])
    assert torch.equal(out[1], torch.zeros(4))


def test_tables_of_one_dim_share_a_local_tensor_and_each_is_a_slice_of_it() -> None:
    tables = et.EmbeddingCollection(TABLES)
    assert [len(group.shards) for group in tables.table_groups] == [2, 1]
    word, user = tables.table_groups[0].shards
    user.weight.fill_(7)
    assert (tables.table_groups[0].weight == 7).all(dim=1).sum() == 6
    assert not (word.weight == 7).any()


def test_state_lies_beside_the_rows() -> None:
    tables = et.EmbeddingCollection(TABLES)
    et.optim.RowwiseAdagrad(tables, initial_accumulator_value=0.5)
    names = [view.name for view in tables.shard_views()]
    assert names == [f"{t}/{s}" for t in ("word", "user", "item") for s in ("weight", "accumulator")]
    for shard in tables.shards.values():
        assert shard.state["accumulator"].shape == shard.weight.shape[:1]
        assert shard.state["accumulator"].unique().tolist() == [0.5]


def test_a_table_has_one_optimizer_at_a_time() -> None:
    tables = et.EmbeddingCollection(TABLES)
    first = et.optim.RowwiseAdagrad(tables)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(first, 0.5)
    for kind in (et.optim.RowwiseAdagrad, et.optim.SGD):
        with pytest.raises(ValueError, match=r"word, user already have an optimizer, RowwiseAdagrad: .*scheduler"):
            kind(tables)
    del first, scheduler
    et.optim.Adam(tables)
    assert set(tables.shards["word"].state) == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("init", ["uniform", "normal", "zeros"])
def test_first_values_are_a_function_of_seed_table_and_slot(init: str) -> None:
    spec = et.TableSpec("word", 10_000, 3, init=init, init_scale=0.25)
    whole = initial_rows(spec, 0, 10_000, seed=1)
    assert torch.equal(whole[4000:9001], initial_rows(spec, 4000, 9001, seed=1))
    if init == "zeros":
        assert not whole.any()
        return
    assert not torch.equal(whole, initial_rows(spec, 0, 10_000, seed=2))
    other = et.TableSpec("user", 10_000, 3, init=init, init_scale=0.25)
    assert not torch.equal(whole, initial_rows(other, 0, 10_000, seed=1))
    expected_std = 0.25 if init == "normal" else 0.25 / 3**0.5
    assert abs(whole.std().item() - expected_std) < 0.01
    assert init == "normal" or whole.abs().max() <= 0.25
