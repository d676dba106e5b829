from typing import Any

from megatron.moevement.report.narration import RECOVERY_KINDS, RecoveryNarration
from tests.unit.report.synthetic import disturbed_run, event, local_run, phase

REPLAYS = "back to step 1, 3 iterations to replay in the conversion and 1 to catch up"


def _told(events: list[dict[str, Any]], rank: int = 0) -> str:
    narration = RecoveryNarration()
    chosen = [e for e in events if e["rank"] == rank and e["kind"] in RECOVERY_KINDS]
    return "\n".join(line for e in chosen for line in narration.lines(e))


def test_a_rank_that_serves() -> None:
    assert _told(local_run()).splitlines() == [
        "recovery: another rank is lost in iteration 6; a new process is to take over",
        "recovery: rank 1 replaced; training goes on at step 5",
        f"  stage 1 alone: {REPLAYS}, served by ranks 0, 2",
        "  serving 1/4: served its transcript of iteration 2",
        "recovery: another rank is lost while serving; a new process is to take over",
        "recovery: ranks 1, 2 replaced; training goes on at step 5",
        f"  stages 1, 2 alone: {REPLAYS}, served by rank 0",
        "  serving 1/4: served its transcript of iteration 2",
        "  serving 2/4: served its transcript of iteration 3",
        "  serving 3/4: served its transcript of iteration 4",
        "  serving 4/4: served its transcript of iteration 5",
        "recovery: training goes on at step 5 after 7.7 s; 5 iterations replayed",
        "  seconds, of the slowest rank: leave 0.1, join 2.5, convert 3.5, catch_up 0.9, serve 3.6",
    ]


def test_a_process_that_took_over() -> None:
    text = _told(local_run(), rank=1)
    assert "recovery: process 2001 has taken over rank 1" in text
    assert "process 1001" not in text
    assert "catching up 1/1: replayed iteration 5" in text


def test_slots_of_a_conversion_and_where_they_came_from() -> None:
    text = _told(disturbed_run())
    assert "converting slots of steps 4 to 7 from own host memory, 3 iterations to replay" in text
    assert "  slot 2/4: 3 operators loaded, 6 still frozen, replayed iteration 6, 1.00 s" in text


def test_what_is_replayed_behind_a_conversion_is_told_once() -> None:
    narration = RecoveryNarration()
    done = {"step": 7, "loaded_full": 0, "frozen": 0, "replayed": True, "seconds": 1.0}
    assert narration.lines(event("conversion", 1.0, **done)) == []


def test_now_and_progress_for_a_display() -> None:
    narration = RecoveryNarration()
    assert (narration.now, narration.progress, narration.last) == ("", (0, 0), "none")
    narration.lines(phase("convert", 1.0, 0, 2, 3, iteration=4))
    assert (narration.now, narration.progress) == ("converting", (2, 3))
    for item in local_run():
        if item["kind"] in RECOVERY_KINDS and item["rank"] == 0:
            narration.lines(item)
    assert (narration.now, narration.last) == ("", "step 5, 5 replays, 7.7 s")


def _decision(**facts: Any) -> str:
    known = {"target": 7, "scope": [], "segments": [], "replaced": [], "roll_forward": [], "reasons": []}
    return "\n".join(RecoveryNarration().lines(event("decision", 1.0, **{**known, **facts})))


def test_other_decisions() -> None:
    text = _decision(source="global", replaced=[1], reasons=["stage 1: no window is complete on all its ranks"])
    assert "recovery: rank 1 replaced; all stages roll back, to slots" in text
    assert "  stage 1: no window is complete on all its ranks" in text
    assert "all stages roll back, to the beginning" in _decision(source="scratch")
    assert "nobody replaced; no stage has to roll back, training goes on at step 7" in _decision(source="none")
    assert "  ranks 0, 2 first: update of iteration 7" in _decision(source="local", roll_forward=[0, 2])
