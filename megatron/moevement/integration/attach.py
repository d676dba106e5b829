"""Attaches sparse checkpointing to a training job: the manager, and the hooks that call it in every iteration."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import xxhash
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron.moevement.config import GIB, MIB, SparseCheckpointConfig
from megatron.moevement.errors import UnsupportedError
from megatron.moevement.events import EventLog
from megatron.moevement.integration import dense_state
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.operator_state import OperatorState
from megatron.moevement.integration.train_loop import Hooks, IterationOutcome
from megatron.moevement.manager import SparseCheckpointManager
from megatron.moevement.operators.state import full_pieces
from megatron.moevement.planning import Surroundings
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.snapshot import digest_check
from megatron.moevement.snapshot.bandwidth import Chunks
from megatron.moevement.training_config import TrainingConfig
from megatron.moevement.types import IterationRecord
from moevement_ext import CopyEngine, DeviceDigests, EngineError, build_info

# What slots must have been written with, in addition to what a dense checkpoint must: with another of these the
# iterations that a recovery replays would not be those that ran.
_REPLAY_FIELDS = (
    "seed",
    "split",
    # The order of the samples depends on how many there will be.
    "train_iters",
    "micro_batch_size",
    "hidden_dropout",
    "attention_dropout",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_dtype",
    "moe_router_load_balancing_type",
    "moe_router_bias_update_rate",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_token_dispatcher_type",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "clip_grad",
)
# Slots, and the boundary tensors of the transcript.
_QUEUED_COPIES_LIMIT = 16
# On a GPU the calibration chooses from these. With one chunk in flight the link is idle until the next one is started.
_CHUNK_MIB = (2, 4, 8, 16)
_CHUNKS_IN_FLIGHT = (2,)
# Small copies to the host that core's MoE layer waits for in a forward pass: the token counts, and how much is selected
# by each of the two masked selections of its permutation.
_AWAITED_BY_A_LAYER = 3
# Device memory for small pieces on their way, and the part of it that the device's digests may take instead.
_DEVICE_MEMORY_BYTES = 32 * MIB
_DIGEST_TABLE_BYTES = 2 * MIB


class SparseHooks:
    """Calls the manager at the points of an iteration, and the inner hooks after it."""

    def __init__(self, job: TrainingJob, manager: SparseCheckpointManager, inner: Hooks) -> None:
        self._job = job
        self._manager = manager
        self._inner = inner
        self._rates: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {}

    def before_forward(self, iteration: int) -> None:
        """Starts the capture of `Step iteration`."""
        self._manager.begin_iteration(iteration)
        self._inner.before_forward(iteration)

    def before_optimizer_step(self, iteration: int) -> None:
        """Fences the capture, and notes the rates that the update will use before the scheduler moves on."""
        groups = self._job.optimizer.param_groups
        rates = tuple(float(group["lr"]) for group in groups)
        decays = tuple(float(group["weight_decay"]) for group in groups)
        before = {i: kept for i, kept in self._rates.items() if i == iteration - 1}
        self._rates = {**before, iteration: (rates, decays)}
        self._inner.before_optimizer_step(iteration)
        self._manager.before_optimizer_step()

    def after_optimizer_step(self, iteration: int, outcome: IterationOutcome) -> None:
        """Hands over the iteration record."""
        self._manager.end_iteration(self.record_of(outcome))
        self._inner.after_optimizer_step(iteration, outcome)

    def record_of(self, outcome: IterationOutcome) -> IterationRecord:
        """The record of one of the last two iterations."""
        rates, decays = self._rates[outcome.iteration]
        return IterationRecord(
            iteration=outcome.iteration,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            skipped=outcome.skipped,
            learning_rates=rates,
            weight_decays=decays,
            loss_scale=outcome.loss_scale,
            consumed_samples=self._job.samples_before(outcome.iteration),
        )


def check_supported(config: TrainingConfig) -> None:
    """Refuses what a recovery couldn't restore exactly.

    Raises:
        UnsupportedError: names the flag and the remedy.
    """
    if not (config.bf16 or config.fp16):
        raise UnsupportedError("--sparse-ckpt needs --bf16 or --fp16: without master weights there is no sparse slot")


def copy_engine(device: torch.device, config: SparseCheckpointConfig) -> CopyEngine:
    """The engine of this rank's device with the limits of `config`.

    Raises:
        UnsupportedError: the extension has no engine for the device.
    """
    chunks = chunk_choices(device, config)
    try:
        return CopyEngine(
            "cuda" if device.type == "cuda" else "cpu",
            device.index or 0,
            chunk_bytes=chunks[0].nbytes,
            chunks_in_flight=chunks[0].in_flight,
            max_chunk_bytes=max(one.nbytes for one in chunks),
            max_queued_tickets=_QUEUED_COPIES_LIMIT,
            bytes_per_second_limit=config.bandwidth_gib_per_second * GIB,
            gather_bytes_limit=_DEVICE_MEMORY_BYTES - (_DIGEST_TABLE_BYTES if _digests_there(device, config) else 0),
        )
    except EngineError as error:
        raise UnsupportedError(
            f"--sparse-ckpt: no copy engine for {device}: {error}; build the extension where the CUDA toolkit is found"
        ) from error


def _digests_there(device: torch.device, config: SparseCheckpointConfig) -> bool:
    return device.type == "cuda" and config.digest == "on" and build_info().gather


def device_digests(
    device: torch.device, config: SparseCheckpointConfig, state: OperatorState, engine: CopyEngine
) -> DeviceDigests | None:
    """What digests slots on the device, with room for the largest; None where threads do it, or nobody.

    Raises:
        UnsupportedError: the device can't, or there are too many pieces for the device memory that may be used.
    """
    if not _digests_there(device, config):
        return None
    # No slot holds more than everything in full: weights-only has fewer pieces, and smaller ones.
    pieces = full_pieces(state)
    pieces += state.start_state(0)[1]
    room = {
        "ranges_limit": max(digest_check.RANGES, len(pieces)),
        "bytes_limit": max(digest_check.BYTES, sum(piece.nbytes for piece in pieces)),
    }
    try:
        digests = DeviceDigests("cuda", device.index or 0, **room)
        if digests.device_bytes > _DIGEST_TABLE_BYTES:
            raise EngineError(
                f"{len(pieces)} pieces of state need more than {_DIGEST_TABLE_BYTES / MIB:g} MiB for a table"
            )
        digest_check.check_device_digests(digests, engine, state)
    except EngineError as error:
        raise UnsupportedError(f"--sparse-ckpt-digest on: no digests by {device}: {error}; use host instead") from error
    return digests


def ranks_on_node() -> int:
    """Ranks whose files share a directory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(dist.get_world_size())))


