"""`embedtrain inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from embedtrain.commands.console import EXIT_DONE, command, run_argument, step_option
from embedtrain.errors import CorruptCheckpointError, UserError

if TYPE_CHECKING:
    from embedtrain.checkpoint.choice import Step
    from embedtrain.train.run_folder import RunFolder


@command("embedtrain inspect runs/x --verify")
@run_argument
@step_option
@click.option("--verify", is_flag=True, help="Read every byte and compare its checksum.")
def inspect(path: str, step: Step, verify: bool) -> int:
    """Shows a checkpoint, and the configuration of its run."""
    print_run(path, step, verify=verify)
    return EXIT_DONE


def print_run(path: str, step: Step, *, verify: bool) -> None:
    """Prints step, epoch, tables with shapes and dtypes, optimizer and configuration of a run.

    Args:
        path: the run folder, a folder of checkpoints, or a single checkpoint.
        step: which checkpoint; None for the newest.
        verify: whether to check every byte of it, or of all checkpoints without a `step`.
    """
    from embedtrain.checkpoint import CheckpointReader, choose_checkpoint, find_checkpoints
    from embedtrain.train.run_folder import RunFolder

    folder = RunFolder(path)
    checkpoints_path = _checkpoints_path(folder)
    if checkpoints_path is None:
        if step is not None:
            raise UserError(f"--step chooses a checkpoint of a run, and {path!r} is one checkpoint")
        steps, chosen, all_paths = [], folder.path, [folder.path]
    else:
        found = find_checkpoints(checkpoints_path)
        if not found:
            raise UserError(f"there is no complete checkpoint in {path!r}")
        steps, chosen = [info.step for info in found], choose_checkpoint(checkpoints_path, step, path)
        all_paths = [info.path for info in found] if step is None else [chosen]
    with CheckpointReader(chosen) as reader:
        state, manifest = reader.state, reader.manifest
        config = folder.read_config()
        if config is not None:
            print(f"run          {folder.path}")
        if steps:
            print(f"checkpoints  {', '.join(map(str, steps))}")
        name = "newest" if step is None and steps else "checkpoint"
        print(f"{name:<11}  {chosen}, saved {manifest.created} by {manifest.world_size} ranks")
        print(f"step         {reader.step:,}")
        _print_progress(state)
        print("tensors")
        for tensor, info in sorted(reader.tensors.items()):
            shape = " x ".join(f"{size:,}" for size in info.shape)
            print(f"  {tensor:<24} {str(info.dtype).removeprefix('torch.'):<9} {shape}, in {len(info.pieces)} pieces")
        _print_origin(state)
    if config is not None:
        print("configuration")
        for line in config.splitlines():
            print(f"  {line}")
    if verify:
        _verify(all_paths)


def _checkpoints_path(folder: RunFolder) -> str | None:
    """Returns where the checkpoints of a run, or of the library, lie; None if the folder is itself a checkpoint."""
    from embedtrain import storage
    from embedtrain.checkpoint import find_checkpoints
    from embedtrain.checkpoint.manifest import MANIFEST_NAME

    if MANIFEST_NAME in storage.list_files(folder.path):
        return None
    return folder.path if find_checkpoints(folder.path) else folder.checkpoints_path


def _print_progress(state: Mapping[str, Any]) -> None:
    """Prints how far a run has come; a checkpoint of the library says it in its own words, if at all."""
    if "train" in state:
        train = state["train"]
        print(f"epoch        {train['epoch']}, {train['step_in_epoch']:,} steps into it")
        print(f"examples     {train['examples']:,} in {train['seconds']:,.0f} seconds of training")


def _print_origin(state: Mapping[str, Any]) -> None:
    """Prints the optimizer, and what the tables began with."""
    if "optimizer" in state:
        optimizer = state["optimizer"]
        settings = {k: v for k, v in optimizer["param_groups"][0].items() if k != "params"}
        print(f"optimizer    {optimizer['name']}: {', '.join(f'{k} {v}' for k, v in settings.items())}")
        if optimizer["num_skipped"]:
            print(f"skipped      {optimizer['num_skipped']:,} steps whose gradient was not finite")
    for table, start in state.get("init_from", {}).items():
        print(f"init_from    {start['num_copied']:,} of {start['num_rows']:,} rows of {table}, of {start['path']}")
    if "grown_from" in state:
        print(f"grown from   {state['grown_from']['path']}, step {state['grown_from']['step']:,}")


def _verify(paths: Sequence[str]) -> None:
    """Checks every byte of every checkpoint, and says of each how it is, before any that is damaged is raised for."""
    from embedtrain.checkpoint import verify

    known: set[str] = set()
    faults = []
    for path in paths:
        try:
            verify(path, known)
            print(f"verified     {path}")
        except CorruptCheckpointError as error:
            print(f"damaged      {path}")
            faults.append(str(error))
    if faults:
        raise CorruptCheckpointError("\n".join(faults))
