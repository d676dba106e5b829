"""What else takes snapshots in every iteration: dense and sparse copies by torch, torch's DCP, NVIDIA's NVRx.

Each is a set of training hooks. All copy state of the same job, the whole of what this rank owns (`dense`) or what the
sparse schedule gives to the iteration (`sparse_copy`).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.moevement.operators.state import MemoryRange, TrainingState
from megatron.moevement.types import Presence, SlotSpec


class _DeviceMemory:
    """Lets torch see device memory by address."""

    def __init__(self, piece: MemoryRange) -> None:
        self.__cuda_array_interface__ = {
            "shape": (piece.nbytes,),
            "typestr": "|u1",
            "data": (piece.address, False),
            "version": 3,
        }


def as_tensor(piece: MemoryRange, on_gpu: bool) -> torch.Tensor:
    """The bytes of a piece, uint8, without a copy. The memory must stay where it is."""
    if on_gpu:
        return torch.as_tensor(_DeviceMemory(piece), device="cuda")
    array = (ctypes.c_ubyte * piece.nbytes).from_address(piece.address)
    return torch.frombuffer(array, dtype=torch.uint8)


def dense_tensors(state: TrainingState, on_gpu: bool) -> dict[str, torch.Tensor]:
    """All that a rank owns: masters and moments, by operator and number."""
    return {
        f"{operator.name}/{number}": as_tensor(piece, on_gpu)
        for operator in state.table
        for number, piece in enumerate(state.pieces(operator.name, Presence.FULL))
        if piece.nbytes
    }


def slot_tensors(state: TrainingState, spec: SlotSpec, on_gpu: bool) -> list[torch.Tensor]:
    """What a sparse slot holds of operators."""
    pieces = [p for name in spec.full for p in state.pieces(name, Presence.FULL)]
    pieces += [p for name in spec.weights_only for p in state.pieces(name, Presence.WEIGHTS_ONLY)]
    return [as_tensor(piece, on_gpu) for piece in pieces if piece.nbytes]


class TorchCopies:
    """`copy_` tensor by tensor to pinned memory before the forward pass.

    Args:
        tensors: by iteration, what to copy; asked for once for each of `period` iterations in a row.
        period: after so many iterations the same tensors come again.
        host: pinned memory, uint8, large enough.
        overlapped: on a side stream, which the optimizer step waits for; else training waits for the copies.
    """

    def __init__(
        self, tensors: Callable[[int], Iterable[torch.Tensor]], period: int, host: torch.Tensor, overlapped: bool
    ) -> None:
        self._tensors = [list(tensors(index)) for index in range(period)]
        self._host = host
        self._overlapped = overlapped
        new_stream: Any = torch.cuda.Stream
        self._side = new_stream() if host.is_pinned() else None
        if self._side is None and any(tensor.is_cuda for tensor in self._tensors[0]):
            raise ValueError("the host memory isn't pinned: copies to it would be slower than anybody's")
        self._count = 0
        most = max(sum(t.numel() for t in batch) for batch in self._tensors)
        if most > host.numel():
            raise ValueError(f"{most} bytes to copy, room for {host.numel()}")

    def before_forward(self, _iteration: int) -> None:
        """Copies, or starts to."""
        batch = self._tensors[self._count % len(self._tensors)]
        self._count += 1
        if self._side is None:
            self._copy(batch)
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            self._copy(batch)
        if not self._overlapped:
            self._side.synchronize()

    def _copy(self, batch: Sequence[torch.Tensor]) -> None:
        offset = 0
        for tensor in batch:
            self._host[offset : offset + tensor.numel()].copy_(tensor, non_blocking=True)
            offset += tensor.numel()

    def before_optimizer_step(self, _iteration: int) -> None:
        """The fence."""
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)

    def after_optimizer_step(self, _iteration: int, _outcome: Any) -> None:
        """Nothing."""


class DistributedCheckpoint:
    """`torch.distributed.checkpoint.async_save` of everything in every iteration; a save waits for the one before."""

    def __init__(self, tensors: dict[str, torch.Tensor], directory: Path) -> None:
        self._tensors = tensors
        self._directory = directory
        self._group = dist.new_group(backend="gloo")
        self._under_way: Any = None

    def before_forward(self, iteration: int) -> None:
        """Waits for the save before and starts one."""
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.close()
        writer = FileSystemWriter(str(self._directory / "dcp"), overwrite=True)
        self._under_way = async_save(
            {"state": self._tensors, "iteration": iteration}, storage_writer=writer, process_group=self._group
        )

    def before_optimizer_step(self, _iteration: int) -> None:
        """Waits until the tensors are read, where async_save hasn't done so itself."""
        staged = getattr(self._under_way, "staging_completion", None)
        if staged is not None:
            staged.result()

    def after_optimizer_step(self, _iteration: int, _outcome: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Waits for the last save."""
        if self._under_way is not None:
            done = getattr(self._under_way, "upload_completion", self._under_way)
            done.result()
            self._under_way = None


class LocalCheckpoint:
    """NVRx's local checkpoint of everything in every iteration, asynchronous; a save waits for the one before."""

    def __init__(self, tensors: dict[str, torch.Tensor], directory: Path) -> None:
        from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncCallsQueue
        from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager

        logging.getLogger("nvidia_resiliency_ext").setLevel(logging.ERROR)
        self._tensors = tensors
        self._manager = LocalCheckpointManager(directory / "nvrx")
        self._queue = AsyncCallsQueue()
        self._count = 0

    def before_forward(self, _iteration: int) -> None:
        """Waits for the save before and starts one; it has read the tensors when it returns."""
        from nvidia_resiliency_ext.checkpointing.local.basic_state_dict import BasicTensorAwareStateDict

        self._queue.maybe_finalize_async_calls(blocking=True)
        self._count += 1
        state = BasicTensorAwareStateDict(dict(self._tensors))
        self._queue.schedule_async_request(self._manager.save(state, self._count, is_async=True))

    def before_optimizer_step(self, _iteration: int) -> None:
        """Nothing."""

    def after_optimizer_step(self, _iteration: int, _outcome: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Waits for the last save."""
        self._queue.maybe_finalize_async_calls(blocking=True)
        self._queue.close()
