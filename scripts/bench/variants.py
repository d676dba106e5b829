"""The variants of the overhead benchmark: slots and transcript that they share, and the hooks of each."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.schedule.slots import longest_run
from moevement_ext import CopyEngine, HostRegion
from scripts.bench.overhead import is_transcribed
from scripts.bench.slots import Snapshots
from scripts.bench.transcripts import Transcribed, Transcripts

# Variants that take many times an iteration: few iterations of them, in one block after the others.
SLOW = ("dcp", "nvrx")
# Those that may take part in fewer rounds: what they cost shows in few of them.
BASELINES = ("sparse-copy", "dense-sync", "dense-side")
# Runs so many iterations; their seconds on the wall and of the processor.
Block = Callable[[int], list[tuple[float, float]]]
Say = Callable[[str], None]


def warm_slots(
    training: Any,
    sparse: SparseCheckpointConfig,
    names: list[str],
    iterate: Callable[[Any], object],
    say: Say,
    stack: contextlib.ExitStack,
) -> Snapshots | None:
    """The manager of all variants that take slots or copy what a slot holds, warmed up; None if there are none."""
    from scripts.bench.switches import Pauses

    if not any(name.startswith(("sparse", "dense")) for name in names):
        return None
    if any(":pauses" in name for name in names):
        stack.enter_context(Pauses.installed(training.chunks))
    slots = Snapshots(training, sparse)
    slots.warm_up(functools.partial(iterate, slots.hooks))
    assert slots.manager.plan is not None
    memory = slots.manager.plan.memory
    say(f"{memory.slots} slots of {memory.slot_bytes / 2**20:.1f} MiB, each written once")
    return slots


def warm_transcripts(
    training: Any,
    sparse: SparseCheckpointConfig,
    names: list[str],
    slots: Snapshots | None,
    iterate: Callable[[Any], object],
    stack: contextlib.ExitStack,
) -> Transcripts | None:
    """The transcript of all variants that write one, each segment of it written once; None if there are none."""
    from megatron.moevement.integration import attach, train_loop

    if not any(map(is_transcribed, names)):
        return None
    engine: CopyEngine
    if slots is not None:
        assert slots.manager.plan is not None
        engine, longest = slots.engine, slots.manager.plan.longest_run
    else:
        assert sparse.window is not None
        engine = attach.copy_engine(training.topology.device, sparse)
        stack.callback(engine.close)
        longest = longest_run(sparse.window, sparse.window_mode, sparse.reorder)
    transcripts = Transcripts(training, sparse, engine, longest)
    stack.callback(transcripts.close)
    hooks = Transcribed(transcripts, train_loop.NoHooks(), None)
    transcripts.warm_up(functools.partial(iterate, hooks))
    return transcripts


def make_hooks(
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
        if name in ("off", "transcript"):
            hooks[name] = train_loop.NoHooks()
        elif name in copied:
            hooks[name] = copied[name]()
        elif slots is not None:
            hooks[name] = slots.switched(name)
    return hooks


def _slot(state: Any, schedule: Any, on_gpu: bool, index: int) -> Any:
    from scripts.bench import baselines

    return baselines.slot_tensors(state, schedule.spec(index), on_gpu)


def blocks_of(
    hooks: Mapping[str, Any],
    slots: Snapshots | None,
    transcripts: Transcripts | None,
    run_block: Callable[[Any, int], list[tuple[float, float]]],
) -> dict[str, Block]:
    """How to run a block of each variant; one with a transcript has its own communicator while it runs."""
    blocks: dict[str, Block] = {}
    for name, hook in hooks.items():
        if transcripts is None or not is_transcribed(name):
            blocks[name] = functools.partial(run_block, hook)
        else:
            logged = Transcribed(transcripts, hook, slots if name.startswith("sparse") else None)
            blocks[name] = functools.partial(_recorded, transcripts, name, functools.partial(run_block, logged))
    return blocks


def of_round(blocks: Mapping[str, Any], number: int, baseline_every: int) -> dict[str, Any]:
    """The variants that take part in a round; the first round has all of them."""
    left_out = BASELINES if number % baseline_every else ()
    return {name: block for name, block in blocks.items() if name not in left_out}


def _recorded(transcripts: Transcripts, name: str, run: Block, iterations: int) -> list[tuple[float, float]]:
    with transcripts.recording(name):
        return run(iterations)


def slow_hook(training: Any, name: str, scratch: Path, on_gpu: bool, stack: contextlib.ExitStack) -> Any:
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