def chunk_choices(device: torch.device, config: SparseCheckpointConfig) -> tuple[Chunks, ...]:
    """What the flags leave to choose from; on the CPU, where copies hold up nothing, a single one."""
    on_gpu = device.type == "cuda"
    sizes = (config.chunk_mib,) if config.chunk_mib else _CHUNK_MIB if on_gpu else (4,)
    counts = (config.chunks_in_flight,) if config.chunks_in_flight else _CHUNKS_IN_FLIGHT if on_gpu else (2,)
    return tuple(Chunks(size * MIB, count) for size in sizes for count in counts)


def awaited_copies(job: TrainingJob) -> int:
    """Small copies to the host that this rank's MoE layers wait for in an iteration, repeated passes included."""
    layers = sum(isinstance(module, MoELayer) for chunk in job.chunks for module in chunk.modules())
    passes = 2 if job.model_config.recompute_granularity else 1
    return _AWAITED_BY_A_LAYER * layers * passes * job.config.num_micro_batches


def build_manager(
    job: TrainingJob, config: SparseCheckpointConfig, events: EventLog, engine: CopyEngine | None = None
) -> tuple[SparseCheckpointManager, OperatorState]:
    """The manager of this job, and the operators that it sees. Collective over the world.

    Raises:
        UnsupportedError: the model, the optimizer or a parallel mode can't be checkpointed exactly.
    """
    check_supported(job.config)
    device = job.topology.device
    engine = copy_engine(device, config) if engine is None else engine
    state = OperatorState(job, engine)
    identity = dense_state.identity(job.config)
    identity.update({"--" + name.replace("_", "-"): getattr(job.config, name) for name in _REPLAY_FIELDS})
    identity["operators"] = xxhash.xxh3_64_hexdigest(state.table.to_json().encode())
    surroundings = Surroundings(
        identity=identity,
        ranks_on_node=ranks_on_node(),
        deterministic=job.config.deterministic_mode or device.type == "cpu",
        chunks=chunk_choices(device, config),
        awaited_copies=awaited_copies(job),
    )
    digests = device_digests(device, config, state, engine)
    agreement = Agreement(job.topology.control)
    manager = SparseCheckpointManager(config, state, agreement, engine, events, surroundings, digests)
    return manager, state
