"""Faults inside a worker, at exact points. A kill is a real SIGKILL of the own process; a flipped bit is a real one."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

Fault = dict[str, Any]


def kill() -> None:
    """SIGKILL to this process: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def install(faults: list[Fault]) -> None:
    """Puts those faults in place that are for this rank and generation.

    A fault has `point` (a key of `POINTS`), and may have `rank` (default: all), `generation` (restarts so far; default
    0, None for every one), `iteration`, `count`.
    """
    rank, generation = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    for fault in faults:
        if fault.get("rank", rank) == rank and fault.get("generation", 0) in (generation, None):
            POINTS[fault["point"]](fault)


def _before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Runs `action(*args)` before every call of `owner.name`."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **values: Any) -> Any:
        action(*args, **values)
        return original(*args, **values)

    setattr(owner, name, wrapped)


def _after(owner: Any, name: str, action: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **values: Any) -> Any:
        result = original(*args, **values)
        action(*args, **values)
        return result

    setattr(owner, name, wrapped)


def _kill_in_forward(fault: Fault) -> None:
    """In the forward pass of micro-batch `count` of the iteration."""
    from megatron.moevement.integration import forward

    seen = {"iteration": -1, "calls": 0}

    def note(_job: Any, iteration: int) -> None:
        seen.update(iteration=iteration, calls=0)

    def step(*_args: Any) -> None:
        seen["calls"] += 1
        if seen["iteration"] == fault["iteration"] and seen["calls"] > fault.get("count", 0):
            kill()

    from megatron.moevement.integration import train_loop

    _before(train_loop, "run_forward_backward", note)
    _before(forward, "_forward_step", step)


def _slow(fault: Fault) -> None:
    """Every iteration takes `seconds` more, so that something can be done to the job meanwhile."""
    from megatron.moevement.integration import train_loop

    _before(train_loop, "run_forward_backward", lambda *_: time.sleep(fault["seconds"]))


def _kill_in_hook(name: str) -> Callable[[Fault], None]:
    def point(fault: Fault) -> None:
        from megatron.moevement.integration.attach import SparseHooks

        def check(_hooks: Any, iteration: int, *_rest: Any) -> None:
            if iteration == fault["iteration"]:
                kill()

        (_after if fault.get("after") else _before)(SparseHooks, name, check)

    return point


def _kill_in_optimizer(fault: Fault) -> None:
    """After the update of the first inner optimizer: before the next one's, or before weights are gathered."""
    from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer

    from megatron.moevement.integration.attach import SparseHooks

    seen = {"iteration": -1, "calls": 0}

    def note(_hooks: Any, iteration: int) -> None:
        seen.update(iteration=iteration, calls=0)

    def check(_optimizer: Any) -> None:
        seen["calls"] += 1
        if seen["iteration"] == fault["iteration"] and seen["calls"] > fault.get("count", 0):
            kill()

    _before(SparseHooks, "before_optimizer_step", note)
    _after(MixedPrecisionOptimizer, "step_with_ready_grads", check)


def _kill_in_commit(fault: Fault) -> None:
    """On the committer's thread, between digest and commit word."""
    from megatron.moevement.store.host_store import HostStore

    def check(_store: Any, lease: Any, *_rest: Any) -> None:
        if lease.step == fault["iteration"]:
            kill()

    _before(HostStore, "commit", check)


def _kill_in_replay(fault: Fault) -> None:
    """In the replay of the iteration, during a recovery."""
    from megatron.moevement.integration.operator_state import OperatorState

    calls = {"n": 0}

    def check(_state: Any, _record: Any, _frozen: Any) -> None:
        calls["n"] += 1
        if calls["n"] > fault.get("count", 0):
            kill()

    _before(OperatorState, "replay", check)


def _kill_in_load(fault: Fault) -> None:
    """While slot number `count` of a recovery is being loaded."""
    from megatron.moevement.integration import operator_state

    calls = {"n": 0}

    def check(*_args: Any) -> None:
        calls["n"] += 1
        if calls["n"] > fault.get("count", 0):
            kill()

    _before(operator_state, "_complete_replicas", check)


def _kill_in_dense_save(fault: Fault) -> None:
    """In the dense save of step `iteration`."""
    from megatron.moevement.integration import program

    def check(job: Any, *_args: Any, **_values: Any) -> None:
        if job.step == fault["iteration"]:
            kill()

    _before(program, "save_dense", check)


def _flip_restored_bit(fault: Fault) -> None:
    """Negative control: one bit of one master weight is wrong after each slot was loaded.

    After each, since a run of more than W slots loads some operators again and mends what was wrong before.
    """
    import torch

    from megatron.moevement.integration.operator_state import OperatorState
    from megatron.moevement.types import Presence

    def flip(state: Any, operators: Any) -> None:
        for operator in operators:
            if operator.presence is not Presence.FULL:
                continue
            for part in state.table[operator.name].slices:
                master = state._owned[part.parameter].master
                if part.owned and master is not None:
                    view = master.detach().view(-1).view(torch.int32)
                    view[state._owned[part.parameter].master_offset] ^= 1 << fault.get("bit", 12)
                    return

    _after(OperatorState, "load", flip)


def _forget_gradient_norm(_fault: Fault) -> None:
    """Negative control: a replay clips with another gradient norm."""
    from megatron.moevement.integration import replay

    original = replay.apply_update
    replay.apply_update = lambda optimizer, grad_norm: original(optimizer, 0.75 * grad_norm)


