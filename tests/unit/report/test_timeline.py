import pytest

from megatron.moevement.report.timeline import Lane, window_timeline
from tests.unit.report.synthetic import GROUPS, disturbed_run, event, life, start


def test_the_newest_whole_window() -> None:
    timeline = window_timeline(disturbed_run())
    assert timeline is not None
    assert [slot.iteration for slot in timeline.slots] == [12, 13, 14, 15]
    assert timeline.groups == (
        "group 1: 3 experts",
        "group 2: 2 experts",
        "group 3: 1 expert, 2 routers",
        "group 4: 2 non-experts, embedding",
    )


@pytest.mark.parametrize("mode", ["rolling", "fixed"])
def test_coverage_of_both_modes(mode: str) -> None:
    plan = event("plan", 0.0, window=4, memory_bytes=1, groups=GROUPS, window_mode=mode)
    timeline = window_timeline([start(0.0), plan, *life(0, 4, 1.0)])
    assert timeline is not None
    for column, slot in enumerate(timeline.slots):
        captured = "absent" if mode == "fixed" else "weights_only"
        expected = [captured] * column + ["full"] + ["weights_only"] * (3 - column)
        assert list(slot.presence) == expected


def test_spans_of_an_iteration() -> None:
    timeline = window_timeline([start(0.0), *life(0, 4, 100.0)])
    assert timeline is not None
    first = {span.lane: (round(span.started, 4), round(span.ended, 4)) for span in timeline.spans[:5]}
    assert first == {
        Lane.COMPUTE: (100.0, 100.8),
        Lane.STALL: (100.8, 100.8125),
        Lane.UPDATE: (100.8125, 101.0),
        Lane.COPY: (100.05, 100.55),
        Lane.COMMIT: (101.05, 101.3),
    }
    assert timeline.groups == ("group 1", "group 2", "group 3", "group 4")


def test_times_that_the_events_lack_are_left_out() -> None:
    events = [start(0.0), *life(0, 4, 100.0)]
    for item in events:
        for key in ("fence_started_time", "copy_started_time", "copy_seconds"):
            item.pop(key, None)
    timeline = window_timeline(events)
    assert timeline is not None
    assert {span.lane for span in timeline.spans} == {Lane.ITERATION, Lane.COMMIT}


def test_no_window_is_none() -> None:
    assert window_timeline([start(0.0), *life(0, 3, 100.0)]) is None
    uncommitted = [e for e in life(0, 4, 100.0) if e["kind"] != "slot" or e["step"] != 2]
    assert window_timeline([start(0.0), *uncommitted]) is None
    assert window_timeline([]) is None


def test_commits_of_a_killed_life_are_not_taken_for_those_of_the_next() -> None:
    events = [start(0.0), *life(0, 4, 100.0), start(200.0), *life(0, 4, 200.0)]
    timeline = window_timeline(events)
    assert timeline is not None
    assert min(span.started for span in timeline.spans) == 200.0
