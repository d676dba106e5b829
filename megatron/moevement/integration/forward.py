"""Forward and backward passes of one iteration, and its loss."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker
from megatron.core.utils import get_attr_wrapped_model

from megatron.moevement import injection
from megatron.moevement.integration.boundary import transcribed
from megatron.moevement.integration.data import Batch
from megatron.moevement.integration.host_copies import to_host
from megatron.moevement.integration.job import TrainingJob

LOSS = "lm loss"


def run_forward_backward(job: TrainingJob, iteration: int) -> torch.Tensor | None:
    """Run all micro-batches of `iteration` forward and backward; gradients end up reduced in the buffers.

    Gradients are zeroed first, so that it may be called again for the same or another iteration, in a replay.
    Collective over the ranks that the communicator and the process groups join.

    Returns:
        float32 [2]: the sum of token losses and the number of tokens of this rank, on the last stage; else None.
    """
    for chunk in job.chunks:
        chunk.zero_grad_buffer()
    job.optimizer.zero_grad()
    if get_moe_layer_wise_logging_tracker():
        clear_aux_losses_tracker()
    injection.begin(iteration)
    position = job.samples_before(iteration)
    run_schedule = get_forward_backward_func()
    with transcribed(job.communicator, iteration):
        losses = run_schedule(
            forward_step_func=_forward_step,
            data_iterator=[job.batches.iterator(position) for _ in job.chunks],
            model=job.chunks,
            num_microbatches=job.config.num_micro_batches,
            seq_length=job.config.seq_length,
            micro_batch_size=job.config.micro_batch_size,
            forward_only=False,
            p2p_communicator=job.communicator,
            pg_collection=job.topology.groups,
        )
    if not losses:
        return None
    return torch.stack([micro_batch[LOSS] for micro_batch in losses]).sum(0)


def share_loss(job: TrainingJob, local_loss: torch.Tensor | None) -> float:
    """The mean loss per token of the iteration, on every rank; collective over the world.

    Args:
        job: the training job.
        local_loss: what `run_forward_backward` returned on this rank.
    """
    groups = job.topology.groups
    totals = torch.zeros(2, dtype=torch.float32, device=job.topology.device)
    if local_loss is not None:
        totals.copy_(local_loss)
        dist.all_reduce(totals, group=groups.dp_cp)
    last_stage = dist.get_global_rank(groups.pp, groups.pp.size() - 1)
    dist.broadcast(totals, src=last_stage, group=groups.pp)
    return _mean(totals)


def stage_loss(job: TrainingJob, local_loss: torch.Tensor | None) -> float | None:
    """The mean loss per token on the last stage, None on the others; collective over the last stage alone."""
    if local_loss is None:
        return None
    totals = local_loss.detach().float().clone()
    dist.all_reduce(totals, group=job.topology.groups.dp_cp)
    return _mean(totals)


def _mean(totals: torch.Tensor) -> float:
    loss_sum, tokens = to_host(totals).tolist()
    return float(loss_sum / max(tokens, 1.0))


def _forward_step(batches: Iterator[Batch], chunk: Any) -> tuple[torch.Tensor, Any]:
    """One micro-batch through one chunk; chunks in the middle of the pipeline read no data."""
    injection.reached("forward", part=id(chunk))
    first = get_attr_wrapped_model(chunk, "pre_process")
    last = get_attr_wrapped_model(chunk, "post_process")
    if not first and not last:
        output = chunk(None, None, None)
        injection.reached_in_backward(output, id(chunk))
        return output, None
    batch = next(batches)
    output = chunk(
        batch.tokens if first else None,
        batch.position_ids,
        batch.attention_mask,
        labels=batch.labels if last else None,
    )
    injection.reached_in_backward(output, id(chunk))
    return output, partial(_loss, batch.loss_mask)


def _loss(loss_mask: torch.Tensor, token_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Sum of token losses, number of tokens, and both as what is reported; the schedule divides."""
    mask = loss_mask.view(-1)
    loss = torch.sum(token_losses.float().view(-1) * mask)
    tokens = mask.sum()
    report = torch.stack([loss.detach(), tokens])
    return loss, tokens.to(torch.int), {LOSS: report}
