"""What of a run's records is drawn."""

from __future__ import annotations

from embedtrain.report.curves import RunCurves, charts_of, without_partial


def test_a_run_that_has_logged_nothing_yet_has_no_curves() -> None:
    logged = RunCurves({}, frozenset())
    assert without_partial(logged) == {}
    assert not charts_of({"run": logged}).quality


def test_a_short_last_record_is_left_out() -> None:
    steps, values = [10, 20, 23], [3.0, 2.0, 9.0]
    found = without_partial(RunCurves({"loss": (steps, values)}, frozenset()))["loss"]
    assert [list(part) for part in found] == [[10, 20], [3.0, 2.0]]
