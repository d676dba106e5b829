"""Tests of forward and backward passes: repeatable, and the loss is the mean over tokens."""

import math
from collections.abc import Callable

import pytest
import torch

from megatron.moevement.integration.forward import run_forward_backward, share_loss
from megatron.moevement.integration.job import TrainingJob


def gradients(job: TrainingJob) -> torch.Tensor:
    chunk = job.chunks[0]
    return torch.cat([buffer.grad_data.clone() for buffer in chunk.buffers + chunk.expert_parallel_buffers])


def test_an_iteration_can_be_run_again(build: Callable[..., TrainingJob]) -> None:
    job = build(hidden_dropout=0.0, attention_dropout=0.0)
    first = run_forward_backward(job, 1)
    first_gradients = gradients(job)
    run_forward_backward(job, 0)
    assert not torch.equal(gradients(job), first_gradients)
    again = run_forward_backward(job, 1)
    assert first is not None
    assert again is not None
    assert torch.equal(first, again)
    assert torch.equal(gradients(job), first_gradients)
    assert first_gradients.any()


def test_the_loss_is_a_mean_over_tokens(build: Callable[..., TrainingJob]) -> None:
    job = build()
    local = run_forward_backward(job, 0)
    assert local is not None
    assert local.dtype == torch.float32
    assert local[1] == 4 * 16
    loss = share_loss(job, local)
    # The division there is in 32 bits, here in 64; and an untrained model is near the uniform distribution, no more.
    assert loss == pytest.approx(local[0].item() / 64)
    assert loss == pytest.approx(math.log(384), abs=0.5)
    assert share_loss(job, None) == 0.0