def _wrong_record(_fault: Fault) -> None:
    """Negative control: a replay gets the learning rate of the iteration after."""
    from dataclasses import replace

    from megatron.moevement.integration import operator_state

    original = operator_state.replay_iteration

    def shifted(job: Any, record: Any, *rest: Any) -> float | None:
        rates = tuple(rate * 1.001 + 1e-6 for rate in record.learning_rates)
        return original(job, replace(record, learning_rates=rates), *rest)

    operator_state.replay_iteration = shifted


def _keep_random_state(_fault: Fault) -> None:
    """Negative control: RNG states are not restored."""
    from megatron.moevement.integration import rng_state

    rng_state.restore = lambda _states: None


def _overflow(fault: Fault) -> None:
    """A gradient of inf in the iteration, so that the FP16 loss scaler skips the update. Not a fault of the product."""
    import torch

    from megatron.moevement.integration import replay, train_loop

    for module in (train_loop, replay):
        original = module.run_forward_backward

        def poisoned(job: Any, iteration: int, run: Any = original) -> Any:
            result = run(job, iteration)
            if iteration == fault["iteration"]:
                for chunk in job.chunks:
                    for parameter in list(chunk.parameters())[:1]:
                        parameter.main_grad.view(-1)[0] = torch.inf
            return result

        module.run_forward_backward = poisoned


def _fail_capture(fault: Fault) -> None:
    """The copy engine refuses the slot of the iteration."""
    from megatron.moevement.errors import MoevementError
    from megatron.moevement.snapshot.capture import Capture

    def check(_capture: Any, spec: Any, _record: Any) -> None:
        if spec.step == fault["iteration"]:
            raise MoevementError("injected")

    _before(Capture, "begin", check)


def _transcript_reads(change: Callable[[Any], Any]) -> Callable[[Fault], None]:
    """Negative control: whoever serves its transcript reads something else than it wrote."""

    def point(_fault: Fault) -> None:
        from megatron.moevement.transcript.log import TranscriptLog

        original = TranscriptLog.records
        TranscriptLog.records = lambda *where: change(original(*where))  # type: ignore[method-assign]

    return point


def _drop_record(records: Any) -> Any:
    return records[:-1]


def _shift_keys(records: Any) -> Any:
    """Each record goes under the key of the next one, the last under that of the first."""
    from dataclasses import replace

    return tuple(replace(r, key=following.key) for r, following in zip(records, records[1:] + records[:1], strict=True))


def _flip_transcript_byte(fault: Fault) -> None:
    """Negative control: one bit of what was written to the transcript changes before it is served the first time."""
    from megatron.moevement.transcript.log import TranscriptLog

    done = {"flipped": False}

    def flip(log: Any, iteration: int, direction: Any) -> None:
        if done["flipped"]:
            return
        done["flipped"] = True
        segment, index = log._find(iteration)
        place = next(place for place in index.places if place.key.direction is direction)
        start = log._data_address(segment) - log._region.address
        memoryview(log._region)[start + place.offset + fault.get("offset", 3)] ^= 1

    _before(TranscriptLog, "records", flip)


def _flip_delivered_bit(_fault: Fault) -> None:
    """Negative control: a replay gets a wrong bit that no digest of the transcript covers."""
    import torch

    from megatron.moevement.integration.boundary import ReplayP2P

    original = ReplayP2P._give

    def flipped(communicator: Any, *where: Any) -> Any:
        tensor = original(communicator, *where)
        tensor.detach().view(-1).view(torch.int16)[0] ^= 1 << 9
        return tensor

    ReplayP2P._give = flipped  # type: ignore[method-assign]


def _hold_before_update(fault: Fault) -> None:
    """The agreement before the update of the iteration ends on the other ranks, and on this one by their failure."""
    import time

    from megatron.moevement.agent.link import WorkerLink
    from megatron.moevement.schedule.agreement import Agreement

    held = list[WorkerLink]()

    def note(link: Any, point: str, iteration: int | None = None, **_values: Any) -> None:
        if (point, iteration) == ("update", fault["iteration"]):
            held.append(link)

    def hold(_agreement: Any, _values: Any) -> None:
        if held:
            link = held.pop()
            while not link.failed:
                time.sleep(0.01)
            link.check()

    _before(WorkerLink, "beat", note)
    _after(Agreement, "maximum", hold)


def _lose_files(fault: Fault) -> None:
    """The rank's slots and transcript are gone when its replacement starts, as after the loss of a node."""
    from pathlib import Path

    for path in Path(fault["directory"]).glob(f"rank{int(os.environ['RANK']):05d}.*"):
        if path.suffix in fault["suffixes"]:
            path.unlink()


POINTS: dict[str, Callable[[Fault], None]] = {
    "slow": _slow,
    "forward": _kill_in_forward,
    "before_forward": _kill_in_hook("before_forward"),
    "before_optimizer": _kill_in_hook("before_optimizer_step"),
    "after_optimizer": _kill_in_hook("after_optimizer_step"),
    "optimizer": _kill_in_optimizer,
    "commit": _kill_in_commit,
    "replay": _kill_in_replay,
    "load": _kill_in_load,
    "dense_save": _kill_in_dense_save,
    "flip_restored_bit": _flip_restored_bit,
    "forget_gradient_norm": _forget_gradient_norm,
    "wrong_record": _wrong_record,
    "keep_random_state": _keep_random_state,
    "overflow": _overflow,
    "fail_capture": _fail_capture,
    "drop_record": _transcript_reads(_drop_record),
    "shift_keys": _transcript_reads(_shift_keys),
    "flip_transcript_byte": _flip_transcript_byte,
    "flip_delivered_bit": _flip_delivered_bit,
    "hold_before_update": _hold_before_update,
    "lose_files": _lose_files,
}
