from typing import Any

from megatron.moevement.events import EventLog
from megatron.moevement.recovery.phase_log import PhaseLog
from megatron.moevement.recovery.phases import Phase


def _log() -> tuple[EventLog, PhaseLog, list[dict[str, Any]]]:
    events, told = EventLog(None, 3), list[dict[str, Any]]()
    phases = PhaseLog(events)
    events.listen(lambda event: told.append(event) if event["kind"] == "recovery_phase" else None)
    return events, phases, told


def _short(told: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    return [(event["phase"], event["done"], event["of"]) for event in told]


def _replay(events: EventLog, first: int, last: int) -> None:
    events.emit("recovery_started", first=first, last=last, replays=last - first)
    for step in range(first, last + 1):
        events.emit("conversion", step=step, replayed=step < last)
    events.emit("recovery_finished", step=last)


def test_a_replay_is_followed_through_the_managers_events() -> None:
    events, phases, told = _log()
    for phase in (Phase.LEAVE, Phase.JOIN, Phase.AGREE):
        phases.enter(phase)
    phases.load(6)
    _replay(events, 2, 4)
    for step in (4, 5):
        events.emit("conversion", step=step, replayed=True)
    phases.enter(Phase.MEET)
    assert _short(told) == [
        *(("leave", 0, 0), ("join", 0, 0), ("agree", 0, 0), ("load", 0, 0)),
        *(("convert", 0, 2), ("convert", 1, 2), ("convert", 2, 2)),
        *(("catch_up", 0, 2), ("catch_up", 1, 2), ("catch_up", 2, 2), ("meet", 0, 0)),
    ]
    assert [event["iteration"] for event in told if event["done"]] == [2, 3, 4, 5]
    assert phases.replayed == 4
    assert set(phases.seconds) == {event["phase"] for event in told}
    assert all(seconds >= 0 for seconds in phases.seconds.values())
    assert phases.total_seconds >= sum(phases.seconds.values()) - 1e-3


def test_a_replay_that_ends_at_its_last_slot_catches_nothing_up() -> None:
    events, phases, told = _log()
    phases.load(4)
    _replay(events, 2, 4)
    assert [event["phase"] for event in told][-1] == "convert"


def test_one_slot_needs_no_conversion() -> None:
    events, phases, told = _log()
    phases.load(5)
    _replay(events, 4, 4)
    assert _short(told) == [("load", 0, 0), ("catch_up", 0, 1)]


def test_serving_is_counted_but_replays_nothing() -> None:
    _, phases, told = _log()
    phases.enter(Phase.SERVE, 2)
    phases.advance(7)
    phases.advance(8)
    assert _short(told)[1:] == [("serve", 1, 2), ("serve", 2, 2)]
    assert phases.replayed == 0


def test_a_phase_begins_once() -> None:
    _, phases, told = _log()
    phases.enter(Phase.MEET)
    phases.enter(Phase.MEET)
    assert len(told) == 1


def test_an_interrupted_recovery_goes_on_counting_and_the_next_one_begins_anew() -> None:
    events, phases, _ = _log()
    phases.enter(Phase.LEAVE)
    phases.load(3)
    events.emit("recovery_started", first=1, last=3, replays=2)
    events.emit("conversion", step=1, replayed=True)
    phases.enter(Phase.LEAVE)
    phases.load(3)
    _replay(events, 1, 3)
    assert phases.replayed == 3
    phases.enter(Phase.TRAIN)
    phases.enter(Phase.LEAVE)
    assert (phases.replayed, set(phases.seconds)) == (0, {Phase.LEAVE})


def test_conversions_outside_of_a_recovery_are_no_phases() -> None:
    events, _, told = _log()
    _replay(events, 1, 3)
    assert told == []
