"""Restoring in place: tensors that core replaces are filled and put back, and each rank's own state comes back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron.moevement.errors import RecoveryError
from megatron.moevement.integration import dense_state, state_digest, train_loop
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.optimizer_setup import inner_optimizers

Build = Callable[..., TrainingJob]


def first_state(job: TrainingJob) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    member = inner_optimizers(job.optimizer)[0]
    master = member.param_groups[0]["params"][0]
    return master, member.optimizer.state[master]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_replaced_tensor_is_filled_and_put_back(build: Build, sharded: bool) -> None:
    job = build(use_distributed_optimizer=sharded)
    dense_state.create_moments(job)
    kept = dense_state.Kept(job)
    master, state = first_state(job)
    moment, master_address = state["exp_avg"], master.data_ptr()
    state["exp_avg"] = torch.full_like(moment, 3.0)
    master.data = torch.full_like(master, 5.0)
    inner_optimizers(job.optimizer)[0].param_groups[0]["step"] = 9
    kept.put_back()
    master, state = first_state(job)
    assert state["exp_avg"] is moment and bool((moment == 3.0).all())
    assert master.data_ptr() == master_address and bool((master == 5.0).all())
    assert "step" not in inner_optimizers(job.optimizer)[0].param_groups[0]


def test_a_tensor_of_another_shape_is_refused(build: Build) -> None:
    job = build()
    dense_state.create_moments(job)
    kept = dense_state.Kept(job)
    first_state(job)[1]["exp_avg"] = torch.zeros(1)
    with pytest.raises(RecoveryError, match="exp_avg: .* was loaded"):
        kept.put_back()


def test_moments_made_early_are_those_of_the_first_step(build: Build) -> None:
    digests = []
    for early in (False, True):
        job = build()
        if early:
            dense_state.create_moments(job)
        train_loop.train_iteration(job, train_loop.NoHooks())
        digests.append(state_digest.digest_state(state_digest.training_state(job)))
    assert digests[0] == digests[1]


def test_a_ranks_own_state_comes_back(build: Build) -> None:
    job = build(fp16=True, bf16=False, initial_loss_scale=1024.0)
    dense_state.create_moments(job)
    train_loop.train_iteration(job, train_loop.NoHooks())
    saved, step = dense_state.capture_rank_state(job), job.step
    before = state_digest.digest_state(state_digest.training_state(job))
    kept = {name: value for name, value in before.items() if name.startswith(("rng/", "buffer/", "scheduler/"))}
    kept |= {name: value for name, value in before.items() if name.endswith("/step") or "loss_scale" in name}
    train_loop.train_iteration(job, train_loop.NoHooks())
    torch.rand(3)
    for member in inner_optimizers(job.optimizer):
        member.grad_scaler.update(True)
    dense_state.restore_rank_state(job, saved)
    job.step = step
    after = state_digest.digest_state(state_digest.training_state(job))
    assert {name: after[name] for name in kept} == kept


def test_foreign_buffers_are_refused(build: Build) -> None:
    job = build()
    dense_state.create_moments(job)
    saved = dense_state.capture_rank_state(job)
    saved["buffers"] = {**saved["buffers"], "unknown": torch.zeros(1)}
    with pytest.raises(RecoveryError, match="module buffers"):
        dense_state.restore_rank_state(job, saved)


def test_the_identity_has_resolved_values_and_buckets_where_they_matter(build: Build) -> None:
    config = build().config
    found = dense_state.identity(config)
    assert found["--global-batch-size"] == 4 and found["--nproc-per-node times --nnodes"] == 1
    assert "--overlap-grad-reduce" not in found
    assert "--overlap-grad-reduce" in dense_state.identity(build(use_distributed_optimizer=True).config)


def test_the_adam_step_that_core_leaves_out_is_added() -> None:
    present = {"optimizer": {"state": {"common_step": torch.tensor(4.0)}}}
    absent: dict[str, dict[str, dict[str, torch.Tensor]]] = {"optimizer": {"state": {}}}
    sharded: dict[str, dict[str, list[int]]] = {"optimizer": {"param_groups": []}}
    dense_state.complete_steps({0: present, 1: absent, 2: sharded})
    dense_state.complete_steps(present)
    assert present["optimizer"]["state"]["common_step"] == 4.0
    assert absent["optimizer"]["state"]["common_step"] == 0.0
    assert sharded == {"optimizer": {"param_groups": []}}
