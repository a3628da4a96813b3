"""Sinks for the trackers Weights & Biases and MLflow, whose own environment variables name their servers."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Mapping
from typing import Any

from embedtrain.errors import UserError
from embedtrain.metrics.sinks import Guarded, Record, RunEnd, flat
from embedtrain.storage import base_name

_NOT_OF_MLFLOW = re.compile(r"[^\w\-. :/]", re.ASCII)
_ID_TAG = "embedtrain.run_id"
_MLFLOW_ENDS: dict[RunEnd, str] = {"finished": "FINISHED", "failed": "FAILED", "preempted": "KILLED"}
_PARAMS_AT_ONCE = 100
_MAX_PARAM = 500


def require_tracker(key: str, package: str) -> None:
    """Refuses a tracker whose package is not installed.

    Args:
        key: the setting that asks for the tracker.
        package: the package of the tracker.

    Raises:
        UserError: the package is not installed; the message names the setting.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{key} needs the package {package}: pip install 'embedtrain[{package}]'")


class WandbSink:
    """Sends the numbers of records to Weights & Biases, at their steps; values that are texts are left out.

    A resumed run continues its run in Weights & Biases.

    Args:
        project: name of the project.
        run_path: run folder; its last part becomes the name of the run.
        run_id: unique id of the run, because another run may later use the same folder.
        settings: settings of the run.
    """

    def __init__(self, project: str, run_path: str, run_id: str, settings: Mapping[str, Any]) -> None:
        import wandb

        def start() -> Any:
            return wandb.init(
                project=project,
                name=base_name(run_path),
                id=run_id,
                resume="allow",
                config=dict(settings),
                settings=wandb.Settings(console="off", silent=True),
            )

        self._run = Guarded("Weights & Biases", start, lambda run: run.finish(exit_code=1))

    def log(self, record: Record) -> None:
        """Sends the numbers of a record."""
        self._run.use(lambda run: run.log(_numbers(record), step=record["step"]))

    def flush(self) -> None:
        """Does nothing, because a background process of wandb sends the records."""

    def close(self, end: RunEnd) -> None:
        """Waits until all records are sent, and reports how the run ended."""

        def use(run: Any) -> None:
            if end == "preempted":
                run.mark_preempting()
            run.finish(exit_code=0 if end == "finished" else 1)

        self._run.use(use)


class MlflowSink:
    """Sends the numbers of records to MLflow, at their steps; values that are texts are left out.

    A resumed run continues its run in MLflow. MLflow does not allow `@` in names, so `recall@20` becomes
    `recall_at_20`.

    Args:
        experiment: name of the experiment.
        run_path: run folder; its last part becomes the name of the run.
        run_id: unique id of the run, because another run may later use the same folder.
        settings: settings of the run.
    """

    def __init__(self, experiment: str, run_path: str, run_id: str, settings: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        def start() -> tuple[Any, str]:
            client = MlflowClient()
            found = client.get_experiment_by_name(experiment)
            number = client.create_experiment(experiment) if found is None else found.experiment_id
            runs = client.search_runs([number], f"tags.`{_ID_TAG}` = '{run_id}'", max_results=1)
            if runs:
                client.update_run(runs[0].info.run_id, "RUNNING")
                return client, runs[0].info.run_id
            created = client.create_run(number, run_name=base_name(run_path), tags={_ID_TAG: run_id}).info.run_id
            _log_settings(client, created, settings)
            return client, created

        self._run = Guarded("MLflow", start, lambda run: run[0].set_terminated(run[1], "FAILED"))

    def log(self, record: Record) -> None:
        """Sends the numbers of a record."""
        from mlflow.entities import Metric

        now, step = round(1000 * time.time()), int(record["step"])
        metrics = [Metric(_name(name), float(value), now, step) for name, value in _numbers(record).items()]
        self._run.use(lambda run: run[0].log_batch(run[1], metrics=metrics))

    def flush(self) -> None:
        """Does nothing, because each record is sent at once."""

    def close(self, end: RunEnd) -> None:
        """Reports how the run ended."""
        self._run.use(lambda run: run[0].set_terminated(run[1], _MLFLOW_ENDS[end]))


def _numbers(record: Record) -> dict[str, float | int]:
    return {name: value for name, value in record.items() if name != "step" and not isinstance(value, str)}


def _name(name: str) -> str:
    return _NOT_OF_MLFLOW.sub("_", name.replace("@", "_at_"))


def _log_settings(client: Any, run_id: str, settings: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(_name(name), str(value)[:_MAX_PARAM]) for name, value in flat(settings)]
    for start in range(0, len(params), _PARAMS_AT_ONCE):
        client.log_batch(run_id, params=params[start : start + _PARAMS_AT_ONCE])
