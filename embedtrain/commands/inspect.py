"""`embedtrain inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from embedtrain.commands.console import EXIT_DONE, command, run_argument, tell
from embedtrain.errors import CorruptCheckpointError, UserError, counted

if TYPE_CHECKING:
    from embedtrain.train.state import RunState


@command("embedtrain inspect runs/x --verify")
@run_argument
@click.option("--verify", is_flag=True, help="Read every byte and compare its checksum.")
def inspect(path: str, verify: bool) -> int:
    """Shows the newest checkpoint of a run, and its configuration."""
    print_run(path, verify=verify)
    return EXIT_DONE


def print_run(run_path: str, *, verify: bool) -> None:
    """Prints step, epoch, tables with shapes and dtypes, optimizer and configuration of a run."""
    from embedtrain.checkpoint import CheckpointReader, find_checkpoints
    from embedtrain.train.run_folder import RunFolder
    from embedtrain.train.state import read_run_state

    folder = RunFolder(run_path)
    found = find_checkpoints(folder.checkpoints_path)
    if not found:
        raise UserError(f"there is no complete checkpoint in {run_path!r}")
    newest = found[-1]
    with CheckpointReader(newest.path) as reader:
        state, manifest = read_run_state(reader.manifest, newest.path), reader.manifest
        saved_by = counted(manifest.world_size, "rank")
        tell(f"run          {folder.path}")
        tell(f"checkpoints  of step {', '.join(f'{info.step:,}' for info in found)}")
        tell(f"newest       {newest.path}, saved {manifest.created} by {saved_by}")
        _print_state(state)
        tell("tensors")
        for name, info in sorted(reader.tensors.items()):
            shape = " x ".join(f"{size:,}" for size in info.shape)
            dtype, pieces = str(info.dtype).removeprefix("torch."), counted(len(info.pieces), "piece")
            tell(f"  {name:<24} {dtype:<9} {shape}, in {pieces}")
    tell("configuration")
    for line in (folder.read_config() or "").removesuffix("\n").split("\n"):
        tell(f"  {line}")
    if verify:
        _verify([info.path for info in found])


def _print_state(state: RunState) -> None:
    train, optimizer = state.train, state.optimizer
    tell(f"step         {train.step:,}")
    tell(f"epoch        {train.epoch:,}, {counted(train.step_in_epoch, 'step')} into it")
    tell(f"examples     {train.examples:,} in {train.seconds:,.0f} seconds of training")
    settings = ", ".join(f"{name} {value}" for name, value in optimizer.param_groups[0].items() if name != "params")
    tell(f"optimizer    {optimizer.name}: {settings}")
    for table, start in state.init_from.items():
        tell(f"init_from    {start.num_copied:,} of {start.num_rows:,} rows of {table}, of {start.path}")
    if state.grown_from is not None:
        tell(f"grown from   {state.grown_from.path}, step {state.grown_from.step:,}")
    if optimizer.num_skipped:
        tell(f"skipped      {counted(optimizer.num_skipped, 'step')} whose gradient was not finite")


def _verify(paths: Sequence[str]) -> None:
    """Checks every byte of every checkpoint, and says of each how it is, before any that is damaged is raised for."""
    from embedtrain.checkpoint import verify
    from embedtrain.checkpoint.chain import read_manifest
    from embedtrain.train.state import read_run_state

    known: set[str] = set()
    faults = []
    for path in paths:
        try:
            verify(path, known)
            read_run_state(read_manifest(path), path)
            tell(f"verified     {path}")
        except CorruptCheckpointError as error:
            tell(f"damaged      {path}")
            faults.append(str(error))
    if faults:
        raise CorruptCheckpointError("\n".join(faults))
