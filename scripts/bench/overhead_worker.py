"""One rank of the overhead benchmark; started by overhead.py under torchrun. Rank 0 writes the raw figures as JSON."""

from __future__ import annotations

import argparse
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


class Measurement:
    """Figures of the sparse blocks, from the events of this rank."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {
            "stall_seconds": [],
            "copy_seconds": [],
            "digest_seconds": [],
            "begin_seconds": [],
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
    import torch.distributed as dist

    from megatron.moevement.integration import attach, distributed, job, train_loop

    topology = distributed.start(config)
    training = job.build_job(config, topology)
    events, figures = EventLog(None, topology.rank), Measurement()
    events.listen(figures)
    manager, _ = attach.build_manager(training, sparse, events)
    manager.start(None)
    sparse_hooks = Consecutive(attach.SparseHooks(training, manager, train_loop.NoHooks()))
    hooks: dict[str, train_loop.Hooks] = {"off": train_loop.NoHooks(), "sparse": sparse_hooks}
    on_gpu = topology.device.type == "cuda"

    def synchronize() -> None:
        if on_gpu:
            torch.cuda.synchronize()
        dist.barrier()

    for chunk in training.chunks:
        chunk.train()
    for name in ("off", "sparse"):
        for _ in range(WARM_UP_ITERATIONS):
            train_loop.train_iteration(training, hooks[name])
    while manager.plan is None:
        train_loop.train_iteration(training, hooks["sparse"])
    peak = dict.fromkeys(hooks, 0.0)
    blocks: dict[str, list[list[float]]] = {name: [] for name in hooks}
    for number in range(options.blocks):
        for name in ("off", "sparse") if number % 2 == 0 else ("sparse", "off"):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            iterate = functools.partial(train_loop.train_iteration, training, hooks[name])
            blocks[name].append(_block(iterate, synchronize, options.block))
            peak[name] = max(peak[name], torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0)
    figures.values["begin_seconds"] = sparse_hooks.begin_seconds
    if topology.rank == 0:
        raw = {
            "seconds": {name: [s for block in values for s in block] for name, values in blocks.items()},
            "blocks": blocks,
            **figures.values,
            "slot_bytes": figures.slot_bytes,
            "failed_slots": figures.failed_slots,
            "window": manager.plan.schedule.window,
            "parameters": job.parameter_count(list(training.chunks)),
            "device": torch.cuda.get_device_name() if on_gpu else "CPU",
            "torch": torch.__version__,
            "peak_device_mib": peak,
        }
        options.raw.write_text(json.dumps(raw))
    manager.finish(durable=True)
    distributed.stop()


def _block(iterate: Callable[[], object], synchronize: Callable[[], None], iterations: int) -> list[float]:
    seconds = []
    for _ in range(iterations):
        synchronize()
        started = time.perf_counter()
        iterate()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


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
