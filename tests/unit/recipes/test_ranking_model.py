from __future__ import annotations

import pytest
import torch

import embedtrain as et
from embedtrain.data.click_batches import ClickBatch
from embedtrain.errors import UserError
from embedtrain.recipes.ranking.model import DLRM, DCNv2, NetworkOptions, Ranking, build_network


def test_dlrm_takes_the_dot_products_of_all_pairs() -> None:
    network = DLRM(2, [3, 3], NetworkOptions(architecture="dlrm", bottom=(5,), top=(4,)))
    dense, first, second = torch.randn(6, 2), torch.randn(6, 3), torch.randn(6, 3)
    bottom = network.bottom(dense)
    pairs = [(first * bottom), (second * bottom), (second * first)]
    features = torch.cat([bottom, *(product.sum(dim=1, keepdim=True) for product in pairs)], dim=1)
    torch.testing.assert_close(network(dense, [first, second]), network.output(network.top(features)).squeeze(1))


def test_dlrm_projects_narrow_features_and_needs_no_dense_ones() -> None:
    network = DLRM(0, [2, 4], NetworkOptions(architecture="dlrm", top=()))
    narrow, wide = torch.randn(5, 2), torch.randn(5, 4)
    product = (network.projections[0](narrow) * wide).sum(dim=1, keepdim=True)
    torch.testing.assert_close(network(torch.zeros(5, 0), [narrow, wide]), network.output(product).squeeze(1))


def test_dcn_v2_crosses_its_input_with_each_layer() -> None:
    network = DCNv2(1, [2, 3], NetworkOptions(top=(4,), num_cross_layers=2))
    dense, first, second = torch.randn(5, 1), torch.randn(5, 2), torch.randn(5, 3)
    x0 = torch.cat([dense, first, second], dim=1)
    x1 = x0 * network.cross[0](x0) + x0
    x2 = x0 * network.cross[1](x1) + x1
    expected = network.output(torch.cat([x2, network.deep(x0)], dim=1)).squeeze(1)
    torch.testing.assert_close(network(dense, [first, second]), expected)


def test_a_low_rank_has_fewer_parameters() -> None:
    full, low = (DCNv2(10, [10], NetworkOptions(top=(), low_rank=rank)) for rank in (None, 2))
    # 20 x 20 weights and 20 biases a layer, against 2 x 20 twice and the biases; and the output.
    assert sum(p.numel() for p in full.parameters()) == 3 * 420 + 21
    assert sum(p.numel() for p in low.parameters()) == 3 * 100 + 21


def test_first_values_are_a_function_of_the_seed() -> None:
    options = NetworkOptions()
    torch.manual_seed(0)
    first = build_network(2, [4], options, seed=1).state_dict()
    drawn = torch.rand(1)
    second = build_network(2, [4], options, seed=1).state_dict()
    other = build_network(2, [4], options, seed=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["output.weight"], other["output.weight"])
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)


def test_an_empty_batch_has_a_loss_of_zero() -> None:
    tables, features = [et.TableSpec("u", 5, 4)], [et.FeatureSpec("u")]
    model = Ranking(tables, features, 1, NetworkOptions(architecture="dlrm"))
    nobody = et.Jagged.from_ids(torch.zeros(0, dtype=torch.int64))
    objective = model(ClickBatch(torch.zeros(0), torch.zeros(0, 1), {"u": nobody}, num_global=3))
    objective.loss.backward()
    assert (objective.loss.item(), float(objective.total), objective.num_predictions) == (0.0, 0.0, 0)


@pytest.mark.parametrize(
    "options", [{"architecture": "dcn"}, {"top": (0,)}, {"num_cross_layers": 0}, {"low_rank": 0}], ids=str
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="must be"):
        NetworkOptions(**options)  # type: ignore[arg-type]
