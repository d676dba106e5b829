"""Copies of boundary tensors to the transcript: at once on the CPU, by the copy engine on a GPU."""

from __future__ import annotations

import collections
import ctypes
from typing import Protocol

import numpy as np
import torch

from moevement_ext import CopyEngine, EngineError

# Snapshots have priority 0. Chunks that are in flight already go first.
LOG_PRIORITY = 4
MAX_OUTSTANDING_COPIES = 8
COPY_TIMEOUT_SECONDS = 120.0
# Several boundary tensors: a host that waits for the last copy but one can't launch ahead of the device.
OUTSTANDING_BYTES_LIMIT = 256 << 20


class LogCopier(Protocol):
    """Copies tensors to host memory."""

    def copy(self, tensor: torch.Tensor, address: int) -> None:
        """Starts to copy the bytes of `tensor` to `address`; later changes of the caller's reference do no harm.

        Raises:
            EngineError: the copy can't be made.
        """

    def drain(self) -> None:
        """Returns when every copy is complete; then no tensor is held any more.

        Raises:
            EngineError: a copy failed.
        """


def log_copier(engine: CopyEngine, device: torch.device) -> LogCopier:
    """The copier for tensors on `device`; `engine` is that of the snapshots."""
    return HostCopier() if device.type == "cpu" else EngineCopier(engine, OUTSTANDING_BYTES_LIMIT)


class HostCopier:
    """Copies tensors in host memory before it returns."""

    def copy(self, tensor: torch.Tensor, address: int) -> None:
        """Copies the bytes."""
        source = tensor.detach().contiguous()
        ctypes.memmove(address, source.data_ptr(), source.numel() * source.element_size())

    def drain(self) -> None:
        """Nothing is outstanding."""


class EngineCopier:
    """Copies tensors from a GPU with the copy engine, behind the work of the current stream.

    Every tensor is held until its copy is complete: its memory must not be used again before.

    Args:
        engine: shared with the snapshots.
        outstanding_bytes_limit: of tensors that are held; above it a copy waits for earlier ones. A larger tensor is
            held alone.
    """

    def __init__(self, engine: CopyEngine, outstanding_bytes_limit: int) -> None:
        self._engine, self._limit = engine, outstanding_bytes_limit
        self._outstanding: collections.deque[tuple[int, torch.Tensor, int]] = collections.deque()
        self._bytes = 0

    @property
    def outstanding_bytes(self) -> int:
        """Bytes of tensors that are held."""
        return self._bytes

    def copy(self, tensor: torch.Tensor, address: int) -> None:
        """Queues a copy, once there is room for it."""
        source = tensor.detach().contiguous()
        nbytes = source.numel() * source.element_size()
        # What is done is let go at once; a copy that failed raises here, as it would when it is waited for.
        while self._outstanding and (self._full(nbytes) or self._oldest_finished()):
            # Training waits for it.
            self._engine.hurry(self._outstanding[0][0])
            self._wait_for_oldest()
        start, end, length = (np.array([number], dtype=np.uint64) for number in (source.data_ptr(), address, nbytes))
        stream = torch.cuda.current_stream(source.device).cuda_stream if source.is_cuda else 0
        ticket = self._engine.submit(start, end, length, stream, "boundary transcript", LOG_PRIORITY)
        self._outstanding.append((ticket, source, nbytes))
        self._bytes += nbytes

    def _full(self, nbytes: int) -> bool:
        return self._bytes + nbytes > self._limit or len(self._outstanding) >= MAX_OUTSTANDING_COPIES

    def _oldest_finished(self) -> bool:
        return self._engine.state(self._outstanding[0][0]) not in ("queued", "running")

    def drain(self) -> None:
        """Waits for all copies, also where one of them fails."""
        problem: EngineError | None = None
        while self._outstanding:
            try:
                self._wait_for_oldest()
            except EngineError as error:
                problem = error
        if problem is not None:
            raise problem

    def _wait_for_oldest(self) -> None:
        ticket = self._outstanding[0][0]
        try:
            if not self._engine.wait(ticket, COPY_TIMEOUT_SECONDS):
                # Returns when nothing of it is in flight any more.
                self._engine.cancel(ticket)
                raise EngineError(f"a copy to the transcript took longer than {COPY_TIMEOUT_SECONDS:g} s")
        finally:
            self._release()

    def _release(self) -> None:
        self._bytes -= self._outstanding.popleft()[2]
