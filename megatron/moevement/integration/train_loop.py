"""The training loop, read top to bottom, with the points where sparse checkpointing attaches."""

from __future__ import annotations

import time
from typing import Protocol

from megatron.moevement import injection
from megatron.moevement.integration import optimizer_setup
from megatron.moevement.integration.forward import run_forward_backward, share_loss
from megatron.moevement.integration.job import IterationOutcome, TrainingJob

__all__ = ["Hooks", "IterationOutcome", "NoHooks", "apply_decided", "train", "train_iteration"]


class Hooks(Protocol):
    """What may act within an iteration. All ranks call all hooks in the same order."""

    def before_forward(self, iteration: int) -> None:
        """The state is that of `Step iteration`; nothing of the iteration has run."""

    def before_optimizer_step(self, iteration: int) -> None:
        """All that makes the gradients has been launched; weights and optimizer state are those of `Step iteration`."""

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

    Where training goes on after a failure it ends where it would have ended, also if it was there already.

    Returns:
        the outcome of every iteration that ran here.
    """
    if job.end is None:
        job.end = _end_of_run(job)
    for chunk in job.chunks:
        chunk.train()
    while job.step < job.end:
        train_iteration(job, hooks)
    job.gather_parameters()
    return job.history


def _end_of_run(job: TrainingJob) -> int:
    """Step at which a run ends that begins at `job.step`."""
    last, interval = job.config.train_iters, job.config.exit_interval
    return last if interval is None else min(last, (job.step // interval + 1) * interval)


def train_iteration(job: TrainingJob, hooks: Hooks) -> IterationOutcome:
    """Run iteration `job.step` and move the state one step on."""
    iteration, started = job.step, time.perf_counter()
    injection.reached("begin", iteration)
    hooks.before_forward(iteration)
    local_loss = run_forward_backward(job, iteration)
    injection.reached("before_optimizer", iteration)
    # Before the host waits for the loss: what the hooks do then costs nothing while the device has work.
    hooks.before_optimizer_step(iteration)
    loss = share_loss(job, local_loss)
    learning_rate = optimizer_setup.learning_rate(job.optimizer)
    loss_scale = optimizer_setup.loss_scale(job.optimizer)
    result = optimizer_setup.decide_update(job.optimizer)
    job.decided = IterationOutcome(
        iteration=iteration,
        loss=loss,
        grad_norm=result.grad_norm,
        skipped=result.skipped,
        learning_rate=learning_rate,
        loss_scale=loss_scale,
        samples=job.config.samples_per_iteration,
        seconds=time.perf_counter() - started,
    )
    injection.reached("decided", iteration)
    job.agree_to_update()
    injection.reached("optimizer", iteration)
    outcome = apply_decided(job)
    injection.reached("updated", iteration)
    if not outcome.skipped:
        job.share_weights()
    injection.reached("after_optimizer", iteration)
    hooks.after_optimizer_step(iteration, outcome)
    return outcome


def apply_decided(job: TrainingJob) -> IterationOutcome:
    """Applies the update that is decided and moves the state one step on; no other rank is needed."""
    outcome = job.decided
    assert outcome is not None and outcome.iteration == job.step
    job.pristine = False
    if not outcome.skipped:
        optimizer_setup.apply_update(job.optimizer, outcome.grad_norm)
        job.scheduler.step(increment=job.config.samples_per_iteration)
    job.step, job.decided = outcome.iteration + 1, None
    job.history.append(outcome)
    return outcome
