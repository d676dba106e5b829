"""The training loop, read top to bottom, with the points where sparse checkpointing attaches."""

from __future__ import annotations

import dataclasses
import time
from typing import Protocol

from megatron.moevement.integration import optimizer_setup
from megatron.moevement.integration.forward import run_forward_backward, share_loss
from megatron.moevement.integration.job import TrainingJob


@dataclasses.dataclass(frozen=True)
class IterationOutcome:
    """What one iteration did; equal on all ranks but for `seconds`.

    Attributes:
        iteration: its number, from 0.
        loss: mean loss per token.
        grad_norm: L2 norm of all gradients before clipping, None where the update was skipped.
        skipped: whether an overflow kept the optimizer from updating.
        learning_rate: the rate that the update used (or would have used).
        loss_scale: the factor that the loss was multiplied by.
        samples: how many samples the iteration consumed.
        seconds: its duration on this rank.
    """

    iteration: int
    loss: float
    grad_norm: float | None
    skipped: bool
    learning_rate: float
    loss_scale: float
    samples: int
    seconds: float


class Hooks(Protocol):
    """What may act within an iteration. All ranks call all hooks in the same order."""

    def before_forward(self, iteration: int) -> None:
        """The state is that of `Step iteration`; nothing of the iteration has run."""

    def before_optimizer_step(self, iteration: int) -> None:
        """Gradients are final; weights and optimizer state are still those of `Step iteration`."""

    def after_optimizer_step(self, iteration: int, outcome: IterationOutcome) -> None:
        """The state is that of `Step iteration + 1`, learning rate included."""


class NoHooks:
    """Hooks that do nothing."""

    def before_forward(self, iteration: int) -> None:
        pass

    def before_optimizer_step(self, iteration: int) -> None:
        pass

    def after_optimizer_step(self, iteration: int, outcome: IterationOutcome) -> None:
        pass


def train(job: TrainingJob, hooks: Hooks) -> list[IterationOutcome]:
    """Train from `job.step` to the last iteration, or to the exit interval.

    Returns:
        the outcome of every iteration that ran here.
    """
    for chunk in job.chunks:
        chunk.train()
    history = []
    while job.step < job.config.train_iters:
        history.append(train_iteration(job, hooks))
        if job.config.exit_interval is not None and job.step % job.config.exit_interval == 0:
            break
    job.gather_parameters()
    return history


def train_iteration(job: TrainingJob, hooks: Hooks) -> IterationOutcome:
    """Run iteration `job.step` and move the state one step on."""
    iteration, started = job.step, time.perf_counter()
    hooks.before_forward(iteration)
    local_loss = run_forward_backward(job, iteration)
    loss = share_loss(job, local_loss)
    hooks.before_optimizer_step(iteration)
    learning_rate = optimizer_setup.learning_rate(job.optimizer)
    loss_scale = optimizer_setup.loss_scale(job.optimizer)
    result = optimizer_setup.update(job.optimizer)
    if not result.skipped:
        job.scheduler.step(increment=job.config.samples_per_iteration)
    job.step = iteration + 1
    outcome = IterationOutcome(
        iteration=iteration,
        loss=loss,
        grad_norm=result.grad_norm,
        skipped=result.skipped,
        learning_rate=learning_rate,
        loss_scale=loss_scale,
        samples=job.config.samples_per_iteration,
        seconds=time.perf_counter() - started,
    )
    hooks.after_optimizer_step(iteration, outcome)
    return outcome
