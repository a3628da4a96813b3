"""What the command line prints of a run: its newest checkpoint, and how good its vectors are."""

from __future__ import annotations

from collections.abc import Sequence

from embedtrain.checkpoint import CheckpointReader, find_checkpoints, verify
from embedtrain.data.readers.blocks import read_lines
from embedtrain.errors import CorruptCheckpointError, UserError
from embedtrain.export import Vectors, unit_rows
from embedtrain.metrics.analogies import evaluate_analogies
from embedtrain.metrics.word_lookup import require_vocab
from embedtrain.metrics.word_similarity import evaluate_similarity
from embedtrain.train.run_folder import RunFolder


def print_run(run_path: str, *, verify: bool) -> None:
    """Prints step, epoch, tables with shapes and dtypes, optimizer and configuration of a run."""
    folder = RunFolder(run_path)
    found = find_checkpoints(folder.checkpoints_path)
    if not found:
        raise UserError(f"there is no complete checkpoint in {run_path!r}")
    newest = found[-1]
    with CheckpointReader(newest.path) as reader:
        state, manifest = reader.state, reader.manifest
        train, optimizer = state["train"], state["optimizer"]
        print(f"run          {folder.path}")
        print(f"checkpoints  {', '.join(str(info.step) for info in found)}")
        print(f"newest       {newest.path}, saved {manifest.created} by {manifest.world_size} ranks")
        print(f"step         {train['step']:,}")
        print(f"epoch        {train['epoch']}, {train['step_in_epoch']:,} steps into it")
        print(f"examples     {train['examples']:,} in {train['seconds']:,.0f} seconds of training")
        print("tensors")
        for name, info in sorted(reader.tensors.items()):
            shape = " x ".join(f"{size:,}" for size in info.shape)
            print(f"  {name:<24} {str(info.dtype).removeprefix('torch.'):<9} {shape}, in {len(info.pieces)} pieces")
        settings = {k: v for k, v in optimizer["param_groups"][0].items() if k != "params"}
        print(f"optimizer    {optimizer['name']}: {', '.join(f'{k} {v}' for k, v in settings.items())}")
        for table, start in state.get("init_from", {}).items():
            print(f"init_from    {start['num_copied']:,} of {start['num_rows']:,} rows of {table}, of {start['path']}")
        if "grown_from" in state:
            print(f"grown from   {state['grown_from']['path']}, step {state['grown_from']['step']:,}")
        if optimizer["num_skipped"]:
            print(f"skipped      {optimizer['num_skipped']:,} steps whose gradient was not finite")
    print("configuration")
    for line in (folder.read_config() or "").splitlines():
        print(f"  {line}")
    if verify:
        _verify([info.path for info in found])


def print_evaluation(
    vectors: Vectors,
    analogies: Sequence[str],
    similarity: Sequence[str],
    *,
    restrict_vocab: int,
    case_insensitive: bool,
) -> None:
    """Prints accuracy by section for each file of analogies, and correlations for each file of word pairs."""
    require_vocab(restrict_vocab)
    restricted = vectors.first(restrict_vocab)
    unit = unit_rows(restricted.rows(0, restricted.num_rows))
    for path in analogies:
        report = evaluate_analogies(
            unit, restricted.words, read_lines(path), restrict_vocab, case_insensitive, source=path
        )
        print(f"{path}: accuracy by 3CosAdd")
        for section in (*report.sections, report.total):
            print(f"  {section.accuracy:7.2%}  {section.num_correct:>6,} of {section.num_questions:<6,} {section.name}")
        print(f"  {report.num_oov:,} questions left out: a word is not in the vocabulary")
    for path in similarity:
        pairs = evaluate_similarity(
            unit, restricted.words, read_lines(path), restrict_vocab, case_insensitive, source=path
        )
        print(
            f"{path}: Spearman {pairs.spearman:.3f}, Pearson {pairs.pearson:.3f} over {pairs.num_pairs:,} pairs; "
            f"{pairs.oov_ratio:.1%} left out, a word is not in the vocabulary"
        )


def _verify(paths: Sequence[str]) -> None:
    """Checks every byte of every checkpoint, and says of each how it is, before any that is damaged is raised for."""
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
