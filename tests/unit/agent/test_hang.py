import dataclasses

import pytest

from megatron.moevement.agent.hang import hung
from megatron.moevement.agent.marks import Mark

WAITS = Mark(5, 9.0, 2, 10, False, "forward", True)
SILENT = dataclasses.replace(WAITS, waiting=False)


def test_who_is_silent_while_others_wait_hangs() -> None:
    assert hung({0: WAITS, 1: SILENT, 2: WAITS}, 2, 8.0) == {1}
    assert hung({0: SILENT, 1: SILENT, 2: WAITS}, 2, 8.0) == {0, 1}


@pytest.mark.parametrize(
    "change", [{"age": 7.9}, {"beats": 0}, {"generation": 1}, {"resting": True}, {"waiting": True}]
)
def test_an_excuse(change: dict[str, float]) -> None:
    assert not hung({0: WAITS, 1: dataclasses.replace(SILENT, **change), 2: WAITS}, 2, 8.0)


def test_somebody_at_work_excuses_everybody() -> None:
    assert not hung({0: WAITS, 1: SILENT, 2: dataclasses.replace(SILENT, age=0.1)}, 2, 8.0)


def test_nobody_waits() -> None:
    assert not hung({0: SILENT, 1: SILENT}, 2, 8.0)
    assert not hung({}, 2, 8.0)
