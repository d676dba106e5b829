"""The optimizer, the learning-rate schedule, and the loss scale.

Steps of the schedule are counted in samples, as Megatron counts them: each successful iteration adds the global
batch size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging

from megatron.moevement.integration.model import compute_dtype
from megatron.moevement.training_config import TrainingConfig


@dataclasses.dataclass(frozen=True)
class UpdateResult:
    """What one optimizer step did; `grad_norm` is None where the update was skipped."""

    skipped: bool
    grad_norm: float | None


def build_optimizer(config: TrainingConfig, chunks: list[torch.nn.Module]) -> MegatronOptimizer:
    """AdamW over all chunks, one inner optimizer for expert and one for other parameters."""
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=config.bf16,
        fp16=config.fp16,
        params_dtype=compute_dtype(config),
        loss_scale=config.loss_scale,
        initial_loss_scale=config.initial_loss_scale,
        min_loss_scale=config.min_loss_scale,
        loss_scale_window=config.loss_scale_window,
        hysteresis=config.hysteresis,
        use_distributed_optimizer=config.use_distributed_optimizer,
        overlap_param_gather=config.overlap_param_gather,
    )
    return get_megatron_optimizer(optimizer_config, chunks)


def build_scheduler(config: TrainingConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """The schedule of learning rate and weight decay, at its first step."""
    samples = config.samples_per_iteration
    wsd = config.lr_wsd_decay_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters * samples,
        lr_decay_steps=(config.lr_decay_iters or config.train_iters) * samples,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.train_iters * samples,
        wd_incr_style="constant",
        wsd_decay_steps=None if wsd is None else wsd * samples,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
    )


def inner_optimizers(optimizer: Any) -> list[Any]:
    """The optimizers that hold state: of a chain its members, else the optimizer itself; empty ones left out."""
    members = getattr(optimizer, "chained_optimizers", [optimizer])
    return [member for member in members if not getattr(member, "is_stub_optimizer", False)]


def decide_update(optimizer: MegatronOptimizer) -> UpdateResult:
    """The collective part of an optimizer step: overflow, loss scales and gradient norm. Weights don't change.

    Afterwards `apply_update` needs no other rank, so that no failure of another rank leaves an update half done.
    """
    overflowed = optimizer.prepare_grads()
    _align_loss_scales(optimizer)
    if overflowed:
        return UpdateResult(skipped=True, grad_norm=None)
    norm = optimizer.get_grad_norm()
    return UpdateResult(skipped=False, grad_norm=None if norm is None else float(norm))


def apply_update(optimizer: MegatronOptimizer, grad_norm: float | None) -> None:
    """Clips with `grad_norm` and updates what this rank owns; other ranks aren't needed.

    Under the distributed optimizer the weights that other ranks own follow with `TrainingJob.share_weights`.
    """
    for member in inner_optimizers(optimizer):
        parameters = member.get_parameters()
        if parameters and member.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=member.config.clip_grad, total_norm=grad_norm)
    with _without_gathering(optimizer):
        optimizer.step_with_ready_grads()


def skip_update(optimizer: MegatronOptimizer) -> None:
    """What a skipped iteration does: loss scales go down as after an overflow, whoever saw it."""
    for member in inner_optimizers(optimizer):
        if getattr(member, "grad_scaler", None) is not None:
            member.grad_scaler.update(True)


@contextlib.contextmanager
def _without_gathering(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Leaves out the gathering of weights that the distributed optimizer does within its step.

    With several inner optimizers core gathers after each of them, when the next one has not updated yet.
    """
    chunks = {id(c): c for member in inner_optimizers(optimizer) for c in getattr(member, "model_chunks", ())}
    for chunk in chunks.values():
        chunk.start_param_sync = _gather_nothing
    try:
        yield
    finally:
        for chunk in chunks.values():
            del chunk.start_param_sync


def _gather_nothing(*_unused: Any, **_options: Any) -> None:
    pass


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The learning rate that the next step of parameters with the default schedule will use."""
    rate = get_canonical_lr_for_logging(optimizer.param_groups)
    return 0.0 if rate is None else float(rate)


def loss_scale(optimizer: MegatronOptimizer) -> float:
    """The factor that the loss is multiplied by before the backward pass; 1.0 under BF16."""
    return float(optimizer.get_loss_scale().item())


def _align_loss_scales(optimizer: MegatronOptimizer) -> None:
    """Give every inner optimizer the loss-scale state of the one that saw an overflow.

    Core keeps one dynamic scaler per inner optimizer and multiplies the loss by the first one's scale. An
    overflow in the experts' gradients alone would lower only the experts' scale, and from then on gradients would be
    divided by another scale than the loss was multiplied by.
    """
    members = [m for m in inner_optimizers(optimizer) if getattr(m, "grad_scaler", None) is not None]
    overflowed = [member for member in members if member.found_inf.item() > 0]
    if not overflowed:
        return
    state = overflowed[0].grad_scaler.state_dict()
    for member in members:
        if member is not overflowed[0]:
            copied = {name: v.clone() if torch.is_tensor(v) else v for name, v in state.items()}
            member.grad_scaler.load_state_dict(copied)
