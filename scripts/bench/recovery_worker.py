"""One rank of the recovery benchmark; started by recovery.py. It trains like pretrain_gpt.py, notes when what happened,
and kills itself where the plan says so.

Notes are lines of JSON in `<marks>/rank0.jsonl` and so on. Each has `time` (seconds since the epoch), `rank`, `pid`,
`kind`, and the processor seconds of the process (`busy`) and of its main thread (`thread`) up to then.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.moevement import arguments
from megatron.moevement.config import add_sparse_checkpoint_flags, config_from_namespace
from megatron.moevement.errors import MoevementError

# Events of the product that end a phase.
EVENTS = ("failure_noticed", "decision", "start", "recovery_started", "recovery_finished", "resumed")


class Marks:
    """Writes the notes of one rank: one system call each, so that a kill tears none."""

    def __init__(self, directory: Path, rank: int) -> None:
        self.directory, self._rank = directory, rank
        self._file = os.open(directory / f"rank{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, kind: str, **values: Any) -> None:
        """Notes that something of this kind is over now."""
        note = {"time": time.time(), "rank": self._rank, "pid": os.getpid(), "kind": kind}
        note |= {"busy": time.process_time(), "thread": time.thread_time(), **values}
        os.write(self._file, (json.dumps(note) + "\n").encode())


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the measurement besides those of training."""
    add_sparse_checkpoint_flags(parser)
    parser.add_argument("--marks", type=Path, required=True)
    parser.add_argument("--kills", required=True, help="ITERATION:RANK by commas")
    parser.add_argument("--agent-output", type=Path, help="where the agent says whether a process stands by")
    parser.add_argument("--stand-by-iterations", type=int, default=0, help="between the wait for that and the kill")
    parser.add_argument("--stand-by-seconds", type=float, default=0.0, help="how long is waited for it at most")
    parser.add_argument("--cores", default="", help="cores of rank 0, of rank 1 and so on: 0,1;2,3")


def created() -> float:
    """When this process was made, seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


class StandBy:
    """Has a victim wait until a process stands by, as one does some time after a job's start or its last failure.

    The wait is iterations before the kill, so that the slots that the recovery loads are those of an undisturbed run;
    the others wait for the victim in that iteration, which counts for nothing.
    """

    def __init__(self, options: argparse.Namespace, marks: Marks) -> None:
        self._output, self._seconds, self._marks = options.agent_output, options.stand_by_seconds, marks
        self.iterations = options.stand_by_iterations if self._output is not None else None

    def wait(self, iteration: int) -> None:
        """Returns when the agent's last word is that a process stands by, or when that takes too long."""
        started = time.monotonic()
        ready = stands_by(self._output.read_text(errors="replace"))
        while not ready and time.monotonic() - started < self._seconds:
            time.sleep(0.1)
            ready = stands_by(self._output.read_text(errors="replace"))
        self._marks("stand_by", iteration=iteration, seconds=time.monotonic() - started, ready=ready)


def stands_by(output: str) -> bool:
    """Whether the agent, by what it has said, has an idle process that has imported everything."""
    return output.rfind("a warm process stands by") > output.rfind("process replaces it")


