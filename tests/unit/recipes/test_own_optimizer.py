"""An optimizer of another package, written as docs/optimizers.md says, is chosen by name like those of this package."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import embedtrain as et
from embedtrain.config import optimizer as sections
from embedtrain.config.resolved import to_yaml
from embedtrain.errors import UserError
from embedtrain.optim.registry import warn_once
from embedtrain.recipes import loading
from embedtrain.recipes.loading import config_from_yaml, load_config, setting_keys
from embedtrain.recipes.optimizers import build_optimizer, optimizer_names, states_of_row

DOCS = Path(__file__).parents[3] / "docs"
CLICKS = ("model=ranking", "data.path=a.csv", "data.categorical=[user,shop]", "data.num_rows=10")


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, text: str, offers: dict[str, str]) -> None:
    (folder / f"{module}.py").write_text(text)
    information = folder / f"{module}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    points = "\n".join(f"{name} = {module}:{value}" for name, value in offers.items())
    (information / "entry_points.txt").write_text(f"[embedtrain.optimizers]\n{points}\n")
    sys.modules.pop(module, None)
    monkeypatch.syspath_prepend(str(folder))
    forget()


def forget() -> None:
    """Has the optimizers of installed packages looked for again."""
    vars(et.optim.OPTIMIZERS).pop("_entries", None)
    et.optim.OPTIMIZERS._loaded.clear()
    warn_once.cache_clear()
    sections._section_of.cache_clear()
    loading._known_keys.cache_clear()


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield
    monkeypatch.undo()
    forget()


@pytest.fixture
def sign_momentum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "optimizers.md").read_text(encoding="utf-8"), re.DOTALL)
    (text,) = [block for block in blocks if "class SignMomentum" in block]
    install(tmp_path, monkeypatch, "signs", text.partition("\ntables = ")[0], {"sign_momentum": "SignMomentum"})


@pytest.mark.usefixtures("sign_momentum")
def test_its_keyword_arguments_are_its_options() -> None:
    given = load_config(None, [*CLICKS, "optimizer.name=sign_momentum", "optimizer.beta=0.5", "optimizer.max_norm=2"])
    section = given.optimizer
    assert section.row_options() | {"lr": 0.001, "beta": 0.5, "max_norm": 2.0} == section.row_options()
    with pytest.raises(UserError, match="sign_momentum has no option eps"):
        load_config(None, [*CLICKS, "optimizer.name=sign_momentum", "optimizer.eps=1"])
    with pytest.raises(UserError, match=r"there are rowwise_adagrad, .*, sign_momentum"):
        load_config(None, [*CLICKS, "optimizer.name=momentum"])
    with pytest.raises(UserError, match=r"optimizer\.beta"):
        load_config(None, [*CLICKS, "optimizer.name=sign_momentum", "optimizer.beta=fast"])


@pytest.mark.usefixtures("sign_momentum")
def test_it_trains_the_tables_that_it_is_chosen_for() -> None:
    overrides = ["optimizer.tables.shop={name: sign_momentum, beta: 0.0}"]
    config = config_from_yaml(to_yaml(load_config(None, [*CLICKS, *overrides])), "saved")
    section = pickle.loads(pickle.dumps(config.optimizer))
    assert section == config.optimizer
    names = optimizer_names(section)
    specs = [et.TableSpec(name, 10, 2, optimizer=names.get(name, "default")) for name in ("user", "shop")]
    tables = et.EmbeddingCollection(specs)
    before = tables.gather_table("shop").clone()
    optimizer = build_optimizer(section, tables)
    (tables({"shop": et.Jagged.from_ids(torch.tensor([3]))})["shop"] * torch.tensor([2.0, -7.0])).sum().backward()
    optimizer.step()
    moved = tables.gather_table("shop") - before
    torch.testing.assert_close(moved[3], torch.tensor([-0.001, 0.001]))
    assert not moved[[0, 1, 2, 4, 5, 6, 7, 8, 9]].any()
    assert tables.shards["shop"].state.keys() == {"momentum"}
    assert len(states_of_row(section.of_table("shop"), torch.float32)) == 1


@pytest.mark.parametrize(
    ("text", "offers", "message"),
    [
        (
            "import a_module_that_is_missing",
            {"mine": "Mine"},
            "package odd offers the optimizer 'mine', and importing odd:Mine failed",
        ),
        ("Mine = dict", {"mine": "Mine"}, "expected odd:Mine to be a subclass of embedtrain.optim.SparseOptimizer"),
        (
            "from embedtrain.optim import SGD\n"
            "class Mine(SGD):\n    def __init__(self, tables, *, lr=0.1, odd=set(), **options): ...",
            {"mine": "Mine"},
            "the arguments of Mine cannot be settings: ValueError: mutable default",
        ),
        (
            "from embedtrain.optim import SGD\nclass Mine(SGD):\n    def __init__(self, tables, *, lr=0.1): ...",
            {"mine": "Mine"},
            r"Mine must take lr, and \*\*options",
        ),
    ],
)
def test_what_is_no_optimizer_is_refused_with_its_package_if_it_is_asked_for(
    text: str,
    offers: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(tmp_path, monkeypatch, "odd", text, offers)
    with pytest.raises(UserError, match=message):
        load_config(None, [*CLICKS, "optimizer.name=mine"])
    # Nobody else needs it: only the options of all optimizers do, and leave it out.
    caplog.clear()
    assert load_config(None, [*CLICKS, "optimizer.name=adam", "optimizer.lr=0.5"]).optimizer.lr == 0.5
    assert not caplog.records
    assert "optimizer.eps" in setting_keys()
    with pytest.raises(UserError, match="the optimizer sgd has no option eps, rowwise_adagrad and"):
        load_config(None, [*CLICKS, "optimizer.name=sgd", "optimizer.eps=1"])
    (record,) = caplog.records
    assert re.search(message, record.getMessage())


def test_a_name_belongs_to_one_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = "from embedtrain.optim import SGD\nclass Mine(SGD): ..."
    for package in ("odd", "even"):
        install(tmp_path, monkeypatch, package, text, {"mine": "Mine", "adam": "Mine"})
    assert load_config(None, [*CLICKS, "optimizer.name=adam"]).optimizer.kind is et.optim.Adam
    assert "package odd offers the optimizer 'adam', which embedtrain has itself: it is not used" in caplog.text
    with pytest.raises(UserError, match=r"'mine' is offered by several packages: .*; uninstall all but one of them"):
        load_config(None, [*CLICKS, "optimizer.name=mine"])
