"""One rank of the overhead benchmark; started by overhead.py under torchrun. Rank 0 writes the raw figures as JSON."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.moevement import arguments
from megatron.moevement.config import SparseCheckpointConfig, add_sparse_checkpoint_flags, config_from_namespace
from megatron.moevement.errors import MoevementError
from megatron.moevement.training_config import TrainingConfig
from moevement_ext import HostRegion
from scripts.bench.slots import Snapshots

WARM_UP_ITERATIONS = 5
# Variants that take many times an iteration: few iterations of them, in one block after the others.
SLOW = ("dcp", "nvrx")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the measurement besides those of training."""
    add_sparse_checkpoint_flags(parser)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--variants", required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--block", type=int, required=True)
    parser.add_argument("--slow-iterations", type=int, required=True)


class Say:
    """Tells what is being done, and how long it took so far, on rank 0."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.rank = 0

    def __call__(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{time.perf_counter() - self._started:6.1f} s] {text}", file=sys.stderr, flush=True)


def measure(config: TrainingConfig, sparse: SparseCheckpointConfig, options: argparse.Namespace) -> None:
    """Trains in alternating blocks, then in one block for every slow variant. Collective over the ranks."""
    import torch

    from megatron.moevement.integration import distributed, job, train_loop

    say, names = Say(), options.variants.split(",")
    topology = distributed.start(config)
    say.rank = topology.rank
    training = job.build_job(config, topology)
    parameters = job.parameter_count(list(training.chunks))
    say(f"{parameters / 1e6:.0f} M parameters on this rank, {topology.device}")
    on_gpu = topology.device.type == "cuda"
    clock, record = Clock(on_gpu), Record(on_gpu)
    for chunk in training.chunks:
        chunk.train()

    def run(hook: Any, iterations: int) -> list[tuple[float, float]]:
        return clock.block(functools.partial(train_loop.train_iteration, training, hook), iterations)

    def run_block(hook: Any, iterations: int) -> list[tuple[float, float]]:
        # The same batches in every block: what the routers make of others takes longer or shorter.
        training.step = WARM_UP_ITERATIONS
        return run(hook, iterations)

    raw: dict[str, Any] = {
        "parameters": parameters,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "slots": {},
    }
    run(train_loop.NoHooks(), WARM_UP_ITERATIONS)
    say("warmed up")
    with contextlib.ExitStack() as stack:
        slots = _warm_slots(training, sparse, names, functools.partial(run, iterations=1), say, stack)
        hooks = _hooks(training, sparse, names, slots, on_gpu, stack)
        for name, hook in hooks.items():
            run(hook, 1)
            say(f"{name}: first iteration")
        for number in range(options.blocks):
            for name in list(hooks) if number % 2 == 0 else list(hooks)[::-1]:
                record.block(name, functools.partial(run_block, hooks[name]), options.block)
            say(f"block {number + 1} of {options.blocks}: {record.medians()}")
            raw["slots"] = slots.figures() if slots is not None else {}
            _write(options.raw, raw, record, clock)
    for name in (name for name in names if name in SLOW):
        if slots is not None:
            slots.manager.finish(durable=True)
            slots = None
        with contextlib.ExitStack() as stack:
            hook = _slow_hook(training, name, options.scratch, on_gpu, stack)
            record.block(name, functools.partial(run_block, hook), 1 + options.slow_iterations)
            say(f"{name}: {record.medians()}")
            _write(options.raw, raw, record, clock)
    if slots is not None:
        slots.drop()
    distributed.stop()


def _write(path: Path, raw: Mapping[str, Any], record: Record, clock: Clock) -> None:
    """Writes what is known so far: a later part may fail, or run out of time. Collective over the ranks."""
    import torch.distributed as dist

    busy = clock.over_all_ranks(record.processor_seconds())
    if dist.get_rank() == 0:
        whole = {**raw, "blocks": record.blocks, "processor_seconds": busy, "peak_device_mib": record.peak}
        new = path.with_suffix(".new")
        new.write_text(json.dumps(whole))
        new.replace(path)


class Record:
    """What the blocks of each variant took; the first iteration of a block isn't counted."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self.blocks: dict[str, list[list[float]]] = {}
        self._busy: dict[str, list[float]] = {}
        self.peak: dict[str, float] = {}

    def block(self, name: str, run: Callable[[int], list[tuple[float, float]]], iterations: int) -> None:
        """Runs a block of `iterations`."""
        import torch

        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = run(iterations)[1:]
        peak = torch.cuda.max_memory_allocated() / 2**20 if self._on_gpu else 0.0
        self.blocks.setdefault(name, []).append([wall for wall, _ in seconds])
        self._busy.setdefault(name, []).extend(busy for _, busy in seconds)
        self.peak[name] = max(self.peak.get(name, 0.0), peak)

    def medians(self) -> str:
        """For people, so far."""
        counted = {name: [s for block in blocks for s in block] for name, blocks in self.blocks.items()}
        return ", ".join(f"{name} {statistics.median(seconds):.4f} s" for name, seconds in counted.items())

    def processor_seconds(self) -> dict[str, list[float]]:
        """Of this process, by variant and counted iteration."""
        return self._busy


