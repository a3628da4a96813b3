"""`embedtrain inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from embedtrain.commands.console import EXIT_DONE, command, run_argument, step_option, tell
from embedtrain.errors import CorruptCheckpointError, UserError, counted

if TYPE_CHECKING:
    from embedtrain.checkpoint.choice import Step
    from embedtrain.train.run_folder import RunFolder
    from embedtrain.train.state import RunState


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
        step: the checkpoint's step; None for the newest.
        verify: whether to check every byte of the checkpoint, or of all checkpoints if `step` is None.
    """
    from embedtrain.checkpoint import CheckpointReader, choose_checkpoint, find_checkpoints
    from embedtrain.train.run_folder import RunFolder
    from embedtrain.train.state import read_run_state

    folder = RunFolder(path)
    checkpoints_path = _checkpoints_path(folder)
    if checkpoints_path is None:
        if step is not None:
            raise UserError(f"--step needs a run folder, but {path!r} is a single checkpoint: leave it out")
        steps, chosen, all_paths = [], folder.path, [folder.path]
    else:
        found = find_checkpoints(checkpoints_path)
        if not found:
            raise UserError(f"{path!r} has no complete checkpoint")
        steps, chosen = [info.step for info in found], choose_checkpoint(checkpoints_path, step or "newest", path)
        all_paths = [info.path for info in found] if step is None else [chosen]
    config = folder.read_config()
    with CheckpointReader(chosen) as reader:
        manifest = reader.manifest
        if config is not None:
            tell(f"run          {folder.path}")
        if steps:
            tell(f"checkpoints  of step {', '.join(f'{each:,}' for each in steps)}")
        name, saved_by = "newest" if step is None and steps else "checkpoint", counted(manifest.world_size, "rank")
        tell(f"{name:<11}  {chosen}, saved {manifest.created} by {saved_by}")
        tell(f"step         {manifest.step:,}")
        if is_of_run := config is not None or "train" in manifest.state:
            _print_state(read_run_state(manifest, chosen))
        tell("tensors")
        for tensor, info in sorted(reader.tensors.items()):
            shape = " x ".join(f"{size:,}" for size in info.shape)
            dtype, pieces = str(info.dtype).removeprefix("torch."), counted(len(info.pieces), "piece")
            tell(f"  {tensor:<24} {dtype:<9} {shape}, in {pieces}")
    if config is not None:
        tell("configuration")
        for line in config.removesuffix("\n").split("\n"):
            tell(f"  {line}")
    if verify:
        _verify(all_paths, folder if config is not None else None, is_of_run=is_of_run)


def _checkpoints_path(folder: RunFolder) -> str | None:
    """Returns the folder of the checkpoints; None if the given folder is itself a checkpoint."""
    from embedtrain import storage
    from embedtrain.checkpoint import find_checkpoints
    from embedtrain.checkpoint.manifest import MANIFEST_NAME

    if MANIFEST_NAME in storage.list_files(folder.path):
        return None
    return folder.path if find_checkpoints(folder.path) else folder.checkpoints_path


def _print_state(state: RunState) -> None:
    train, optimizer = state.train, state.optimizer
    tell(f"epochs       {train.epoch:,} done, and {counted(train.step_in_epoch, 'step')} of the next")
    tell(f"examples     {train.examples:,} in {train.seconds:,.0f} seconds of training")
    settings = ", ".join(f"{name} {value}" for name, value in optimizer.param_groups[0].items() if name != "params")
    tell(f"optimizer    {optimizer.name}: {settings}")
    for table, start in state.init_from.items():
        tell(f"init_from    {start.num_copied:,} of {start.num_rows:,} rows of {table}, of {start.path}")
    if state.grown_from is not None:
        tell(f"grown from   {state.grown_from.path}, step {state.grown_from.step:,}")
    if optimizer.num_skipped:
        tell(f"skipped      {counted(optimizer.num_skipped, 'step')} whose gradient was not finite")


def _verify(paths: Sequence[str], folder: RunFolder | None, *, is_of_run: bool) -> None:
    """Checks every byte of the checkpoints and of the run's kept data; prints each result, raises if any is damaged.

    The state saved beside the tensors is checked only for checkpoints of a run.
    """
    from embedtrain.checkpoint import verify
    from embedtrain.checkpoint.chain import read_manifest
    from embedtrain.train.state import read_run_state

    known: set[str] = set()
    faults = []
    for path in paths:
        try:
            verify(path, known)
            if is_of_run:
                read_run_state(read_manifest(path), path)
            tell(f"verified     {path}")
        except CorruptCheckpointError as error:
            tell(f"damaged      {path}")
            faults.append(str(error))
    if folder is not None:
        try:
            if folder.verify_data():
                tell(f"verified     {folder.kept_data_path}")
        except (CorruptCheckpointError, UserError) as error:
            tell(f"damaged      {folder.kept_data_path}")
            faults.append(str(error))
    if faults:
        raise CorruptCheckpointError("\n".join(faults))
