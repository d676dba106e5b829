"""One rank of the overhead benchmark; started by overhead.py under torchrun. Rank 0 writes the raw figures as JSON."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.moevement import arguments
from megatron.moevement.config import SparseCheckpointConfig, add_sparse_checkpoint_flags, config_from_namespace
from megatron.moevement.errors import MoevementError
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.training_config import TrainingConfig
from scripts.bench.device_time import profiled
from scripts.bench.variants import (
    SLOW,
    Block,
    blocks_of,
    make_hooks,
    of_round,
    slow_hook,
    warm_slots,
    warm_transcripts,
)

WARM_UP_ITERATIONS = 5
# What is left of the time limit for a save of dcp or nvrx (1.65 B parameters: 33 s by dcp), for a profile of a variant,
# and for the end.
SAVE_SECONDS, PROFILE_SECONDS, END_SECONDS = 35.0, 8.0, 10.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the measurement besides those of training."""
    add_sparse_checkpoint_flags(parser)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--variants", required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--block", type=int, required=True)
    parser.add_argument("--slow-iterations", type=int, required=True)
    parser.add_argument("--profile", type=int, required=True)
    parser.add_argument("--baseline-every", type=int, required=True)
    parser.add_argument("--ends-at", type=float, default=float("inf"), help="seconds since 1970")


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
        "profile": {},
    }
    run(train_loop.NoHooks(), WARM_UP_ITERATIONS)
    say("warmed up")
    with contextlib.ExitStack() as stack:
        iterate = functools.partial(run, iterations=1)
        slots = warm_slots(training, sparse, names, iterate, say, stack)
        transcripts = warm_transcripts(training, sparse, names, slots, iterate, stack)
        hooks = make_hooks(training, sparse, names, slots, on_gpu, stack)
        blocks = blocks_of(hooks, slots, transcripts, run_block)
        for name, block in blocks.items():
            block(1)
            say(f"{name}: first iteration")
        profiled_blocks = len(blocks) if options.profile and on_gpu else 0
        saves = len(set(names) & set(SLOW)) * (1 + options.slow_iterations)
        after = END_SECONDS + SAVE_SECONDS * saves + PROFILE_SECONDS * profiled_blocks
        for number in rounds(options, after, Agreement(training.topology.control), say):
            record.round(of_round(blocks, number, options.baseline_every), options.block)
            say(f"block {number + 1} of {options.blocks}: {record.medians()}")
            raw["slots"] = slots.figures() if slots is not None else {}
            raw["transcript"] = transcripts.figures() if transcripts is not None else {}
            _write(options.raw, raw, record, clock)
        if profiled_blocks:
            for name, block in blocks.items():
                raw["profile"][name] = profiled(functools.partial(block, options.profile), options.profile)
            say("profiled")
            _write(options.raw, raw, record, clock)
    for name in (name for name in names if name in SLOW):
        if slots is not None:
            slots.manager.finish(durable=True)
            slots = None
        with contextlib.ExitStack() as stack:
            hook = slow_hook(training, name, options.scratch, on_gpu, stack)
            record.block(name, functools.partial(run_block, hook), 1 + options.slow_iterations)
            say(f"{name}: {record.medians()}")
            _write(options.raw, raw, record, clock)
    if slots is not None:
        slots.drop()
    distributed.stop()


def rounds(
    options: argparse.Namespace, after: float, agreement: Agreement, say: Callable[[str], None]
) -> Iterator[int]:
    """Numbers of the rounds that there is time for, at least one, with `after` seconds left then. Collective."""
    longest = 0.0
    for number in range(options.blocks):
        began = time.time()
        if number and agreement.maximum([began + longest])[0] > options.ends_at - after:
            say(f"no time for more than {number} rounds: {after:.0f} s are left for what comes after them")
            return
        yield number
        longest = max(longest, time.time() - began)


def _write(path: Path, raw: Mapping[str, Any], record: Record, clock: Clock) -> None:
    """Writes what is known so far: a later part may fail, or run out of time. Collective over the ranks."""
    import torch.distributed as dist

    busy = clock.over_all_ranks(record.processor_seconds())
    if dist.get_rank() == 0:
        whole = {**raw, "blocks": record.blocks, "off_beside": record.off_beside}
        whole |= {"processor_seconds": busy, "peak_device_mib": record.peak}
        new = path.with_suffix(".new")
        new.write_text(json.dumps(whole))
        new.replace(path)


class Record:
    """What the blocks of each variant took; the first iteration of a block isn't counted."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self.blocks: dict[str, list[list[float]]] = {}
        # By variant and block: which block of `off` is its neighbour.
        self.off_beside: dict[str, list[int]] = {}
        self._busy: dict[str, list[float]] = {}
        self._rounds = 0
        self.peak: dict[str, float] = {}

    def block(self, name: str, run: Block, iterations: int) -> None:
        """Runs a block of `iterations`."""
        import torch

        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = run(iterations)[1:]
        peak = torch.cuda.max_memory_allocated() / 2**20 if self._on_gpu else 0.0
        self.blocks.setdefault(name, []).append([wall for wall, _ in seconds])
        self._busy.setdefault(name, []).extend(busy for _, busy in seconds)
        self.peak[name] = max(self.peak.get(name, 0.0), peak)

    def round(self, variants: Mapping[str, Block], iterations: int) -> None:
        """Runs a block of every variant, each beside one of `off`, which comes first and second in turn."""
        others = [name for name in variants if name != "off"]
        self._rounds += 1
        for name in others if self._rounds % 2 else others[::-1]:
            turn = len(self.off_beside.get(name, [])) + others.index(name)
            for one in ("off", name) if turn % 2 == 0 else (name, "off"):
                self.block(one, variants[one], iterations)
            self.off_beside.setdefault(name, []).append(len(self.blocks["off"]) - 1)
        if not others:
            self.block("off", variants["off"], iterations)

    def medians(self) -> str:
        """For people, so far."""
        counted = {name: [s for block in blocks for s in block] for name, blocks in self.blocks.items()}
        return ", ".join(f"{name} {statistics.median(seconds):.4f} s" for name, seconds in counted.items())

    def processor_seconds(self) -> dict[str, list[float]]:
        """Of this process, by variant and counted iteration."""
        return self._busy


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
