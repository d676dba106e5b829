"""Replay: an iteration run again with its record gives the same bits; frozen operators stand still."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.operator_state import OperatorState
from moevement_ext import CopyEngine
from tests.unit.integration.saved import Saved, train_one
from tests.unit.integration.test_operator_state import digests

Build = Callable[..., TrainingJob]
LAYOUTS = {
    "float16": {},
    "distributed": {"use_distributed_optimizer": True},
    "overlap": {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1, "clip_grad": 0.1},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_replay_gives_the_same_bits(build: Build, layout: str) -> None:
    job = build(**LAYOUTS[layout])
    state = OperatorState(job, CopyEngine())
    train_one(job)
    saved = Saved(state, 1)
    record, after = train_one(job), Saved(state, 2)
    saved.restore(state)
    assert state.replay(record, frozenset()) == record and job.step == 2
    for key, operator in after.operators.items():
        assert Saved(state, 2).operators[key].adam_steps == operator.adam_steps
    found = Saved(state, 2)
    assert all(
        found.piece(name, presence, number) == after.piece(name, presence, number)
        for (name, presence), operator in after.operators.items()
        for number in range(len(operator.pieces))
    )


def test_frozen_operators_stand_still_and_the_others_do_not_notice(build: Build) -> None:
    job = build()
    state = OperatorState(job, CopyEngine())
    train_one(job)
    saved = Saved(state, 1)
    record, after = train_one(job), Saved(state, 2)
    saved.restore(state)
    frozen = frozenset({"layer000.expert001", "layer001.non_expert", "layer001.router"})
    assert state.replay(record, frozen).loss == record.loss
    found = Saved(state, 2)
    for (name, presence), operator in found.operators.items():
        wanted = saved if name in frozen else after
        assert operator.adam_steps == wanted.operators[name, presence].adam_steps
        for number in range(len(operator.pieces)):
            assert found.piece(name, presence, number) == wanted.piece(name, presence, number), name
    assert all(parameter.requires_grad for chunk in job.chunks for parameter in chunk.parameters())


def test_wrong_records_make_a_difference(build: Build) -> None:
    job = build()
    state = OperatorState(job, CopyEngine())
    saved = Saved(state, 0)
    record = train_one(job)
    wanted = digests(job)
    assert record.grad_norm is not None and record.grad_norm > job.config.clip_grad
    for wrong in (
        replace(record, learning_rates=tuple(rate * 1.001 for rate in record.learning_rates)),
        replace(record, grad_norm=record.grad_norm * 1.01),
        replace(record, skipped=True),
    ):
        saved.restore(state)
        state.replay(wrong, frozenset())
        found = digests(job)
        assert any(found[name] != wanted[name] for name in wanted if name.startswith("parameter/"))


def test_a_skipped_iteration_is_skipped_again(build: Build) -> None:
    job = build()
    state = OperatorState(job, CopyEngine())
    saved = Saved(state, 0)
    record = replace(train_one(job), skipped=True, grad_norm=None)
    saved.restore(state)
    state.replay(record, frozenset())
    found = Saved(state, 1)
    assert all(found.piece(*key) == saved.piece(*key) for key in saved.operators) and job.step == 1
