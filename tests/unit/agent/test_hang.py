import dataclasses

import pytest

from megatron.moevement.agent.hang import Patience, hung
from megatron.moevement.agent.marks import Mark

WAITS = Mark(5, 9.0, 2, 10, False, "forward", True)
SILENT = dataclasses.replace(WAITS, waiting=False)
YOUNG = Mark(0, 1e6, 0, -1, False, "", False)


def judge(*marks: Mark, stood: float = 50.0) -> frozenset[int]:
    """Of ranks in generation 2; 8 s of silence and 100 s of a start are too long."""
    return hung(dict(enumerate(marks)), 2, Patience(8.0), dict.fromkeys(range(len(marks)), stood), 100.0)


def test_who_is_silent_while_others_wait_hangs() -> None:
    assert judge(WAITS, SILENT, WAITS) == {1}
    assert judge(SILENT, SILENT, WAITS) == {0, 1}


@pytest.mark.parametrize(
    "change", [{"age": 7.9}, {"beats": 0}, {"generation": 1}, {"resting": True}, {"waiting": True}]
)
def test_an_excuse(change: dict[str, float]) -> None:
    assert not judge(WAITS, dataclasses.replace(SILENT, **change), WAITS)


def test_somebody_at_work_excuses_everybody() -> None:
    assert not judge(WAITS, SILENT, dataclasses.replace(SILENT, age=0.1))
    assert not judge(WAITS, SILENT, YOUNG)


def test_nobody_waits() -> None:
    assert not judge(SILENT, SILENT)
    assert not judge()


@pytest.mark.parametrize("mark", [YOUNG, dataclasses.replace(SILENT, generation=1, age=200.0, resting=True)])
def test_who_makes_no_first_mark_hangs_too(mark: Mark) -> None:
    assert not judge(WAITS, mark, stood=99.0)
    assert judge(WAITS, mark, stood=101.0) == {1}
    assert judge(SILENT, mark, WAITS, stood=101.0) == {0, 1}
    # The agent itself was stopped meanwhile.
    assert not judge(WAITS, dataclasses.replace(mark, age=1.0), stood=101.0)


def test_silences_that_ended_by_themselves_make_patient() -> None:
    patience = Patience(8.0)
    for beats, age in ((1, 0.1), (1, 6.0), (2, 0.2)):
        patience.see({0: dataclasses.replace(SILENT, beats=beats, age=age), 1: WAITS})
    assert patience(SILENT) == 18.0
    assert patience(dataclasses.replace(SILENT, point="optimizer")) == 8.0, "elsewhere nothing takes long"


@pytest.mark.parametrize(
    "change", [{"waiting": True}, {"resting": True}, {"beats": 0}, {"generation": 1}, {"beats": 9}]
)
def test_silences_that_say_nothing(change: dict[str, float]) -> None:
    """Of who waited, asked to be left alone, was being built, or was another process or generation."""
    patience = Patience(8.0)
    patience.see({0: dataclasses.replace(SILENT, age=50.0, **change)})
    patience.see({0: dataclasses.replace(SILENT, beats=6, age=0.0)})
    assert patience(SILENT) == 8.0
