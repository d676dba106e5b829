"""Everything that one training run consists of on this rank, in one value, and how to build it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.distributed.finalize_model_grads import reset_model_temporary_tensors
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.moevement.integration import data, model, optimizer_setup, tokenizer
from megatron.moevement.integration.distributed import Topology
from megatron.moevement.integration.gloo_on_gpu import HostStagedP2P
from megatron.moevement.training_config import TrainingConfig


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
        seconds: its duration on this rank, up to the update.
    """

    iteration: int
    loss: float
    grad_norm: float | None
    skipped: bool
    learning_rate: float
    loss_scale: float
    samples: int
    seconds: float


def _go_ahead() -> None:
    """Nothing to wait for."""


@dataclasses.dataclass
class TrainingJob:
    """The state of training on this rank and what is needed to change it.

    `Step t` is the state before iteration t. `step` is the only count of iterations; the position in the data follows
    from it, because every iteration consumes the same number of samples, skipped or not.

    Attributes:
        config: the training configuration.
        topology: device, ranks and process groups.
        model_config: core's configuration, shared by all chunks.
        chunks: this rank's model chunks, wrapped for data parallelism.
        optimizer: core's optimizer over all chunks.
        scheduler: learning rate and weight decay, counted in samples of successful iterations.
        batches: the data by position.
        communicator: moves tensors between stages; may be replaced between iterations.
        step: iterations that are part of the state.
        decided: the iteration whose outcome is settled on this rank while its update is not applied yet. With it, no
            other rank is needed to finish the iteration.
        agree_to_update: called between the two; returns when every rank has settled, so that a failure finds ranks at
            most one update apart and each of them able to follow.
        history: outcomes of the iterations that this process has run.
        end: Step at which this run ends; None until training has begun.
        pristine: whether operators are still as they were built: nothing has been loaded or updated.
    """

    config: TrainingConfig
    topology: Topology
    model_config: TransformerConfig
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    batches: data.BatchSource
    communicator: P2PCommunicator
    step: int = 0
    decided: IterationOutcome | None = None
    agree_to_update: Callable[[], None] = _go_ahead
    history: list[IterationOutcome] = dataclasses.field(default_factory=list)
    end: int | None = None
    pristine: bool = True

    @property
    def consumed_samples(self) -> int:
        """Samples that iterations before `step` consumed."""
        return self.samples_before(self.step)

    def samples_before(self, iteration: int) -> int:
        """Samples consumed before `iteration`."""
        return iteration * self.config.samples_per_iteration

    def reset_temporary_state(self) -> None:
        """Drop what an iteration has half counted: gradients, token counts of routers, logged auxiliary losses.

        Needed before an iteration is run again on a process that had begun it.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reset_model_temporary_tensors(self.model_config, self.chunks)
        if get_moe_layer_wise_logging_tracker():
            clear_aux_losses_tracker()

    def share_weights(self) -> None:
        """Under the distributed optimizer, gives every rank the weights that the others have updated; collective.

        Where gathering overlaps with the forward pass it is left to that.
        """
        if self.config.use_distributed_optimizer and not self.config.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync()

    def gather_parameters(self) -> None:
        """Make the 16-bit weights complete where their gathering is left to the next forward pass; collective.

        Call it before weights are read outside of a forward pass.
        """
        if self.config.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)


def build_job(config: TrainingConfig, topology: Topology) -> TrainingJob:
    """Build data, model, optimizer and schedule at Step 0; collective over all ranks.

    Raises:
        UsageError: where data or tokenizer cannot be used.
    """
    text_tokenizer = tokenizer.build_tokenizer(config.tokenizer_type, config.tokenizer_model, config.vocab_size)
    vocab_size = max(config.vocab_size or 0, text_tokenizer.vocab_size)
    padded = tokenizer.padded_vocab_size(
        vocab_size, config.make_vocab_size_divisible_by, config.tensor_model_parallel_size
    )
    model_config = model.transformer_config(config)
    chunks = model.build_chunks(config, model_config, padded, topology.device)
    optimizer = optimizer_setup.build_optimizer(config, chunks)
    _connect_schedule(config, model_config, chunks, optimizer)
    reads_data = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    batches = data.BatchSource(
        data.build_train_dataset(config, text_tokenizer, reads_data),
        data.BatchLayout(
            micro_batch_size=config.micro_batch_size,
            data_parallel_rank=topology.data_parallel_rank,
            data_parallel_size=config.data_parallel_size,
            num_micro_batches=config.num_micro_batches,
        ),
        padded,
        topology.device,
    )
    return TrainingJob(
        config=config,
        topology=topology,
        model_config=model_config,
        chunks=chunks,
        optimizer=optimizer,
        scheduler=optimizer_setup.build_scheduler(config, optimizer),
        batches=batches,
        communicator=build_communicator(config, topology, model_config),
    )


def build_communicator(config: TrainingConfig, topology: Topology, model_config: Any) -> P2PCommunicator:
    """Core's pipeline communicator, or one staged through host memory for CUDA tensors over gloo."""
    if config.backend == "gloo" and topology.device.type == "cuda":
        return HostStagedP2P(topology.groups.pp, model_config, topology.device)
    return P2PCommunicator(topology.groups.pp, model_config)


def _connect_schedule(
    config: TrainingConfig, model_config: Any, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer
) -> None:
    """Give the schedules the functions that they call around gradients."""
    model_config.finalize_model_grads_func = partial(finalize_model_grads)
    model_config.grad_scale_func = optimizer.scale_loss
    if config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        model_config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]


def parameter_count(chunks: list[torch.nn.Module]) -> int:
    """Elements of all parameters of this rank."""
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
