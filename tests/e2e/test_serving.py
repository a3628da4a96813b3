"""A trained ranking run scores raw rows, alone and packed; both prepare them as the training did."""

from __future__ import annotations

import ast
import csv
import importlib.util
import io
import json
import os
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from embedtrain import cli
from embedtrain.errors import UserError
from embedtrain.recipes.base import Packed
from embedtrain.serve import scorer
from embedtrain.serve.package import ONNX_NAME, SCORER_NAME, write_package
from tests import launching, odd_rows

DTYPES = ("float32", "bfloat16", "int8")
ALONE = """
import runpy, sys
sys.modules["embedtrain"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serving")
    odd_rows.train_run(path)
    # Neither the data nor their preparation are needed any more.
    shutil.rmtree(path / "cache")
    (path / "train.csv").unlink()
    for dtype in DTYPES:
        output = str(path / dtype)
        assert cli.main(["export", str(path / "run"), "--format", "package", "--dtype", dtype, "--output", output]) == 0
    return path


def predict(folder: Path, data: Path, *more: str) -> dict[str, float]:
    """Returns the scores of a file by the column `id`, as the command writes them."""
    output = folder / f"{data.name}.parquet"
    arguments = ["predict", str(folder / "run"), "--data", str(data), "--output", str(output), "--keep", "id", *more]
    assert cli.main([*arguments, "--overwrite", "data.max_bad_lines=1000000"]) == 0
    table = pq.read_table(output)
    return dict(zip(map(str, table["id"].to_pylist()), table["probability"].to_pylist(), strict=True))


def predict_packed(folder: Path, data: Path, package: str = "float32", *, is_alone: bool = False) -> dict[str, float]:
    """Returns the same by the scorer of a package, here or in a process that cannot import embedtrain."""
    arguments = ["--package", package, "--data", str(data), "--keep", "id", "--max-bad-lines", "1000000"]
    if not is_alone:
        arguments[1] = str(folder / package)
        with redirect_stdout(io.StringIO()) as printed:
            assert scorer.main(arguments) == 0
        return scores_of(printed.getvalue())
    script = folder / "alone.py"
    script.write_text(ALONE)
    done = launching.run([sys.executable, str(script), f"{package}/{SCORER_NAME}", *arguments], cwd=folder)
    assert done.returncode == 0, done.stderr
    return scores_of(done.stdout)


def scores_of(printed: str) -> dict[str, float]:
    return {row["id"]: float(row["probability"]) for row in csv.DictReader(printed.splitlines())}


def assert_alike(expected: dict[str, float], found: dict[str, float]) -> None:
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:9]
    ids = list(expected)
    np.testing.assert_allclose([found[i] for i in ids], [expected[i] for i in ids], rtol=0, atol=1e-6)


def test_a_package_prepares_odd_lines_of_csv_as_the_training_does(folder: Path) -> None:
    data = folder / "odd.csv"
    odd_rows.write_csv(data, 10_000, seed=3, odd_share=0.5)
    expected = predict(folder, data)
    assert 5_000 < len(expected) < 9_900, "most lines can be used, and many cannot"
    assert_alike(expected, predict_packed(folder, data, is_alone=True))


def test_a_package_prepares_odd_json_and_parquet_as_the_training_does(folder: Path) -> None:
    rows = odd_rows.json_rows(2000, seed=4)
    odd_rows.write_json(folder / "odd.jsonl", rows)
    expected = predict(folder, folder / "odd.jsonl")
    assert 500 < len(expected) < 1900
    assert_alike(expected, predict_packed(folder, folder / "odd.jsonl"))

    columns = {
        "id": pa.array(range(4)),
        "x0": pa.array([1, None, 3, 4], pa.int32()),
        "x1": pa.array([1.5, float("nan"), None, 2.5]),
        "shop": pa.array(["s1", " s2", None, "new"]).dictionary_encode(),
        "user": pa.array([2**63 - 1, 1, None, -5]),
        "place": pa.array([1, 2, 3, 60], pa.int8()),
        "tags": pa.array([["a", None], [], None, ["b"]]),
        "words": pa.array([[1], [], None, [2, 3]]),
    }
    pq.write_table(pa.table(columns), folder / "odd.parquet")
    expected = predict(folder, folder / "odd.parquet")
    assert expected.keys() == {"0", "2"}
    assert_alike(expected, predict_packed(folder, folder / "odd.parquet"))


def test_smaller_tables_score_nearly_alike(folder: Path) -> None:
    data = folder / "usual.csv"
    odd_rows.write_csv(data, 3000, seed=5)
    expected = predict(folder, data)
    labels = {line.split(",")[0]: int(line.split(",")[1]) for line in data.read_text().splitlines()[1:] if line}
    wanted = list(expected)
    area = roc_auc_score([labels[i] for i in wanted], [expected[i] for i in wanted])
    for dtype, tolerance in (("bfloat16", 0.002), ("int8", 0.0002)):
        found = predict_packed(folder, data, dtype)
        assert found != expected
        assert roc_auc_score([labels[i] for i in wanted], [found[i] for i in wanted]) == pytest.approx(
            area, abs=tolerance
        )


def test_a_scorer_takes_rows_as_python_has_them(folder: Path) -> None:
    packed = scorer.Scorer(str(folder / "float32"))
    faults: dict[int, str] = {}
    row = {"x0": 1, "x1": "2.5", "shop": "s1", "user": "u1", "place": 3, "tags": ["a", "b"], "words": "a;b"}
    rows = [row, row | {"place": 50}, row | {"x0": np.int64(1), "place": "3", "tags": "a|b"}, {"place": 1}]
    scores = packed.score(rows, faults)
    assert scores[0] == scores[2]
    assert np.isnan(scores[1]) and not np.isnan(scores[[0, 3]]).any()
    assert faults == {1: "column place: id 50 is outside 0 to 49"}
    assert packed.score(rows[:1])[0] == pytest.approx(scores[0], abs=1e-6)
    assert packed.score([]).shape == (0,)


def test_a_scorer_names_no_module_but_torch_and_numpy() -> None:
    tree = ast.parse(Path(scorer.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        name.partition(".")[0]
        for node in imports
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }
    assert names - set(sys.stdlib_module_names) == {"numpy", "torch", "pyarrow"}


def test_measures_of_a_file_are_those_of_its_scores(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder / "held-out.csv"
    odd_rows.write_csv(data, 2000, seed=6)
    assert cli.main(["evaluate", str(folder / "run"), "--data", str(data), "--by", "shop"]) == 0
    printed = dict(reversed(line.split()) for line in capsys.readouterr().out.splitlines()[:5])
    output = folder / "held-out.parquet"
    arguments = ["predict", str(folder / "run"), "--data", str(data), "--output", str(output), "--keep", "shop,label"]
    assert cli.main(arguments) == 0
    table = pq.read_table(output)
    labels, scores = np.array(table["label"].to_pylist(), int), table["probability"].to_numpy()
    assert float(printed["auc"]) == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    shops = np.array(table["shop"].to_pylist())
    areas, weights = [], []
    for shop in set(shops.tolist()):
        rows = shops == shop
        if len(set(labels[rows].tolist())) == 2:
            areas.append(roc_auc_score(labels[rows], scores[rows]))
            weights.append(rows.sum())
    assert float(printed["gauc"]) == pytest.approx(np.average(areas, weights=weights), abs=1e-9)


def test_lines_come_in_and_scores_go_out(folder: Path) -> None:
    text = f"{odd_rows.HEADER}\n" + "\n".join(odd_rows.lines(50, 7, 0.0)) + "\n"
    (folder / "few.csv").write_text(text)
    expected = predict(folder, folder / "few.csv")
    command = [sys.executable, "-m", "embedtrain", "predict", str(folder / "run"), "--data", "-", "--keep", "id"]
    done = launching.run(command, cwd=folder, text=text)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(",") for line in done.stdout.splitlines())
    assert {name: np.float32(score) for name, score in found.items()} == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["predict", "RUN", "--data", "bare.csv", "--output", "x.parquet"],
            "no column 'x1', 'user', 'place', 'tags', 'words'; its columns are 'id', 'x0', 'shop'; data.dense, data",
        ),
        (
            ["predict", "RUN", "--data", "some.csv", "--output", "x.parquet", "--keep", "ts"],
            "; --keep or --by says which to read",
        ),
        (["evaluate", "RUN", "--data", "bare.csv"], "data.label, data.dense, data.categorical say which to read"),
        (
            ["predict", "RUN", "--data", "some.csv", "--output", "taken.parquet"],
            "already exists: choose another output",
        ),
        (["predict", "RUN", "--data", "some.csv", "--output", "x.txt"], "must end in .parquet, .csv, .jsonl"),
        (["predict", "RUN", "--data", "some.csv"], "expected --output FILE"),
        (["predict", "RUN", "--data", "some.csv", "--output", "x.csv", "table.dim=3"], "cannot set 'table.dim=3'"),
        (["predict", "RUN", "--data", "bad.csv", "--output", "x.csv", "data.max_bad_lines=1"], "bad.csv:2: expected 9"),
        (
            ["predict", "RUN", "--data", "some.csv", "--output", "x.csv", "--keep", "probability"],
            "--keep probability cannot be kept",
        ),
        (["predict", "nothing", "--data", "some.csv", "--output", "x.csv"], "'nothing' is not a run folder"),
        (["export", "RUN", "--format", "package", "--output", "float32"], "float32 already exists: choose"),
        (["export", "RUN", "--format", "package", "--output", "cache2"], "exists and is not a package"),
        (["export", "RUN", "--format", "package", "--output", "x", "--table", "shop"], "holds the whole model"),
        (["export", "RUN", "--format", "npy", "--output", "x", "--dtype", "int8"], "--dtype is for the tables of a"),
        (["export", "RUN", "--format", "npy", "--output", "x", "--onnx"], "--onnx is for the network of a package"),
        (["evaluate", "RUN", "--by", "shop"], "--by needs other data: give --data FILE too"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str],
    expected: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    Path("bare.csv").write_text("id,x0,shop\n1,2,3\n")
    Path("some.csv").write_text(f"{odd_rows.HEADER}\n1,0,1,2,s1,u1,3,a,b\n")
    Path("bad.csv").write_text(f"{odd_rows.HEADER}\n1\n2\n")
    Path("taken.parquet").write_text("")
    os.makedirs("cache2/more", exist_ok=True)
    assert cli.main([each.replace("RUN", "run") for each in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert expected in lines[-1]
    assert not Path("x.parquet").exists() and not Path("x.csv").exists()


def test_a_package_of_retrieval_recommends_as_the_run_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    lines = [
        f"u{user} " + " ".join(f"i{(user % 4) * 9 + item}" for item in generator.permutation(9)[:6])
        for user in range(40)
    ]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    settings = [f"data.path={tmp_path}/train.txt", f"data.cache_path={tmp_path}/cache", f"run.path={tmp_path}/run"]
    small = ["table.dim=8", "train.epochs=4", "train.global_batch_size=16", "log.tensorboard=false", "run.device=cpu"]
    (tmp_path / "config.yaml").write_text("model: retrieval")
    assert cli.main(["train", str(tmp_path / "config.yaml"), *settings, *small]) == 0
    (tmp_path / "test.txt").write_text("u0 i8 i7 i6\nu1 i17 i16\nnobody i1\n")
    capfd.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "test.txt")]) == 0
    measures = dict(reversed(line.split()) for line in capfd.readouterr().out.splitlines())
    assert 0 < float(measures["recall@20"]) <= 1
    assert cli.main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "test.txt"), "--by", "user"]) == 2
    assert "need a ranking run" in capfd.readouterr().err

    package = tmp_path / "package"
    assert cli.main(["export", str(tmp_path / "run"), "--format", "package", "--output", str(package)]) == 0
    capfd.readouterr()
    assert cli.main(["recommend", str(tmp_path / "run"), "u3", "u14", "--top", "5", "--include-known"]) == 0
    expected = [line.split() for line in capfd.readouterr().out.splitlines() if line.startswith(" ")]

    if importlib.util.find_spec("faiss") is not None:
        index = str(tmp_path / "items.faiss")
        arguments = ["--format", "faiss", "--similarity", "dot", "--output", index]
        assert cli.main(["export", str(tmp_path / "run"), *arguments]) == 0
        capfd.readouterr()
        asked = ["recommend", str(tmp_path / "run"), "u3", "u14", "--top", "5"]
        assert cli.main([*asked, "--include-known", "--index", index]) == 0
        assert [line.split() for line in capfd.readouterr().out.splitlines() if line.startswith(" ")] == expected
        assert cli.main(asked) == 0
        without_known = capfd.readouterr().out
        assert cli.main([*asked, "--index", index]) == 0
        assert capfd.readouterr().out == without_known
        facts = json.loads(Path(f"{index}.json").read_text())
        Path(f"{index}.json").write_text(json.dumps(facts | {"rows": facts["rows"] | {"step": 1}}))
        assert cli.main([*asked, "--index", index]) == 2
        assert f"{index} was built from table 'item' at step 1, " in capfd.readouterr().err

    retriever = scorer.Retriever(str(package))
    with pytest.raises(ValueError, match="user 3 is not in the training data"):  # a whole number is read as text
        retriever.user_vectors([3])
    vectors = retriever.user_vectors(["u3", "u14"])
    found = [[f"{score:.3f}", item] for items in retriever.top(vectors, 5) for item, score in items]
    assert found == expected
    capfd.readouterr()
    assert scorer.main(["--package", str(package), "--users", "u3", "--top", "2"]) == 0
    assert [line.split(",")[1] for line in capfd.readouterr().out.splitlines()] == ["item", *(i for _, i in found[:2])]
    assert scorer.main(["--package", str(package), "--users", "u3", "nobody"]) == 2
    assert "user 'nobody' is not in the training data" in capfd.readouterr().err
    assert scorer.main(["--package", str(package), "--data", "x.csv"]) == 2
    assert "a package of a retrieval model, not of a ranking model" in capfd.readouterr().err


@pytest.mark.slow
def test_the_network_of_a_package_is_onnx_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The exporter shows bars, whose thread would be left behind.
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'embedtrain[onnx]'")
    from onnx.reference import ReferenceEvaluator

    output = str(folder / "with-onnx")
    assert cli.main(["export", str(folder / "run"), "--format", "package", "--onnx", "--output", output]) == 0
    model = onnx.load(f"{output}/{ONNX_NAME}")
    onnx.checker.check_model(model)
    packed = scorer.Scorer(output)
    generator = torch.Generator().manual_seed(0)
    for num_rows in (1, 2, 7):
        numbers = torch.randn(num_rows, 2, generator=generator)
        vectors = {
            f"vectors.{feature['name']}": torch.randn(
                num_rows, 4 if feature["name"] == "user" else 8, generator=generator
            )
            for feature in packed.manifest["features"]
        }
        given = {"numbers": numbers.numpy(), **{name: each.numpy() for name, each in vectors.items()}}
        (found,) = ReferenceEvaluator(model).run(["logits"], given)
        # The program of torch.export was made for two rows or more.
        doubled = [torch.cat([each, each]) for each in (numbers, *vectors.values())]
        expected = packed._network(doubled[0], doubled[1:])[:num_rows]
        np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_onnx_is_refused_without_its_packages_and_without_a_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    arguments = ["export", str(folder / "run"), "--format", "package", "--onnx", "--output", str(folder / "none")]
    assert cli.main(arguments) == 2
    assert "--onnx needs the packages onnx and onnxscript: pip install 'embedtrain[onnx]'" in capsys.readouterr().err
    with pytest.raises(UserError, match="--onnx: a package of a retrieval model holds no network"):
        write_package(Packed("retrieval", 1, {}, {}, {}), str(folder / "none"), has_onnx=True)
    assert not (folder / "none").exists()


def test_a_newer_package_is_refused(folder: Path, tmp_path: Path) -> None:
    manifest = json.loads((folder / "float32" / scorer.MANIFEST_NAME).read_text())
    (tmp_path / scorer.MANIFEST_NAME).write_text(json.dumps(manifest | {"version": scorer.VERSION + 1}))
    with pytest.raises(ValueError, match=r"version 2, and this scorer reads versions up to 1: use the scorer\.py"):
        scorer.Scorer(str(tmp_path))
    with pytest.raises(ValueError, match=r"not a package: it has no manifest\.json"):
        scorer.Scorer(str(folder))
