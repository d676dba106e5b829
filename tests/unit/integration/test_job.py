"""Tests of the training job: positions, and dropping half-counted state."""

from collections.abc import Callable

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

from megatron.moevement.integration import job as job_module
from megatron.moevement.integration.forward import run_forward_backward
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.state_digest import digest_state, training_state


def test_the_position_follows_from_the_step(build: Callable[..., TrainingJob]) -> None:
    job = build()
    assert job.consumed_samples == 0
    job.step = 3
    assert job.consumed_samples == job.samples_before(3) == 12


def test_half_an_iteration_leaves_no_trace(build: Callable[..., TrainingJob]) -> None:
    job = build(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="global_aux_loss",
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    run_forward_backward(job, 0)
    job.reset_temporary_state()
    before = digest_state(training_state(job))
    # Without the schedule's last call, token counts stay half counted.
    job.model_config.finalize_model_grads_func = None
    run_forward_backward(job, 0)
    half_done = digest_state(training_state(job))
    assert [name for name in before if before[name] != half_done[name]]
    job.reset_temporary_state()
    assert digest_state(training_state(job)) == before
    assert all(not entry["values"].any() for entry in get_moe_layer_wise_logging_tracker().values())
    assert not any(buffer.grad_data.any() for buffer in job.chunks[0].buffers)


def test_the_communicator_is_cores_own_on_the_cpu(build: Callable[..., TrainingJob]) -> None:
    assert type(build().communicator) is P2PCommunicator


def test_gathering_is_harmless_without_overlap(build: Callable[..., TrainingJob]) -> None:
    job = build(use_distributed_optimizer=True)
    before = digest_state(training_state(job))
    job.gather_parameters()
    assert digest_state(training_state(job)) == before


def test_parameters_are_counted() -> None:
    assert job_module.parameter_count([torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)]) == 11
