"""The training state of one rank as operators: what `operators.state.TrainingState` asks for, on megatron.core."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron.moevement.errors import RecoveryError
from megatron.moevement.integration import dense_state, rng_state
from megatron.moevement.integration.discovery import OwnedParameter, find_owned, operator_table, replica_range
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.optimizer_setup import inner_optimizers
from megatron.moevement.integration.replay import replay_iteration
from megatron.moevement.integration.router_popularity import RouterPopularity
from megatron.moevement.operators.state import MemoryRange, RecordedOperator, nothing
from megatron.moevement.operators.table import OperatorTable
from megatron.moevement.types import BufferInfo, IterationRecord, OperatorKind, Presence, StartState
from moevement_ext import CopyEngine

_MOMENTS = ("exp_avg", "exp_avg_sq")


class OperatorState:
    """Implements `TrainingState` for a `TrainingJob`. Loads in place: every tensor keeps its storage.

    Args:
        job: model chunks, optimizer, schedule.
        engine: copies between slots and the device.
    """

    def __init__(self, job: TrainingJob, engine: CopyEngine) -> None:
        self._job = job
        self._engine = engine
        self._owned = find_owned(job.chunks, job.optimizer)
        self._table = operator_table(job.chunks, self._owned)
        self._popularity = RouterPopularity(job.chunks)
        # Of the newest slot; its buffers must live until they are copied.
        self._started: tuple[StartState, list[torch.Tensor]] | None = None
        self._remembered: tuple[StartState, list[torch.Tensor]] | None = None
        # AdamW makes its state in its first step; slots need it from Step 0.
        dense_state.create_moments(job)
        self._keep_biases_in_fp32()
        # Looked for once: a walk over all modules takes as long as the rest of an iteration's start.
        self._with_buffers = [
            (f"chunk{i}.{name}." if name else f"chunk{i}.", module)
            for i, chunk in enumerate(job.chunks)
            for name, module in chunk.named_modules()
            if module._buffers
        ]

    def _keep_biases_in_fp32(self) -> None:
        # Routers turn their expert bias to FP32 in their first forward pass; before it a slot would hold 16 bits of it.
        for module in (m for chunk in self._job.chunks for m in chunk.modules()):
            if hasattr(module, "_maintain_float32_expert_bias"):
                module._maintain_float32_expert_bias()

    @property
    def table(self) -> OperatorTable:
        """The operators of this rank."""
        return self._table

    # ------------------------------------------------------------------------------------------------- capture

    def pieces(self, operator: str, presence: Presence) -> Sequence[MemoryRange]:
        """Device ranges of the operator, per slice master, exp_avg, exp_avg_sq if full, else the compute weight."""
        ranges: list[MemoryRange] = []
        for part in self._table[operator].slices:
            item = self._owned[part.parameter]
            tensors: list[tuple[torch.Tensor | None, int]]
            if presence is Presence.WEIGHTS_ONLY:
                tensors = [(item.parameter, part.start)]
            else:
                tensors = [(tensor, item.master_offset) for tensor in self._full_tensors(item)]
            for tensor, offset in tensors:
                size = tensor.element_size() if tensor is not None else 4
                address = tensor.data_ptr() + offset * size if tensor is not None and part.owned else 0
                ranges.append(MemoryRange(address, part.owned * size))
        return ranges

    def _full_tensors(self, item: OwnedParameter) -> list[torch.Tensor | None]:
        state = _adam_state(item)
        return [None, None, None] if state is None else [item.master, *(state[name] for name in _MOMENTS)]

    def adam_steps(self, operator: str) -> tuple[float, ...]:
        """Adam's step counter of every slice of the operator; 0 where this rank owns nothing."""
        states = [_adam_state(self._owned[part.parameter]) for part in self._table[operator].slices]
        return tuple(0.0 if state is None else float(state["step"]) for state in states)

    def start_state(self, step: int) -> tuple[StartState, Sequence[MemoryRange]]:
        """RNG, scheduler, scalers, data position; buffers are cloned, because an iteration changes them early."""
        state, clones = self._started = self._start_state(step)
        return state, _ranges(clones)

    def remember(self, step: int) -> None:
        """Keeps what an iteration changes besides operators, so that `rewind` can undo an iteration half run."""
        started = self._started
        self._remembered = started if started is not None and started[0].step == step else self._start_state(step)

    def rewind(self) -> bool:
        """Undoes an iteration that was interrupted before its update; False if none of `job.step` was begun."""
        if self._remembered is None or self._remembered[0].step != self._job.step:
            return False
        state, clones = self._remembered
        self._job.decided = None
        self.load_start_state(state, _ranges(clones))
        return True

    def _start_state(self, step: int) -> tuple[StartState, list[torch.Tensor]]:
        named = self._buffers()
        clones = [tensor.detach().clone().contiguous() for _, tensor in named]
        infos = tuple(
            BufferInfo(name, str(clone.dtype), tuple(clone.shape), clone.numel() * clone.element_size())
            for (name, _), clone in zip(named, clones, strict=True)
        )
        state = StartState(
            step=step,
            consumed_samples=self._job.samples_before(step),
            scheduler_samples=self._job.scheduler.num_steps,
            scalers=tuple(_scaler_state(member) for member in inner_optimizers(self._job.optimizer)),
            blobs=rng_state.capture(),
            buffers=infos,
        )
        return state, clones

    def _buffers(self) -> list[tuple[str, torch.Tensor]]:
        return [
            (prefix + name, buffer)
            for prefix, module in self._with_buffers
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def popularity(self) -> dict[str, int]:
        """Tokens routed to each expert operator of this rank since the last call. Collective over the stage."""
        counts = self._popularity.take()
        return {
            o.name: counts.get((o.layer, o.expert), 0)
            for o in self._table
            if o.kind is OperatorKind.EXPERT and o.layer is not None and o.expert is not None
        }

    def stream(self) -> int:
        """Handle of the current CUDA stream; 0 on the CPU."""
        if self._job.topology.device.type != "cuda":
            return 0
        return int(torch.cuda.current_stream().cuda_stream)

    def arrival(self) -> Callable[[], bool]:
        """Whether the device has done what it has been given by now."""
        if self._job.topology.device.type != "cuda":
            return _at_once
        event = torch.cuda.Event()
        event.record()
        return event.query

    # ------------------------------------------------------------------------------------------------- restore

    def load(self, operators: Sequence[RecordedOperator]) -> None:
        """Loads operators in place, completes them over the data-parallel ranks and derives 16-bit weights."""
        self._job.pristine = False
        for operator in operators:
            self._copy(operator.pieces, self.pieces(operator.name, operator.presence))
            if operator.presence is Presence.FULL:
                self._set_adam_steps(operator)
        full = self._items(o.name for o in operators if o.presence is Presence.FULL)
        light = self._items(o.name for o in operators if o.presence is Presence.WEIGHTS_ONLY)
        with torch.no_grad():
            gathered = [(t, i) for i in full if not i.sharded for t in self._full_tensors(i)]
            gathered += [(i.parameter, i) for i in light if not i.sharded]
            _complete_replicas(gathered)
            for item in full:
                _derive_weight(item)
        if any(item.sharded for item in self._owned.values()):
            for chunk in self._job.chunks:
                chunk.start_param_sync(force_sync=True)

    def _items(self, names: Iterable[str]) -> list[OwnedParameter]:
        return [self._owned[part.parameter] for name in names for part in self._table[name].slices]

    def _copy(self, sources: Sequence[MemoryRange], targets: Sequence[MemoryRange]) -> None:
        if [s.nbytes for s in sources] != [t.nbytes for t in targets]:
            raise RecoveryError("a slot's pieces don't have the sizes of the model's")
        self._engine.copy_now(
            np.array([s.address for s in sources], dtype=np.uint64),
            np.array([t.address for t in targets], dtype=np.uint64),
            np.array([t.nbytes for t in targets], dtype=np.uint64),
            stream=self.stream(),
        )

    def _set_adam_steps(self, operator: RecordedOperator) -> None:
        for part, step in zip(self._table[operator.name].slices, operator.adam_steps, strict=True):
            state = _adam_state(self._owned[part.parameter])
            if state is not None:
                state["step"].fill_(step)

    def load_start_state(self, state: StartState, buffers: Sequence[MemoryRange]) -> None:
        """Restores RNG, scheduler, scaler, data position and buffers, and drops what an iteration half counted."""
        job = self._job
        job.reset_temporary_state()
        self._keep_biases_in_fp32()
        named = dict(self._buffers())
        if set(named) != {info.name for info in state.buffers}:
            raise RecoveryError("the slot's module buffers are not those of the model")
        for info, source in zip(state.buffers, buffers, strict=True):
            buffer = named[info.name]
            if str(buffer.dtype) != info.dtype or tuple(buffer.shape) != info.shape:
                raise RecoveryError(f"{info.name}: {info.dtype}{info.shape} in the slot, {buffer.dtype} in the model")
            self._copy([source], [MemoryRange(buffer.data_ptr(), info.nbytes)])
        if state.consumed_samples != job.samples_before(state.step):
            raise RecoveryError("--global-batch-size: the slot was written at another position of the data")
        job.step = state.step
        job.scheduler.num_steps = state.scheduler_samples
        job.scheduler.step(increment=0)
        for member, scaler in zip(inner_optimizers(job.optimizer), state.scalers, strict=True):
            if scaler:
                member.grad_scaler.load_state_dict(
                    {
                        "scale": torch.tensor([scaler["scale"]], dtype=torch.float32, device=job.topology.device),
                        "growth_tracker": int(scaler["growth_tracker"]),
                        "hysteresis_tracker": int(scaler["hysteresis_tracker"]),
                    }
                )
        rng_state.restore(state.blobs)

    def replay(
        self, record: IterationRecord, frozen: frozenset[str], before_update: Callable[[], None] = nothing
    ) -> IterationRecord:
        """Runs the recorded iteration again; the returned record differs from it in the loss at most."""
        items = self._items(sorted(frozen))
        loss = replay_iteration(self._job, record, items, before_update)
        return IterationRecord(
            iteration=record.iteration,
            loss=loss,
            grad_norm=record.grad_norm,
            skipped=record.skipped,
            learning_rates=record.learning_rates,
            weight_decays=record.weight_decays,
            loss_scale=record.loss_scale,
            consumed_samples=self._job.samples_before(record.iteration),
        )

    def differing_weights(self, operators: Sequence[RecordedOperator]) -> tuple[str, ...]:
        """Names of the weights-only operators whose compute weights differ in any bit from the recorded ones."""
        differing = []
        for operator in operators:
            for part, source in zip(self._table[operator.name].slices, operator.pieces, strict=True):
                weight = self._owned[part.parameter].parameter.detach().view(-1)[part.start : part.end]
                recorded = torch.empty_like(weight)
                self._copy([source], [MemoryRange(recorded.data_ptr() if part.owned else 0, source.nbytes)])
                if not torch.equal(recorded.view(torch.uint8), weight.contiguous().view(torch.uint8)):
                    differing.append(operator.name)
                    break
        return tuple(differing)


def _at_once() -> bool:
    return True


def _ranges(tensors: Sequence[torch.Tensor]) -> list[MemoryRange]:
    return [MemoryRange(tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in tensors]


def _adam_state(item: OwnedParameter) -> dict[str, torch.Tensor] | None:
    """Moments and step of the parameter; None if this rank owns nothing of it."""
    if item.inner is None or item.master is None:
        return None
    state: dict[str, torch.Tensor] = item.inner.state[item.master]
    return state


def _derive_weight(item: OwnedParameter) -> None:
    """The compute weight of the owned range from its master, by the copy that the optimizer itself uses."""
    if item.master is None or item.master is item.parameter:
        return
    if item.sharded:
        item.parameter.data.view(-1)[item.start : item.end].copy_(item.master.view(-1))
    else:
        item.parameter.data.copy_(item.master)


def _complete_replicas(tensors: Sequence[tuple[torch.Tensor | None, OwnedParameter]]) -> None:
    """Gathers the parts that each data-parallel rank restored, so that every rank has whole tensors. Collective."""
    batches: dict[tuple[bool, str], list[tuple[torch.Tensor, dist.ProcessGroup]]] = {}
    for tensor, item in tensors:
        if tensor is not None and item.replicas is not None:
            expert = not getattr(item.parameter, "allreduce", True)
            batches.setdefault((expert, str(tensor.dtype)), []).append((tensor.detach().view(-1), item.replicas))
    # Sorted, so that all ranks enter the groups' collectives in one order.
    for _, batch in sorted(batches.items(), key=lambda entry: entry[0]):
        flats, group, dtype = [flat for flat, _ in batch], batch[0][1], batch[0][0].dtype
        replicas, rank = dist.get_world_size(group), dist.get_rank(group)
        if replicas == 1:
            continue
        ranges = [[replica_range(flat.numel(), r, replicas) for flat in flats] for r in range(replicas)]
        longest = max(sum(end - start for start, end in part) for part in ranges)
        mine = torch.zeros(longest, dtype=dtype, device=flats[0].device)
        own = torch.cat([flat[start:end] for flat, (start, end) in zip(flats, ranges[rank], strict=True)])
        mine[: own.numel()] = own
        parts = [torch.empty_like(mine) for _ in range(replicas)]
        dist.all_gather(parts, mine, group=group)
        for part, bounds in zip(parts, ranges, strict=True):
            offset = 0
            for flat, (start, end) in zip(flats, bounds, strict=True):
                flat[start:end].copy_(part[offset : offset + end - start])
                offset += end - start


def _scaler_state(member: object) -> dict[str, float]:
    scaler = getattr(member, "grad_scaler", None)
    if scaler is None:
        return {}
    state = scaler.state_dict()
    if "growth_tracker" not in state:
        return {}
    return {
        "scale": float(state["scale"].item()),
        "growth_tracker": float(state["growth_tracker"]),
        "hysteresis_tracker": float(state["hysteresis_tracker"]),
    }
