"""The slots of the overhead benchmark: one manager for all variants, and what its slots took."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.events import EventLog
from megatron.moevement.store.lock import lock_path


class Measurement:
    """Figures of slots by variant, from the events of this rank. A slot is reported an iteration late at most."""

    def __init__(self) -> None:
        self.by_variant: dict[str, dict[str, list[float]]] = {}
        self.variant = ""
        self.slot_bytes = self.failed_slots = 0
        self.calibration: dict[str, Any] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        """Takes one event."""
        values = self.by_variant.setdefault(self.variant, {}) if self.variant else {}
        if event["kind"] == "calibration":
            self.calibration = event
        elif event["kind"] == "iteration":
            values.setdefault("stall_seconds", []).append(event["stall_seconds"])
            self.slot_bytes = max(self.slot_bytes, event["slot_bytes"])
            self.failed_slots = event["failed_slots"]
        elif event["kind"] == "slot":
            for name in ("copy_seconds", "digest_seconds"):
                values.setdefault(name, []).append(event[name])


class Snapshots:
    """One manager and its hooks. Collective over the ranks."""

    def __init__(self, training: Any, config: SparseCheckpointConfig) -> None:
        from megatron.moevement import manager
        from megatron.moevement.integration import attach, train_loop
        from megatron.moevement.recovery.start import store_path
        from scripts.bench.switches import SwitchedDigests, SwitchedEngine, SwitchedPool

        events = EventLog(None, training.topology.rank)
        self._measured = Measurement()
        events.listen(self._measured)
        self._memory_before = memory_in_use(training.topology.device.type == "cuda")
        with (
            mock.patch.object(attach, "CopyEngine", SwitchedEngine),
            mock.patch.object(attach, "DeviceDigests", SwitchedDigests),
            mock.patch.object(manager, "DigestPool", SwitchedPool),
        ):
            self.manager, self.state = attach.build_manager(training, config, events)
        self.engine = SwitchedEngine.made[-1]
        self._on_gpu = training.topology.device.type == "cuda"
        self.slots_path = store_path(config.job_directory, training.topology.rank)
        self.manager.start(None)
        self.hooks = Consecutive(attach.SparseHooks(training, self.manager, train_loop.NoHooks()))

    def switched(self, name: str) -> Any:
        """The hooks of the variant `name`."""
        from scripts.bench.switches import Switched

        text = "digests=off" if name == "sparse-undigested" else name.partition(":")[2]
        return Measured(Switched(self.hooks, self.engine, text), self._measured, name)

    def warm_up(self, iterate: Callable[[], object]) -> None:
        """Goes on until the window is chosen and every slot of the ring has been written once."""
        while not self.manager.capturing:
            iterate()
        assert self.manager.plan is not None
        for _ in range(self.manager.plan.memory.slots):
            iterate()
        self._memory_taken = [
            now - before for now, before in zip(memory_in_use(self._on_gpu), self._memory_before, strict=True)
        ]
        self.hooks.begin_seconds.clear()

    @property
    def told_behind(self) -> int:
        """How many iterations lie between the present one and the newest slot that all ranks know they can load."""
        assert self.manager.retention is not None
        return self.hooks.count - self.manager.retention.loadable_everywhere

    @property
    def most_bytes(self) -> int:
        """Bytes of operators in the largest slot."""
        assert self.manager.plan is not None
        return max(self.manager.plan.slot_bytes)

    def drop(self) -> None:
        """Removes the slots and ends this process: to unpin tens of GiB would take longer than the measurement."""
        self.slots_path.unlink()
        lock_path(self.slots_path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.slots_path.parent.rmdir()
        os._exit(0)

    def figures(self) -> dict[str, Any]:
        """Of this rank's slots: by variant, seconds of every one and bytes; what all share."""
        assert self.manager.plan is not None
        measured = self.manager.plan.measured
        return {
            "by_variant": self._measured.by_variant,
            "begin_seconds": self.hooks.begin_seconds,
            "slot_bytes": self._measured.slot_bytes,
            "failed_slots": self._measured.failed_slots,
            "window": self.manager.plan.schedule.window,
            "memory_bytes": self.manager.plan.memory.total_bytes,
            "host_bytes_taken": self._memory_taken[0],
            "shared_bytes_taken": self._memory_taken[1],
            "device_bytes_taken": self._memory_taken[2],
            "calibration": self._measured.calibration,
            "planned_with": dataclasses.asdict(measured) if measured is not None else None,
        }


def memory_in_use(on_gpu: bool) -> tuple[int, int, int]:
    """Bytes of this process's own host memory, of its shared memory, and of the device's beside torch's allocator."""
    import torch

    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, shared = (int(status[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))
    if not on_gpu:
        return own, shared, 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return own, shared, total - free - torch.cuda.memory_reserved()


class Measured:
    """Hooks that tell the measurement whose slots come."""

    def __init__(self, inner: Any, measurement: Measurement, name: str) -> None:
        self._inner, self._measurement, self._name = inner, measurement, name

    def before_forward(self, iteration: int) -> None:
        """Begins the slot."""
        self._measurement.variant = self._name
        self._inner.before_forward(iteration)

    def before_optimizer_step(self, iteration: int) -> None:
        """The fence."""
        self._inner.before_optimizer_step(iteration)

    def after_optimizer_step(self, iteration: int, outcome: Any) -> None:
        """Hands over the record."""
        self._inner.after_optimizer_step(iteration, outcome)


class Consecutive:
    """Counts the manager's own iterations, so that its steps have no gaps while blocks without it run."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        # Of the iteration that began last.
        self.count = -1
        self.begin_seconds: list[float] = []

    def before_forward(self, _iteration: int) -> None:
        """Begins the next slot."""
        self.count += 1
        started = time.perf_counter()
        self._inner.before_forward(self.count)
        self.begin_seconds.append(time.perf_counter() - started)

    def before_optimizer_step(self, _iteration: int) -> None:
        """The fence."""
        self._inner.before_optimizer_step(self.count)

    def after_optimizer_step(self, _iteration: int, outcome: Any) -> None:
        """Hands over the record."""
        self._inner.after_optimizer_step(self.count, dataclasses.replace(outcome, iteration=self.count))
