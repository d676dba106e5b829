from rich.console import Console

from megatron.moevement.report.compare import Comparison
from megatron.moevement.report.read_events import attempts
from megatron.moevement.report.summary import (
    Kill,
    recoveries,
    recovery_table,
    summary_json,
    verdict,
    verdict_table,
)
from tests.unit.report.synthetic import disturbed_run

KILLS = (Kill(1, 102.5, False), Kill(3, 119.5, False), Kill(0, 131.5, True))


def test_what_followed_each_kill() -> None:
    early, late, nested = recoveries(KILLS, attempts(disturbed_run()))
    assert (early.life, early.finished, early.source, early.replayed, early.run_again) == (0, 2, "scratch", 0, 2)
    assert early.back_seconds == 7.5
    assert early.conversion_seconds is None
    assert (late.life, late.finished, late.source, late.first_step) == (1, 9, "slots", 7)
    assert (late.replayed, late.back_seconds) == (1, None)
    assert (nested.life, nested.finished, nested.replayed, nested.run_again) == (2, 5, 3, 2)
    assert nested.conversion_seconds == 4.0
    assert nested.back_seconds == 12.5


def test_a_kill_without_a_later_life() -> None:
    (last,) = recoveries([Kill(2, 999.0, False)], attempts(disturbed_run()))
    assert (last.source, last.back_seconds) == ("", None)
    assert recoveries([Kill(2, 999.0, False)], [])[0].finished == 0


def test_tables_fit_into_eighty_columns() -> None:
    found = recoveries(KILLS, attempts(disturbed_run()))
    comparison = Comparison(650, (), 96, ())
    console = Console(width=80, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(recovery_table(found), verdict_table(comparison, found))
    text = capture.get()
    assert "iteration 10" in text
    assert "a recovery" in text
    assert "..." not in text
    assert "\u2026" not in text
    assert verdict(comparison).startswith("0 of 96 losses and gradient norms and 0 of 650 tensors")


def test_summary_for_programs() -> None:
    found = recoveries(KILLS, attempts(disturbed_run()))
    content = summary_json(Comparison(2, ("rank 0: a",), 1, ()), found)
    assert content["equal"] is False
    assert content["tensors_different"] == ["rank 0: a"]
    assert [kill["rank"] for kill in content["kills"]] == [1, 3, 0]
