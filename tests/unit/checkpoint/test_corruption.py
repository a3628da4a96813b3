"""Every way to damage a checkpoint is noticed, and the message says where."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from embedtrain.checkpoint import CheckpointReader, load_shards, verify
from embedtrain.checkpoint import manifest as manifest_module
from embedtrain.checkpoint.chain import read_manifest
from embedtrain.errors import CheckpointError, CorruptCheckpointError
from tests.unit.checkpoint.example import example_tables, save, views_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of 3 ranks whose files have blocks of 64 bytes, and shared tensors."""
    monkeypatch.setattr("embedtrain.checkpoint.blocks.BLOCK_BYTES", 64)
    return Path(save(tmp_path / "a", 1, example_tables(), 3, replicated={"dense": torch.arange(40.0)}))


def tensor_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def load_all(folder: Path) -> None:
    tables = {name: torch.zeros_like(table) for name, table in example_tables().items()}
    with CheckpointReader(str(folder)) as reader:
        load_shards(reader, views_of(tables))
        reader.replicated()


def gather_all(folder: Path) -> None:
    with CheckpointReader(str(folder)) as reader:
        for name, info in reader.tensors.items():
            reader.gather(name, torch.randperm(info.shape[0]))
        reader.replicated()


def test_every_flipped_bit_of_a_file_is_noticed(folder: Path) -> None:
    draw = random.Random(0)
    for file in tensor_files(folder):
        data = file.read_bytes()
        header_bytes = 8 + int.from_bytes(data[:8], "little")
        bits = [draw.randrange(8 * len(data)) for _ in range(50)]
        bits += [draw.randrange(8 * header_bytes) for _ in range(15)]
        for bit in bits:
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            with pytest.raises(CorruptCheckpointError, match=file.name):
                verify(str(folder))
        file.write_bytes(data)
    verify(str(folder))


@pytest.mark.parametrize("read", [load_all, gather_all])
def test_a_flipped_bit_is_noticed_by_reading(read: Callable[[Path], None], folder: Path) -> None:
    for file in tensor_files(folder):
        data = bytearray(file.read_bytes())
        first = 8 + int.from_bytes(data[:8], "little")
        for byte in range(first, len(data), 11):
            data[byte] ^= 4
            file.write_bytes(data)
            with pytest.raises(CorruptCheckpointError, match=f"{file.name}: bytes .*checksum differs"):
                read(folder)
            data[byte] ^= 4
        file.write_bytes(data)
    read(folder)


def test_the_message_names_the_file_the_tensor_and_its_rows(folder: Path) -> None:
    manifest = read_manifest(str(folder))
    piece = manifest.tensors["item/weight"].pieces[1]
    assert (piece.offset, piece.rows) == (13, 13)
    bad_row = 20
    byte = piece.start_byte + (bad_row - piece.offset) * 5 * 4 + 7
    file = folder / piece.file
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(data)
    with CheckpointReader(str(folder)) as reader:
        reader.read("item/weight", 0, 13)
        with pytest.raises(CorruptCheckpointError) as caught:
            reader.read("item/weight", bad_row, bad_row + 1)
    start, stop = byte // 64 * 64, byte // 64 * 64 + 64
    first, end = 13 + (start - piece.start_byte) // 20, 13 - (-(stop - piece.start_byte) // 20)
    assert first <= bad_row < end
    assert str(caught.value) == (
        f"{file}: bytes {start} to {stop} are damaged (the checksum differs); affected: "
        f"item/weight rows [{first}, {end})"
    )


@pytest.mark.parametrize("read", [load_all, gather_all, lambda folder: verify(str(folder))])
def test_a_file_of_another_length_is_noticed(read: Callable[[Path], None], folder: Path) -> None:
    for file in tensor_files(folder):
        data = file.read_bytes()
        for length in sorted(random.Random(1).sample(range(len(data)), 20)):
            file.write_bytes(data[:length])
            with pytest.raises(CorruptCheckpointError, match=f"{file.name} has {length} bytes instead of {len(data)}"):
                read(folder)
        file.write_bytes(data + b"\0")
        with pytest.raises(CorruptCheckpointError, match=file.name):
            read(folder)
        file.write_bytes(data)


def test_a_file_truncated_after_its_length_was_seen_is_noticed(folder: Path) -> None:
    with CheckpointReader(str(folder)) as reader:
        for file in tensor_files(folder):
            os.truncate(file, 80)
        with pytest.raises(CorruptCheckpointError, match=r"bytes .* are missing; affected: .*item/weight rows \["):
            reader.read("item/weight", 0, 37)


