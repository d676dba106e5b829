"""One rank of the overhead benchmark; started by overhead.py under torchrun. Rank 0 writes the raw figures as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.moevement import arguments
from megatron.moevement.config import SparseCheckpointConfig, add_sparse_checkpoint_flags, config_from_namespace
from megatron.moevement.errors import MoevementError
from megatron.moevement.events import EventLog
from megatron.moevement.training_config import TrainingConfig

WARM_UP_ITERATIONS = 5


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the measurement besides those of training."""
    add_sparse_checkpoint_flags(parser)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--block", type=int, required=True)
    parser.add_argument("--dense", action="store_true")


class Measurement:
    """Figures of slots, from the events of this rank."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {
            "stall_seconds": [],
            "copy_seconds": [],
            "digest_seconds": [],
        }
        self.slot_bytes = 0
        self.failed_slots = 0

    def __call__(self, event: dict[str, Any]) -> None:
        """Takes one event."""
        if event["kind"] == "iteration":
            self.values["stall_seconds"].append(event["stall_seconds"])
            self.slot_bytes = max(self.slot_bytes, event["slot_bytes"])
            self.failed_slots = event["failed_slots"]
        elif event["kind"] == "slot":
            for name in ("copy_seconds", "digest_seconds"):
                self.values[name].append(event[name])


def measure(config: TrainingConfig, sparse: SparseCheckpointConfig, options: argparse.Namespace) -> None:
    """Trains in alternating blocks. Collective over the ranks."""
    import torch

    from megatron.moevement.integration import distributed, job, train_loop

    topology = distributed.start(config)
    training = job.build_job(config, topology)
    snapshots = {"sparse": Snapshots(training, sparse)}
    if options.dense:
        dense = dataclasses.replace(sparse, window=1, name=f"{sparse.name}-dense")
        snapshots["dense"] = Snapshots(training, dense)
    hooks: dict[str, train_loop.Hooks] = {"off": train_loop.NoHooks()}
    hooks.update({name: one.hooks for name, one in snapshots.items()})
    on_gpu = topology.device.type == "cuda"
    clock = Clock(on_gpu)

    for chunk in training.chunks:
        chunk.train()
    for hook in hooks.values():
        clock.block(functools.partial(train_loop.train_iteration, training, hook), WARM_UP_ITERATIONS)
    for one in snapshots.values():
        one.warm_up(functools.partial(train_loop.train_iteration, training, one.hooks))
    peak = dict.fromkeys(hooks, 0.0)
    blocks: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in hooks}
    for number in range(options.blocks):
        for name in list(hooks) if number % 2 == 0 else list(hooks)[::-1]:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            iterate = functools.partial(train_loop.train_iteration, training, hooks[name])
            blocks[name].append(clock.block(iterate, options.block)[1:])
            peak[name] = max(peak[name], torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0)
    own = {name: [busy for block in values for _, busy in block] for name, values in blocks.items()}
    processor_seconds = clock.over_all_ranks(own)
    if topology.rank == 0:
        raw = {
            "blocks": {name: [[wall for wall, _ in block] for block in values] for name, values in blocks.items()},
            "processor_seconds": processor_seconds,
            "slots": {name: one.figures() for name, one in snapshots.items()},
            "parameters": job.parameter_count(list(training.chunks)),
            "device": torch.cuda.get_device_name() if on_gpu else "CPU",
            "torch": torch.__version__,
            "peak_device_mib": peak,
        }
        options.raw.write_text(json.dumps(raw))
    for one in snapshots.values():
        one.manager.finish(durable=True)
    distributed.stop()


class Snapshots:
    """One manager and its hooks. Collective over the ranks."""

    def __init__(self, training: Any, config: SparseCheckpointConfig) -> None:
        from megatron.moevement.integration import attach, train_loop

        events = EventLog(None, training.topology.rank)
        self._measured = Measurement()
        events.listen(self._measured)
        self.manager, _ = attach.build_manager(training, config, events)
        self.manager.start(None)
        self.hooks = Consecutive(attach.SparseHooks(training, self.manager, train_loop.NoHooks()))

    def warm_up(self, iterate: Callable[[], object]) -> None:
        """Goes on until the window is chosen and every slot of the ring has been written once."""
        while self.manager.plan is None:
            iterate()
        for _ in range(self.manager.plan.memory.slots):
            iterate()

    def figures(self) -> dict[str, Any]:
        """Of this rank's slots: seconds of every one, bytes, window."""
        assert self.manager.plan is not None
        return {
            **self._measured.values,
            "begin_seconds": self.hooks.begin_seconds,
            "slot_bytes": self._measured.slot_bytes,
            "failed_slots": self._measured.failed_slots,
            "window": self.manager.plan.schedule.window,
            "memory_bytes": self.manager.plan.memory.total_bytes,
        }


class Clock:
    """Seconds of iterations, on the wall and of the processor (all threads of this process)."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu

    def block(self, iterate: Callable[[], object], iterations: int) -> list[tuple[float, float]]:
        """Runs iterations; all ranks begin and end each of them together."""
        seconds = []
        for _ in range(iterations):
            self._synchronize()
            started, busy = time.perf_counter(), time.process_time()
            iterate()
            self._synchronize()
            seconds.append((time.perf_counter() - started, time.process_time() - busy))
        return seconds

    def over_all_ranks(self, values: dict[str, list[float]]) -> dict[str, list[float]]:
        """Sums over the ranks, element by element."""
        import torch
        import torch.distributed as dist

        sums = {}
        for name, own in values.items():
            tensor = torch.tensor(own, dtype=torch.float64, device="cuda" if self._on_gpu else "cpu")
            dist.all_reduce(tensor)
            sums[name] = tensor.tolist()
        return sums

    def _synchronize(self) -> None:
        import torch
        import torch.distributed as dist

        if self._on_gpu:
            torch.cuda.synchronize()
        dist.barrier()


class Consecutive:
    """Counts the manager's own iterations, so that its steps have no gaps while blocks without it run."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._count = -1
        self.begin_seconds: list[float] = []

    def before_forward(self, _iteration: int) -> None:
        """Begins the next slot."""
        self._count += 1
        started = time.perf_counter()
        self._inner.before_forward(self._count)
        self.begin_seconds.append(time.perf_counter() - started)

    def before_optimizer_step(self, _iteration: int) -> None:
        """The fence."""
        self._inner.before_optimizer_step(self._count)

    def after_optimizer_step(self, _iteration: int, outcome: Any) -> None:
        """Hands over the record."""
        self._inner.after_optimizer_step(self._count, outcome)


def main() -> int:
    """Parse, choose the device, measure."""
    config, namespace = arguments.parse(extra=add_flags)
    from megatron.moevement.integration import cpu_backend, quiet

    quiet.quiet_core_warnings()
    if config.use_cpu:
        cpu_backend.hide_cuda()
        cpu_backend.install()
    try:
        measure(config, config_from_namespace(namespace), namespace)
    except MoevementError as error:
        arguments.refuse("overhead_worker.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
