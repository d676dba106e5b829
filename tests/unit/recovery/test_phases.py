"""The phases of one rank: legal ways, and whether a clean Step is left wherever a failure strikes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.moevement.errors import RecoveryError
from megatron.moevement.recovery.decide import Decision, Position, SegmentPlan
from megatron.moevement.recovery.phases import DIRTY, NEXT, Phase, Standing, path
from megatron.moevement.types import Run

PLAN = SegmentPlan((1,), frozenset({1}), Run(4, 6), frozenset({0, 2}))
LOCAL = Decision("local", 8, frozenset({2, 3}), (PLAN,), None, {}, (), 6)
TO_AGREE = (Phase.JOIN, Phase.AGREE)


def at(phase: Phase, step: int | None = 5) -> Standing:
    """A rank that has come to the phase on a legal way."""
    ways = {
        Phase.LOAD: (),
        Phase.CONVERT: (Phase.LOAD,),
        Phase.CATCH_UP: (Phase.LOAD,),
        Phase.SERVE: (),
        Phase.ROLL_FORWARD: (),
        Phase.MEET: (),
    }
    standing = Standing(step, Phase.LEAVE)
    if phase is Phase.LEAVE:
        return standing
    for each in (*TO_AGREE, *ways.get(phase, ()), phase):
        if standing.phase is not phase:
            standing.enter(each)
    return standing


@pytest.mark.parametrize(
    ("decision", "rank", "expected"),
    [
        (LOCAL, 0, "serve meet"),
        (LOCAL, 1, "load convert catch_up meet"),
        (LOCAL, 2, "roll_forward serve meet"),
        (LOCAL, 3, "roll_forward meet"),
        (LOCAL, 4, "meet"),
        (replace(LOCAL, segments=(replace(PLAN, run=Run(6, 6)),)), 1, "load catch_up meet"),
        (replace(LOCAL, target=6), 1, "load convert meet"),
        (replace(LOCAL, target=6, segments=(replace(PLAN, run=Run(6, 6)),)), 1, "load meet"),
        (Decision("none", 8, frozenset(), (), None, {}, (), 6), 1, "meet"),
        (Decision("global", 6, frozenset(), (), Run(4, 6), {}, (), 6), 1, "load convert meet"),
        (Decision("global", 6, frozenset(), (), Run(6, 6), {}, (), 6), 1, "load meet"),
        (Decision("dense", 6, frozenset(), (), None, {}, (), -1), 1, "load meet"),
        (Decision("scratch", 0, frozenset(), (), None, {}, (), -1), 1, "load meet"),
    ],
)
def test_the_path_of_a_rank(decision: Decision, rank: int, expected: str) -> None:
    phases = path(decision, rank)
    assert " ".join(phases) == expected
    for before, after in zip((Phase.AGREE, *phases), (*phases, Phase.TRAIN), strict=True):
        assert after in NEXT[before]


def test_an_iteration() -> None:
    standing = Standing(5, Phase.TRAIN)
    standing.next_iteration()
    standing.gradients_final()
    assert (standing.step, standing.position) == (5, Position.FINAL)
    standing.updated()
    assert (standing.step, standing.position) == (6, Position.UPDATED)
    standing.next_iteration()
    assert (standing.step, standing.position) == (6, Position.RUNNING)


def test_a_replacement_is_of_no_step_until_it_has_replayed() -> None:
    standing = Standing(None, Phase.LEAVE)
    for phase in (*TO_AGREE, Phase.LOAD, Phase.CONVERT, Phase.CATCH_UP):
        standing.enter(phase)
    with pytest.raises(RecoveryError, match="meet without a clean Step"):
        standing.enter(Phase.MEET)
    standing.reached(8)
    standing.enter(Phase.MEET)
    standing.enter(Phase.TRAIN)
    assert standing.step == 8


def test_rolling_forward_is_one_step_and_keeps_nothing_final() -> None:
    standing = Standing(5, Phase.TRAIN)
    standing.gradients_final()
    standing.failed()
    assert (standing.step, standing.position) == (5, Position.FINAL)
    for phase in (*TO_AGREE, Phase.ROLL_FORWARD):
        standing.enter(phase)
    # A failure before the update leaves everything as it was, one after it the next Step.
    standing.updated()
    standing.failed()
    assert (standing.step, standing.position) == (6, Position.RUNNING)


def test_final_gradients_are_given_up_when_the_iteration_runs_again() -> None:
    standing = Standing(5, Phase.TRAIN)
    standing.gradients_final()
    standing.failed()
    for phase in (*TO_AGREE, Phase.MEET, Phase.TRAIN):
        standing.enter(phase)
    assert (standing.step, standing.position) == (5, Position.RUNNING)


@pytest.mark.parametrize("phase", Phase)
def test_a_failure_in_any_phase_leads_to_leave_and_only_some_cost_the_step(phase: Phase) -> None:
    standing = Standing(5, Phase.TRAIN) if phase is Phase.TRAIN else at(phase)
    assert standing.phase is phase
    standing.failed()
    assert standing.phase is Phase.LEAVE
    assert standing.step == (None if phase in DIRTY else 5)


@given(st.sampled_from(Phase), st.sampled_from(Phase))
def test_every_other_way_is_refused(phase: Phase, after: Phase) -> None:
    standing = Standing(5, Phase.TRAIN) if phase is Phase.TRAIN else at(phase)
    if standing.phase in DIRTY:
        standing.reached(5)
    if after in NEXT[phase]:
        standing.enter(after)
    else:
        with pytest.raises(RecoveryError, match="not in the protocol"):
            standing.enter(after)


@pytest.mark.parametrize("name", ["gradients_final", "updated", "next_iteration"])
def test_training_happens_in_training_only(name: str) -> None:
    with pytest.raises(RecoveryError, match="not in the protocol"):
        getattr(at(Phase.SERVE), name)()
    with pytest.raises(RecoveryError):
        Standing(5, Phase.TRAIN).updated()
    with pytest.raises(RecoveryError):
        at(Phase.MEET).reached(6)
