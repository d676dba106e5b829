import os
import time
from collections.abc import Iterator

import pytest

from megatron.moevement.agent.marks import NO_ITERATION, Marks


@pytest.fixture
def marks() -> Iterator[Marks]:
    marks = Marks.create(3)
    yield marks
    marks.close()
    os.close(marks.descriptor)


def test_a_mark_is_read_by_another_mapping(marks: Marks) -> None:
    marks.beat(1, 7, 2, 40, True, "forward")
    marks.look(1, True)
    other = Marks(marks.descriptor)
    mark = other.read(1)
    assert (mark.beats, mark.generation, mark.iteration, mark.resting, mark.point) == (7, 2, 40, True, "forward")
    assert mark.waiting
    assert mark.age >= 0
    other.close()


def test_places_are_apart_and_forgotten(marks: Marks) -> None:
    for place in range(3):
        marks.beat(place, place + 1, 0, place, False, "x" * 100)
        marks.look(place, True)
    assert [marks.read(place).beats for place in range(3)] == [1, 2, 3]
    assert marks.read(2).point == "x" * 40
    marks.clear(1)
    assert marks.read(1).beats == 0 and marks.read(1).iteration == NO_ITERATION
    assert [marks.read(place).beats for place in (0, 2)] == [1, 3]


def test_an_old_look_says_nothing(marks: Marks, monkeypatch: pytest.MonkeyPatch) -> None:
    marks.look(0, True)
    now = time.monotonic_ns()
    monkeypatch.setattr(time, "monotonic_ns", lambda: now + int(1e9 * (Marks.STALE_SECONDS + 1)))
    assert not marks.read(0).waiting


def test_ages_count_from_when_the_agent_woke(marks: Marks) -> None:
    marks.beat(0, 1, 0, 0, False, "forward")
    assert marks.read(0, since_ns=time.monotonic_ns() + 10**12).age < 0


def test_a_node_is_fenced_after_its_agents_silence(marks: Marks) -> None:
    assert not marks.fenced
    marks.renew(time.monotonic_ns() - 2 * 10**9, 1.0)
    assert marks.fenced
    marks.renew(time.monotonic_ns(), 1000.0)
    assert not marks.fenced
    marks.renew(0, 0.0)
    assert not marks.fenced
