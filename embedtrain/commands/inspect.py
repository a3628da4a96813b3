"""`embedtrain inspect`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from embedtrain.commands.console import EXIT_DONE, command, run_argument, tell
from embedtrain.errors import CorruptCheckpointError, UserError


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

    folder = RunFolder(run_path)
    found = find_checkpoints(folder.checkpoints_path)
    if not found:
        raise UserError(f"there is no complete checkpoint in {run_path!r}")
    newest = found[-1]
    with CheckpointReader(newest.path) as reader:
        state, manifest = reader.state, reader.manifest
        train, optimizer = state["train"], state["optimizer"]
        tell(f"run          {folder.path}")
        tell(f"checkpoints  {', '.join(str(info.step) for info in found)}")
        tell(f"newest       {newest.path}, saved {manifest.created} by {manifest.world_size} ranks")
        tell(f"step         {train['step']:,}")
        tell(f"epoch        {train['epoch']}, {train['step_in_epoch']:,} steps into it")
        tell(f"examples     {train['examples']:,} in {train['seconds']:,.0f} seconds of training")
        tell("tensors")
        for name, info in sorted(reader.tensors.items()):
            shape = " x ".join(f"{size:,}" for size in info.shape)
            tell(f"  {name:<24} {str(info.dtype).removeprefix('torch.'):<9} {shape}, in {len(info.pieces)} pieces")
        settings = {k: v for k, v in optimizer["param_groups"][0].items() if k != "params"}
        tell(f"optimizer    {optimizer['name']}: {', '.join(f'{k} {v}' for k, v in settings.items())}")
        for table, start in state.get("init_from", {}).items():
            tell(f"init_from    {start['num_copied']:,} of {start['num_rows']:,} rows of {table}, of {start['path']}")
        if "grown_from" in state:
            tell(f"grown from   {state['grown_from']['path']}, step {state['grown_from']['step']:,}")
        if optimizer["num_skipped"]:
            tell(f"skipped      {optimizer['num_skipped']:,} steps whose gradient was not finite")
    tell("configuration")
    for line in (folder.read_config() or "").removesuffix("\n").split("\n"):
        tell(f"  {line}")
    if verify:
        _verify([info.path for info in found])


def _verify(paths: Sequence[str]) -> None:
    """Checks every byte of every checkpoint, and says of each how it is, before any that is damaged is raised for."""
    from embedtrain.checkpoint import verify

    known: set[str] = set()
    faults = []
    for path in paths:
        try:
            verify(path, known)
            tell(f"verified     {path}")
        except CorruptCheckpointError as error:
            tell(f"damaged      {path}")
            faults.append(str(error))
    if faults:
        raise CorruptCheckpointError("\n".join(faults))
