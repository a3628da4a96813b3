"""From a configuration to the objects of a run: the only place that knows both."""

from __future__ import annotations

from embedtrain.build.run import Run, build_run, check_run_folder

__all__ = ["Run", "build_run", "check_run_folder"]