@pytest.mark.parametrize("read", [load_all, gather_all, lambda folder: verify(str(folder))])
def test_a_missing_file_is_noticed(read: Callable[[Path], None], folder: Path) -> None:
    shard = tensor_files(folder)[-1]
    shard.unlink()
    with pytest.raises(CorruptCheckpointError, match=rf"{shard.name} is missing; affected: .*weight rows \["):
        read(folder)


@pytest.mark.parametrize("read", [load_all, gather_all, lambda folder: verify(str(folder))])
def test_swapped_and_foreign_files_are_noticed(read: Callable[[Path], None], folder: Path, tmp_path: Path) -> None:
    _, first, second, _ = tensor_files(folder)
    kept = first.read_bytes(), second.read_bytes()
    assert len(kept[0]) == len(kept[1])
    first.write_bytes(kept[1])
    second.write_bytes(kept[0])
    with pytest.raises(CorruptCheckpointError, match="checksum differs"):
        read(folder)
    second.write_bytes(kept[1])
    other = Path(save(tmp_path / "b", 1, example_tables(seed=1), 3))
    shutil.copy(tensor_files(other)[0], first)
    with pytest.raises(CorruptCheckpointError, match=first.name):
        read(folder)


def test_verify_tells_of_every_damaged_file(folder: Path) -> None:
    files = tensor_files(folder)
    files[0].unlink()
    files[2].write_bytes(bytes(files[2].stat().st_size))
    with pytest.raises(CorruptCheckpointError) as caught:
        verify(str(folder))
    first, second = str(caught.value).splitlines()
    assert files[0].name in first
    assert "tensors that all ranks share" in first
    assert files[2].name in second


