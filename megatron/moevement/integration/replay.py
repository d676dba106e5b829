"""Runs an iteration again with frozen operators and recorded decisions (paper section 3.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron.moevement.integration.boundary import ReplayP2P
from megatron.moevement.integration.discovery import OwnedParameter
from megatron.moevement.integration.forward import run_forward_backward, share_loss, stage_loss
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.optimizer_setup import apply_update, skip_update
from megatron.moevement.operators.state import nothing
from megatron.moevement.types import IterationRecord


def replay_iteration(
    job: TrainingJob,
    record: IterationRecord,
    frozen: list[OwnedParameter],
    before_update: Callable[[], None] = nothing,
) -> float | None:
    """Runs iteration `record.iteration`; parameters of `frozen` get no weight gradient and no update.

    Learning rate, weight decay, gradient norm and the decision to skip come from the record. Returns the loss, which
    must be that of the record in every bit. Collective over the world, or over a segment that replays alone; then only
    ranks of the last stage know the loss, others return None.
    """
    job.step = record.iteration
    with _frozen(job, frozen), _without_overlap(job):
        alone = isinstance(job.communicator, ReplayP2P)
        local = run_forward_backward(job, record.iteration)
        loss = stage_loss(job, local) if alone else share_loss(job, local)
        before_update()
        if record.skipped:
            skip_update(job.optimizer)
        else:
            _update(job, record, frozen)
            job.scheduler.step(increment=job.config.samples_per_iteration)
    job.step = record.iteration + 1
    return loss


def _update(job: TrainingJob, record: IterationRecord, frozen: list[OwnedParameter]) -> None:
    for group, rate, decay in zip(job.optimizer.param_groups, record.learning_rates, record.weight_decays, strict=True):
        group["lr"], group["weight_decay"] = rate, decay
    # What it finds (overflow) was decided by the failed run, with gradients that frozen operators don't have here.
    job.optimizer.prepare_grads()
    for item in frozen:
        if item.master is not None:
            # AdamW leaves parameters without a gradient alone: no decay, no step.
            item.master.grad = None
    assert record.grad_norm is not None
    apply_update(job.optimizer, record.grad_norm)
    job.share_weights()
    # The next replay runs without the hooks that would gather them.
    job.gather_parameters()


@contextlib.contextmanager
def _frozen(job: TrainingJob, frozen: list[OwnedParameter]) -> Iterator[None]:
    """Takes gradients from the frozen parameters, and keeps the stage's first activation in the graph.

    Without the latter a rank whose first layers are all frozen would skip backward collectives that others run.
    """
    hooks = []
    for item in frozen:
        item.parameter.requires_grad_(False)
    for chunk in job.chunks:
        for module in (m.embedding for m in chunk.modules() if getattr(m, "embedding", None) is not None):
            hooks.append(module.register_forward_hook(_keep_in_graph))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for item in frozen:
            item.parameter.requires_grad_(True)


def _keep_in_graph(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output if output.requires_grad else output.requires_grad_(True)


@contextlib.contextmanager
def _without_overlap(job: TrainingJob) -> Iterator[None]:
    """Frozen parameters never report their gradient ready, so overlapped reduction would wait for them."""
    if not job.config.overlap_grad_reduce:
        yield
        return
    gather = job.config.overlap_param_gather
    for chunk in job.chunks:
        if gather:
            chunk.disable_forward_pre_hook(param_sync=False)
        chunk.ddp_config.overlap_grad_reduce = False
        chunk.ddp_config.overlap_param_gather = False
    try:
        yield
    finally:
        for chunk in job.chunks:
            chunk.ddp_config.overlap_grad_reduce = True
            chunk.ddp_config.overlap_param_gather = gather
            if gather:
                chunk.enable_forward_pre_hook()
