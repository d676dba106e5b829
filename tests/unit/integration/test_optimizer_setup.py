"""Tests of optimizer, schedule and loss scale."""

from collections.abc import Callable

import pytest
import torch
from megatron.core.optimizer.grad_scaler import DynamicGradScaler

from megatron.moevement.integration import optimizer_setup
from megatron.moevement.integration.job import TrainingJob


class Inner:
    """Stands in for one inner optimizer: a loss scaler and whether it saw an overflow."""

    def __init__(self, overflow: bool) -> None:
        self.is_stub_optimizer = False
        self.found_inf = torch.tensor([float(overflow)])
        self.grad_scaler = DynamicGradScaler(
            initial_scale=1024.0, min_scale=1.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=4, hysteresis=1
        )
        self.grad_scaler.update(overflow)


class Chain:
    """Stands in for a chain of inner optimizers with ready gradients."""

    def __init__(self, *members: Inner) -> None:
        self.chained_optimizers = list(members)

    def prepare_grads(self) -> bool:
        return any(member.found_inf.item() > 0 for member in self.chained_optimizers)

    def get_grad_norm(self) -> float:
        return 2.5


@pytest.mark.parametrize("distributed", [False, True])
def test_inner_optimizers_hold_the_state(build: Callable[..., TrainingJob], distributed: bool) -> None:
    job = build(use_distributed_optimizer=distributed)
    inner = optimizer_setup.inner_optimizers(job.optimizer)
    assert len(inner) == 1  # experts get one of their own only where they are spread over ranks
    assert isinstance(inner[0].optimizer, torch.optim.AdamW)
    stub = Inner(False)
    stub.is_stub_optimizer = True
    assert optimizer_setup.inner_optimizers(Chain(stub)) == []


def test_the_schedule_counts_samples(build: Callable[..., TrainingJob]) -> None:
    job = build(lr=1.0, lr_warmup_iters=2, lr_decay_iters=4, train_iters=8)
    rates = []
    for _ in range(6):
        rates.append(optimizer_setup.learning_rate(job.optimizer))
        job.scheduler.step(increment=4)
    # Core computes them as sums and products of floats; the bits are the business of the tests of whole runs.
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0, 0.0])
    assert job.scheduler.num_steps == 24


@pytest.mark.parametrize("style", ["constant", "cosine", "inverse-square-root", "WSD"])
def test_every_decay_style_works(build: Callable[..., TrainingJob], style: str) -> None:
    job = build(lr_decay_style=style, lr_wsd_decay_iters=2 if style == "WSD" else None)
    job.scheduler.step(increment=8)
    assert 0.0 < optimizer_setup.learning_rate(job.optimizer) <= 1e-2


@pytest.mark.parametrize("first_overflows", [False, True])
def test_an_overflow_of_one_inner_optimizer_lowers_both_scales(first_overflows: bool) -> None:
    first, second = Inner(first_overflows), Inner(not first_overflows)
    assert first.grad_scaler.scale.item() != second.grad_scaler.scale.item()
    result = optimizer_setup.decide_update(Chain(first, second))
    assert result == optimizer_setup.UpdateResult(skipped=True, grad_norm=None)
    assert first.grad_scaler.scale.item() == second.grad_scaler.scale.item() == 512.0
    assert first.grad_scaler.state_dict() == second.grad_scaler.state_dict()
    assert first.grad_scaler.scale is not second.grad_scaler.scale


def test_clean_steps_leave_the_scales_alone() -> None:
    first, second = Inner(False), Inner(False)
    result = optimizer_setup.decide_update(Chain(first, second))
    assert result == optimizer_setup.UpdateResult(skipped=False, grad_norm=2.5)
    assert first.grad_scaler.scale.item() == second.grad_scaler.scale.item() == 1024.0


def test_bf16_has_no_loss_scale(build: Callable[..., TrainingJob]) -> None:
    assert optimizer_setup.loss_scale(build().optimizer) == 1.0