def test_every_flipped_bit_of_the_manifest_is_noticed(folder: Path) -> None:
    file = folder / "manifest.json"
    data = file.read_bytes()
    original = manifest_module.decode(data, "m")
    for byte in range(len(data)):
        flipped = bytearray(data)
        flipped[byte] ^= 1 << byte % 8
        with pytest.raises(CorruptCheckpointError):
            manifest_module.decode(bytes(flipped), "m")
    for length in range(0, len(data), 7):
        with pytest.raises(CorruptCheckpointError):
            manifest_module.decode(data[:length], "m")
    assert manifest_module.encode(original) == data


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest as a forger does, who knows how to make its checksum right."""
    document = json.loads((folder / "manifest.json").read_text())
    del document["checksum"]
    change(document)
    document["checksum"] = manifest_module._checksum(document)
    (folder / "manifest.json").write_bytes(manifest_module.canonical_json(document))


def weight(document: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = document["tensors"]["item/weight"]
    return entry


def pieces_in(document: dict[str, Any]) -> list[dict[str, Any]]:
    pieces: list[dict[str, Any]] = weight(document)["pieces"]
    return pieces


def test_another_format_version_is_told_from_damage(folder: Path) -> None:
    rewrite(folder, lambda document: document.update(version=3))
    with pytest.raises(CheckpointError, match="format version 3, and this embedtrain reads versions 1 and 2") as caught:
        CheckpointReader(str(folder))
    assert not isinstance(caught.value, CorruptCheckpointError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["files"].update({"../../secret": {}}), "bytes"),
        (
            lambda d: d["files"].update({"../s": {"bytes": 1, "block_bytes": 1, "checksums": ["0" * 32]}}),
            "'../s' is not the name of a checkpoint file",
        ),
        (lambda d: pieces_in(d).pop(), "item/weight: the pieces end at row 26 of 37"),
        (lambda d: pieces_in(d)[0].update(start_byte=10**9), "ends after its file of"),
        (lambda d: pieces_in(d)[0].update(start_byte=-8), r"'item/weight'\].pieces\[0\].start_byte: .*, found -8"),
        (lambda d: pieces_in(d)[0].update(file="x"), "'x'"),
        (lambda d: d["tensors"]["item/weight"].update(dtype="object"), "object"),
        (lambda d: d["tensors"]["item/weight"].update(shape=[]), "shape"),
        (lambda d: d["files"].popitem(), "safetensors"),
        (lambda d: d.update(tensors=[]), "tensors: expected a valid dictionary, found"),
        (lambda d: d.pop("state"), "state is missing"),
        (lambda d: d.update(step="1"), "step: expected a valid integer, found '1'"),
        (lambda d: d.update(world_size=0), "world_size: expected greater than or equal to 1, found 0"),
        (lambda d: d.update(versions=None), "versions: expected a valid dictionary, found None"),
        (
            lambda d: weight(d).update(shape=[2**62, 0]),
            r"'item/weight'\].shape\[0\]: expected less than .*found 4611",
        ),
        (lambda d: weight(d).update(shape=[37, 0]), "'item/weight': rows must have at least 1 element"),
        (
            lambda d: weight(d).update(shape=[37, 2**40, 2**40]),
            "'item/weight': .* at most .* bytes, got shape 37 x 1099511627776",
        ),
        (lambda d: weight(d).update(shape=[37] + [1] * 69), r"shape: expected tuple should have at most 64 items"),
        (lambda d: weight(d).update(layout=[]), r"'item/weight'\].layout: expected a valid dictionary, found \[\]"),
        (lambda d: weight(d)["layout"].update(block_rows=-1), "'item/weight': layout: block_rows: .*, found -1"),
        (lambda d: weight(d)["layout"].update(block_rows=2**70), "'item/weight': layout: block_rows: expected"),
        (lambda d: weight(d)["layout"].update(multiplier=0), "'item/weight': layout: multiplier: .*, found 0"),
        (lambda d: weight(d)["layout"].update(multiplier=2**80), "'item/weight': layout: multiplier: expected"),
        (lambda d: weight(d)["layout"].pop("multiplier"), "'item/weight': layout: multiplier is missing"),
        (lambda d: next(iter(d["files"].values())).update(block_bytes=2**62), r"block_bytes: .* to 1073741824, found"),
        (lambda d: next(iter(d["files"].values())).update(bytes=True), r"bytes: expected a valid integer, found True"),
        (lambda d: pieces_in(d)[0].update(span=13), "has only one of span and slots_byte"),
        (lambda d: d.update(replicated="../x"), "'../x' has no checksums"),
        (lambda d: d.update(parent={"step": 0, "checksum": "0" * 32}), "version 1 does not match parent"),
        (lambda d: d.update(version=2), "version 2 does not match parent None"),
        (lambda d: d.update(format="other"), "is not the manifest of an embedtrain checkpoint"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, folder: Path
) -> None:
    rewrite(folder, change)
    with pytest.raises(CorruptCheckpointError, match=message):
        CheckpointReader(str(folder))


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_no_file_of_a_checkpoint_can_run_code(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    payload = pickle.dumps(_Payload(marker))
    for file in folder.iterdir():
        data = file.read_bytes()
        file.write_bytes(payload.ljust(len(data), b"\0"))
        with pytest.raises(CorruptCheckpointError):
            load_all(folder)
        file.write_bytes(data)
    assert not marker.exists()


def test_a_folder_without_a_manifest_is_not_a_checkpoint(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not a complete checkpoint: it has no manifest\.json"):
        CheckpointReader(str(folder))


def test_a_forged_checkpoint_whose_checksums_are_right_cannot_run_code(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    payload = pickle.dumps(_Payload(marker))
    originals = {file: file.read_bytes() for file in tensor_files(folder)}
    for file, data in originals.items():
        forged = payload.ljust(len(data), b"\0")
        file.write_bytes(forged)
        sums = [xxhash.xxh3_128_hexdigest(forged[start : start + 64]) for start in range(0, len(forged), 64)]
        rewrite(folder, lambda d, name=file.name, sums=sums: d["files"][name].update(checksums=sums))
    verify(str(folder))  # the bytes are what the forger wrote
    tables = {name: torch.zeros_like(table) for name, table in example_tables().items()}
    with CheckpointReader(str(folder)) as reader:
        load_shards(reader, views_of(tables))  # numbers, whatever the bytes
        with pytest.raises(CorruptCheckpointError, match="is not a safetensors file"):
            reader.replicated()
    assert not marker.exists()


def test_a_forged_state_stays_data(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    forged = {
        "__reduce__": ["os.mkdir", [str(marker)]],
        "py/object": "os.mkdir",
        "config": f"${{oc.env:HOME}}!!python/object/apply:os.mkdir ['{marker}']",
        "__proto__": {"depth": 1},
    }
    rewrite(folder, lambda document: document.update(state=forged))
    with CheckpointReader(str(folder)) as reader:
        assert reader.state == forged
    (folder / "manifest.json").write_bytes(b"[" * 100_000)
    with pytest.raises(CorruptCheckpointError):
        CheckpointReader(str(folder))
    (folder / "manifest.json").write_bytes(pickle.dumps(_Payload(marker)))
    with pytest.raises(CorruptCheckpointError):
        CheckpointReader(str(folder))
    assert not marker.exists()
