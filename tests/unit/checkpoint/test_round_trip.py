"""What is saved on m ranks is read on n, exactly, here and by other programs."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from embedtrain.checkpoint import CheckpointReader, ShardView, load_shards, save_checkpoint, verify
from embedtrain.checkpoint import manifest as manifest_module
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import CheckpointError
from tests.unit.checkpoint.example import LAYOUT, example_tables, run_threads, save, views_of


@pytest.fixture(params=["local", "memory"])
def checkpoints_path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run" / "checkpoints") if request.param == "local" else f"memory://{uuid.uuid4()}/c"


@pytest.mark.parametrize("saved_on", [1, 2, 3, 4])
def test_saved_on_m_ranks_loads_on_n(checkpoints_path: str, saved_on: int) -> None:
    tables = example_tables()
    path = save(checkpoints_path, 12, tables, saved_on)
    verify(path)
    for loaded_on in (1, 2, 3, 4):
        loaded = {name: torch.full_like(table, 7) for name, table in tables.items()}
        with CheckpointReader(path) as reader:
            for rank in range(loaded_on):
                load_shards(reader, views_of(loaded, rank, loaded_on))
        for name, table in tables.items():
            assert torch.equal(loaded[name], table), name


@pytest.mark.parametrize("block_bytes", [16, 1000, 4 * 2**20])
def test_any_range_and_any_rows_whatever_the_blocks(
    checkpoints_path: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedtrain.checkpoint.blocks.BLOCK_BYTES", block_bytes)
    tables = example_tables()
    path = save(checkpoints_path, 12, tables, 3)
    with CheckpointReader(path) as reader:
        assert len(reader.manifest.files) == 3
        for name, table in tables.items():
            for start in range(len(table)):
                for stop in {start, start + 1, (start + len(table)) // 2, len(table)}:
                    assert torch.equal(reader.read(name, start, stop), table[start:stop])
            slots = torch.randint(0, len(table), (100,))
            assert torch.equal(reader.gather(name, slots), table[slots])
            assert len(reader.gather(name, slots[:0])) == 0


def test_copies_of_remote_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = save(f"memory://{uuid.uuid4()}", 1, example_tables(), 2)
    with CheckpointReader(path) as reader:
        reader.gather("item/weight", torch.tensor([36]))
        reader.gather("item/weight", torch.tensor([35, 36]))
        assert [file.name for file in tmp_path.glob("*/*")] == [
            reader.tensors["item/weight"].pieces[1].file,
        ]
    assert list(tmp_path.iterdir()) == []


def test_the_rest_comes_back_too(checkpoints_path: str) -> None:
    dense = {"dense/weight": torch.randn(3, 2, dtype=torch.float64), "dense/step": torch.tensor(4)}
    state = {"epoch": 3, "position": [1, 2.5, "é", None, True], "nested": {"a": {}}}
    path = save(checkpoints_path, 12, example_tables(), 2, replicated=dense, state=state)
    assert path == f"{checkpoints_path}/step-000000012"
    with CheckpointReader(path) as reader:
        assert reader.step == 12
        assert reader.state == state
        assert reader.manifest.world_size == 2
        assert reader.manifest.versions["torch"] == torch.__version__
        assert reader.manifest.created.endswith("+00:00")
        info = reader.tensors["word/weight"]
        assert (info.shape, info.dtype, info.layout) == ((3, 4), torch.bfloat16, LAYOUT)
        replicated = reader.replicated()
    assert replicated.keys() == dense.keys()
    for name, tensor in dense.items():
        assert torch.equal(replicated[name], tensor)
        assert replicated[name].dtype == tensor.dtype


@pytest.mark.parametrize("dtype", manifest_module.DTYPES.values(), ids=str)
def test_every_dtype_and_a_tensor_that_is_not_contiguous(tmp_path: Path, dtype: torch.dtype) -> None:
    table = (torch.randn(6, 8) * 10).to(dtype)[:, ::2]
    assert not table.is_contiguous()
    path = save_checkpoint(str(tmp_path), 1, [ShardView("t/weight", (6, 4), 0, table)], {}, ONE_PROCESS)
    loaded = torch.zeros(6, 8, dtype=dtype)[:, ::2]
    with CheckpointReader(path) as reader:
        load_shards(reader, [ShardView("t/weight", (6, 4), 0, loaded)])
    assert torch.equal(loaded, table)


def test_tables_without_rows_and_ranks_without_tables(tmp_path: Path) -> None:
    empty = ShardView("t/weight", (0, 4), 0, torch.empty(0, 4))
    outcomes = run_threads(2, lambda ranks, rank: save_checkpoint(str(tmp_path), 1, [empty][rank:], {}, ranks))
    with CheckpointReader(str(outcomes[0])) as reader:
        load_shards(reader, [empty])
        assert reader.gather("t/weight", torch.empty(0, dtype=torch.int64)).shape == (0, 4)


def test_a_parameter_is_loaded_in_place(tmp_path: Path) -> None:
    tables = example_tables()
    path = save(tmp_path, 1, tables)
    weight = torch.nn.Parameter(torch.zeros_like(tables["item/weight"]))
    with CheckpointReader(path) as reader:
        load_shards(reader, views_of({**tables, "item/weight": weight}))
    assert torch.equal(weight, tables["item/weight"])


def test_files_are_plain_json_and_safetensors(tmp_path: Path) -> None:
    tables = example_tables()
    folder = Path(save(tmp_path, 12, tables, 3))
    document = json.loads((folder / "manifest.json").read_text())
    assert document["format"] == "embedtrain-checkpoint"
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *document["files"]}
    for name, table in tables.items():
        entry = document["tensors"][name]
        found = []
        for piece in entry["pieces"]:
            with safe_open(folder / piece["file"], framework="pt") as file:
                rows = file.get_tensor(name)
            assert len(rows) == piece["rows"]
            assert sum(len(part) for part in found) == piece["offset"]
            found.append(rows)
        assert torch.equal(torch.cat(found), table)
        assert entry["shape"] == list(table.shape)


def test_a_model_that_differs_is_refused_with_every_difference(tmp_path: Path) -> None:
    path = save(tmp_path, 1, example_tables())
    views = [
        ShardView("item/weight", (38, 5), 0, torch.zeros(38, 5), LAYOUT),
        ShardView("item/accumulator", (37,), 0, torch.zeros(37, dtype=torch.float64), {"kind": "hash"}),
        ShardView("new/weight", (2, 2), 0, torch.zeros(2, 2), LAYOUT),
    ]
    with CheckpointReader(path) as reader, pytest.raises(CheckpointError) as caught:
        load_shards(reader, views)
    assert str(caught.value).splitlines()[1:] == [
        "  new/weight: missing from the checkpoint",
        "  word/weight: only in the checkpoint",
        "  item/weight: shape (37, 5) in the checkpoint, (38, 5) in the model",
        "  item/accumulator: torch.float32 in the checkpoint, torch.float64 in the model",
        "  item/accumulator: layout {'kind': 'spread', 'multiplier': 8} in the checkpoint, "
        "{'kind': 'hash'} in the model",
    ]
    assert all(not view.tensor.any() for view in views)


def test_rows_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with CheckpointReader(save(tmp_path, 1, example_tables())) as reader:
        with pytest.raises(ValueError, match=r"item/weight has rows \[0, 37\), got \[30, 38\)"):
            reader.read("item/weight", 30, 38)
        with pytest.raises(ValueError, match=r"item/weight has rows \[0, 37\), got slots from -1 to 4"):
            reader.gather("item/weight", torch.tensor([4, -1]))
        with pytest.raises(ValueError, match=r"slots must be \[n\] int64"):
            reader.gather("item/weight", torch.tensor([1.0]))
        with pytest.raises(CheckpointError, match=r"has no tensor 'user/weight'; it has .*'item/weight'"):
            reader.read("user/weight", 0, 1)


@pytest.mark.parametrize(
    ("shape", "offset", "rows", "message"),
    [
        ((10, 4), 0, (10, 3), r"expected rows of shape \(4,\), got \(3,\)"),
        ((10, 4), 8, (3, 4), r"rows \[8, 11\) do not lie in a tensor of 10 rows"),
        ((10, 4), -1, (3, 4), r"rows \[-1, 2\) do not lie"),
        ((10, 4), 0, (10,), r"shape \(10,\) cannot be rows of a tensor of shape \(10, 4\)"),
        ((), 0, (), "cannot be rows"),
    ],
)
def test_a_view_outside_its_tensor_is_refused(
    shape: tuple[int, ...], offset: int, rows: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ShardView("t/weight", shape, offset, torch.zeros(rows))
