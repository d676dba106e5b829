import pytest
from rich.console import Console

from megatron.moevement.report.compare import Comparison
from megatron.moevement.report.recoveries import Kill, local_recoveries, processes
from megatron.moevement.report.summary import (
    Outcome,
    outcomes,
    recovery_table,
    replaced_wrongly,
    summary_json,
    verdict,
    verdict_table,
)
from tests.unit.report.synthetic import local_run
from tests.unit.report.test_recoveries import KILLS


def _outcomes() -> list[Outcome]:
    return outcomes(local_run(), KILLS, local_recoveries(local_run(), KILLS))


def test_what_followed_each_kill() -> None:
    first, nested = _outcomes()
    assert (first.rank, first.finished, first.in_recovery, first.recovery) == (1, 5, False, 0)
    assert (first.source, first.scope, first.target) == ("local", (1,), 5)
    assert (first.replayed, first.replays, first.replayed_after, first.replay_seconds) == (1, 4, 4, None)
    # Differences of decimal times, which floats don't hold exactly.
    assert first.back_seconds == pytest.approx(nested.back_seconds + KILLS[1].time - KILLS[0].time)
    assert first.detect_seconds == pytest.approx(0.1)
    assert first.join_seconds == pytest.approx(1.8)
    assert (nested.rank, nested.in_recovery, nested.scope) == (2, True, (1, 2))
    assert (nested.replayed, nested.replays, nested.replayed_after) == (4, 4, 0)
    assert nested.replay_seconds == pytest.approx(3.9)
    assert nested.back_seconds == pytest.approx(5.0)


def test_who_has_not_noticed_a_further_kill_goes_on_replaying() -> None:
    one = next(e for e in local_run() if e["kind"] == "recovery_phase" and e["phase"] == "convert" and e["done"])
    late = {**one, "time": KILLS[1].time + 0.01, "iteration": one["iteration"] + 1}
    events = sorted([*local_run(), late], key=lambda event: float(event["time"]))
    first, nested = outcomes(events, KILLS, local_recoveries(events, KILLS))
    assert (first.replayed, first.replayed_after, nested.replayed) == (2, 4, 4)


def test_a_kill_without_a_recovery() -> None:
    late = Kill(2, 999.0, False)
    (last,) = outcomes(local_run(), [late], local_recoveries(local_run(), [late]))
    assert (last.finished, last.recovery, last.source, last.back_seconds) == (9, -1, "", None)
    assert outcomes([], [late], [])[0].finished == 0


def test_tables_fit_into_eighty_columns() -> None:
    found = [*_outcomes(), Outcome(3, 123, False, source="scratch"), Outcome(1, 5, False)]
    comparison = Comparison(650, (), 96, ())
    console = Console(width=80, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(recovery_table(found), verdict_table(comparison, found, processes(local_run())))
    text = capture.get()
    for words in ("iteration 6", "recovery", "stages 1, 2", "1 + 4", "4 of 4", "all, scratch", "killed"):
        assert words in text
    assert "..." not in text
    assert "\u2026" not in text
    assert verdict(comparison).startswith("0 of 96 losses and gradient norms and 0 of 650 tensors")


def test_only_killed_workers_may_be_replaced() -> None:
    pids = processes(local_run())
    assert replaced_wrongly(pids, KILLS) == ()
    assert replaced_wrongly(pids, KILLS[:1]) == (2,)
    assert replaced_wrongly({**pids, 0: [1000, 4000]}, KILLS) == (0,)


def test_summary_for_programs() -> None:
    content = summary_json(Comparison(2, ("rank 0: a",), 1, ()), _outcomes(), processes(local_run()))
    assert content["equal"] is False
    assert content["tensors_different"] == ["rank 0: a"]
    assert [kill["rank"] for kill in content["kills"]] == [1, 2]
    assert content["pids"]["1"] == [1001, 2001]