class Killer:
    """SIGKILL to this process before it computes the middle micro-batch of an iteration; each kill happens once."""

    def __init__(self, plan: str, rank: int, marks: Marks, stand_by: StandBy) -> None:
        kills = [tuple(map(int, part.split(":"))) for part in plan.split(",")]
        self._mine = {iteration: number for number, (iteration, victim) in enumerate(kills) if victim == rank}
        self._marks, self._iteration, self._calls, self._victim_call = marks, -1, 0, 0
        self._stand_by = stand_by

    def arm(self, job: Any) -> None:
        """Counts the forward passes of the job's first chunk."""
        self._victim_call = job.config.num_micro_batches // 2
        job.chunks[0].register_forward_pre_hook(self._before_forward)

    def begin(self, iteration: int) -> None:
        """An iteration of training begins, no replay."""
        self._iteration, self._calls = iteration, 0
        if self._stand_by.iterations is not None:
            number = self._mine.get(iteration + self._stand_by.iterations)
            # An iteration that runs again after its kill has waited before.
            if number is not None and not self._file(number).exists():
                self._stand_by.wait(iteration)

    def _file(self, number: int) -> Path:
        """Is there once the kill has happened."""
        return self._marks.directory / f"kill{number}"

    def end(self) -> None:
        """The iteration is over."""
        self._iteration = -1

    def _before_forward(self, _module: Any, _inputs: Any) -> None:
        number, calls = self._mine.get(self._iteration), self._calls
        self._calls += 1
        if number is None or calls != self._victim_call:
            return
        try:
            os.close(os.open(self._file(number), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        self._marks("kill", iteration=self._iteration, number=number)
        os.kill(os.getpid(), signal.SIGKILL)


def around(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts `wrap(original)` in the place of `owner.name`."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(wrap(original)))


def noted(
    owner: Any, name: str, marks: Marks, kind: str, values: Callable[..., dict[str, Any]] = lambda *_: {}
) -> None:
    """Has every call of `owner.name` noted when it returns, with its seconds; `values` are of its arguments."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            started, thread = time.perf_counter(), time.thread_time()
            result = original(*args, **options)
            spent = {"seconds": time.perf_counter() - started, "thread_seconds": time.thread_time() - thread}
            marks(kind, **spent, **values(*args))
            return result

        return wrapped

    around(owner, name, wrap)


class Passes:
    """Processor seconds of the main thread in the forward and backward passes of the last iteration."""

    def __init__(self) -> None:
        self.thread_seconds = 0.0

    def wrap(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Around `run_forward_backward`."""

        def timed(*args: Any) -> Any:
            thread = time.thread_time()
            result = run(*args)
            self.thread_seconds = time.thread_time() - thread
            return result

        return timed

    def of(self, iteration: int, frozen: int = 0) -> dict[str, Any]:
        """What a note of an iteration says; `frozen` counts operators."""
        return {"iteration": iteration, "passes_thread_seconds": self.thread_seconds, "frozen": frozen}


def install(marks: Marks, killer: Killer, on_gpu: bool) -> None:
    """Puts the notes in place, around public functions of the product."""
    import torch

    from megatron.moevement.events import EventLog

    names = ("train_loop", "replay", "operator_state", "program")
    train_loop, replay, operator_state, program = (
        importlib.import_module(f"megatron.moevement.integration.{name}") for name in names
    )
    passes = Passes()

    def iterate(train_iteration: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(job: Any, hooks: Any) -> Any:
            marks("begins", iteration=job.step)
            killer.begin(job.step)
            outcome = train_iteration(job, hooks)
            killer.end()
            return outcome

        return wrapped

    def to_the_end(replay_iteration: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            loss = replay_iteration(*args)
            if on_gpu:
                torch.cuda.synchronize()
            return loss

        return wrapped

    def armed(build_job: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            job = build_job(*args)
            killer.arm(job)
            return job

        return wrapped

    def told(emit: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(log: EventLog, kind: str, **values: Any) -> None:
            emit(log, kind, **values)
            if kind in EVENTS:
                marks(
                    kind, **{name: values[name] for name in ("source", "target", "runs", "reasons") if name in values}
                )

        return wrapped

    for module in (train_loop, replay):
        around(module, "run_forward_backward", passes.wrap)
    around(train_loop, "train_iteration", iterate)
    noted(train_loop, "train_iteration", marks, "iteration", lambda job, *_: passes.of(job.step - 1))
    around(operator_state, "replay_iteration", to_the_end)
    noted(
        operator_state,
        "replay_iteration",
        marks,
        "replay",
        lambda _, record, ops, *__: passes.of(record.iteration, len(ops)),
    )
    around(program, "build_job", armed)
    around(EventLog, "emit", told)
    note_phases(marks, program)


def note_phases(marks: Marks, program: Any) -> None:
    """What has no event of the product, or none that every variant has."""
    from megatron.moevement.agent.link import WorkerLink
    from megatron.moevement.integration import distributed
    from megatron.moevement.integration.bundle_exchange import BundleExchange
    from megatron.moevement.integration.generations import Generations

    noted(distributed, "start", marks, "groups")
    noted(program, "build_job", marks, "built")
    noted(program.dense_start, "load_dense", marks, "loaded")
    noted(program, "save_dense", marks, "saved")
    noted(BundleExchange, "deliver", marks, "delivery", lambda _exchange, _log, iteration, *_: {"iteration": iteration})
    noted(Generations, "leave", marks, "left")
    noted(Generations, "join", marks, "joined")
    noted(WorkerLink, "next_generation", marks, "opened")


def main() -> int:
    """Trains; the exit status is that of the training script."""
    config, namespace = arguments.parse(extra=add_flags)
    rank = int(os.environ["RANK"])
    marks = Marks(namespace.marks, rank)
    marks("process", created=created())
    if namespace.cores:
        os.sched_setaffinity(0, {int(core) for core in namespace.cores.split(";")[rank].split(",")})
    importlib.import_module("megatron.moevement.integration.preload")
    killer = Killer(namespace.kills, rank, marks, StandBy(namespace, marks))
    install(marks, killer, on_gpu=not config.use_cpu)
    marks("imported")
    from megatron.moevement.integration import program

    try:
        program.run(config, config_from_namespace(namespace))
    except MoevementError as error:
        arguments.refuse("recovery_worker.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