def _warm_slots(
    training: Any,
    sparse: SparseCheckpointConfig,
    names: list[str],
    iterate: Callable[[Any], object],
    say: Say,
    stack: contextlib.ExitStack,
) -> Snapshots | None:
    """The manager of all variants that take slots or copy what a slot holds, warmed up; None if there are none."""
    from scripts.bench.switches import Pauses

    if not any(name.startswith("sparse") for name in names):
        return None
    if any(":pauses" in name for name in names):
        stack.enter_context(Pauses.installed(training.chunks))
    slots = Snapshots(training, sparse)
    slots.warm_up(functools.partial(iterate, slots.hooks))
    assert slots.manager.plan is not None
    memory = slots.manager.plan.memory
    say(f"{memory.slots} slots of {memory.slot_bytes / 2**20:.1f} MiB, each written once")
    return slots


def _hooks(
    training: Any,
    sparse: SparseCheckpointConfig,
    names: list[str],
    slots: Snapshots | None,
    on_gpu: bool,
    stack: contextlib.ExitStack,
) -> dict[str, Any]:
    """The hooks of every variant that isn't slow."""
    import torch

    from megatron.moevement.integration import attach, train_loop
    from scripts.bench import baselines

    copied: dict[str, Any] = {}
    dense_too = bool({"dense-sync", "dense-side"} & set(names))
    if slots is not None and {"sparse-copy", "dense-sync", "dense-side"} & set(names):
        # Other variants copy into the slots' memory, which nobody recovers from.
        assert slots.manager.plan is not None
        schedule = slots.manager.plan.schedule
        region = stack.enter_context(HostRegion.open(str(slots.slots_path), writable=True))
        view = stack.enter_context(memoryview(region))
        if on_gpu:
            engine = attach.copy_engine(training.topology.device, sparse)
            stack.callback(engine.close)
            # No more than is needed: the manager has pinned the same memory, and pinned twice it counts twice.
            most = sum(operator.full_bytes for operator in slots.state.table) if dense_too else slots.most_bytes
            engine.register_host(region.address, min(region.nbytes, most))
        host = torch.frombuffer(view, dtype=torch.uint8)
        slot = functools.partial(_slot, slots.state, schedule, on_gpu)
        copied["sparse-copy"] = functools.partial(baselines.TorchCopies, slot, schedule.window, host, True)
        if dense_too:
            dense = list(baselines.dense_tensors(slots.state, on_gpu).values())
            copied["dense-sync"] = functools.partial(baselines.TorchCopies, lambda _: dense, 1, host, False)
            copied["dense-side"] = functools.partial(baselines.TorchCopies, lambda _: dense, 1, host, True)
    hooks: dict[str, Any] = {}
    for name in (name for name in names if name not in SLOW):
        if name == "off":
            hooks[name] = train_loop.NoHooks()
        elif name in copied:
            hooks[name] = copied[name]()
        elif slots is not None:
            hooks[name] = slots.switched(name)
    return hooks


def _slot(state: Any, schedule: Any, on_gpu: bool, index: int) -> Any:
    from scripts.bench import baselines

    return baselines.slot_tensors(state, schedule.spec(index), on_gpu)


def _slow_hook(training: Any, name: str, scratch: Path, on_gpu: bool, stack: contextlib.ExitStack) -> Any:
    """The hook of a slow variant; what it wrote goes when the stack is left."""
    from megatron.moevement.integration import attach
    from megatron.moevement.integration.operator_state import OperatorState
    from scripts.bench import baselines

    engine = attach.copy_engine(training.topology.device, SparseCheckpointConfig(enabled=True))
    stack.callback(engine.close)
    tensors = baselines.dense_tensors(OperatorState(training, engine), on_gpu)
    directory = scratch / name
    directory.mkdir(parents=True, exist_ok=True)
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    kind = baselines.DistributedCheckpoint if name == "dcp" else baselines.LocalCheckpoint
    hook = kind(tensors, directory)
    stack.callback(hook.close)
    return hook


class Clock:
    """Seconds of iterations, on the wall and of the processor (all threads of this process).

    On the CPU all ranks begin and end each iteration together. On a GPU iterations follow each other as they do in a
    training loop, which prepares the next one while the device still makes the optimizer step: an iteration lasts from
    the end of one such step on the device to the end of the next.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu

    def block(self, iterate: Callable[[], object], iterations: int) -> list[tuple[float, float]]:
        """Runs iterations; nothing of a block is left to the next one."""
        self._synchronize()
        marks = [self._mark()]
        for _ in range(iterations):
            iterate()
            if not self._on_gpu:
                self._synchronize()
            marks.append(self._mark())
        self._synchronize()
        pairs = itertools.pairwise(marks)
        return [(self._seconds(first, second), busy - before) for (first, before), (second, busy) in pairs]

    def _mark(self) -> tuple[Any, float]:
        """A point in time, on the device where there is one, and processor seconds."""
        import torch

        if not self._on_gpu:
            return time.perf_counter(), time.process_time()
        new_event: Any = torch.cuda.Event
        event = new_event(enable_timing=True)
        event.record()
        return event, time.process_time()

    def _seconds(self, first: Any, second: Any) -> float:
        return float(first.elapsed_time(second) / 1e3 if self._on_gpu else second - first)

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


def main() -> int:
    """Parses the flags and measures; exit status 2 for bad input."""
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
