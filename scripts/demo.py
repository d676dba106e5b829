"""Train a Mixture-of-Experts GPT twice, kill workers of the second run again and again, and compare the runs.

    python scripts/demo.py [--iters 24] [--kills 3] [--seed 1] [--output runs/demo] [--keep]

The second run takes a sparse snapshot in every iteration. Its agent replaces each killed process, and only the pipeline
stage of that process rolls back and replays, while the other processes stay as they are. At the end every tensor of the
training state and every iteration's loss and gradient norm must be bitwise equal to those of the first run, which
nobody disturbed, and no process but the killed ones may have been replaced; else the exit status is 1. Everything runs
on the CPU, in four processes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.recovery.phase_log import REPLAYING
from megatron.moevement.report.compare import Comparison
from megatron.moevement.report.narration import PHASE_WORDS, RecoveryNarration
from megatron.moevement.report.read_events import Event, Tail, parse_lines
from megatron.moevement.report.recoveries import Kill
from megatron.moevement.report.summary import recovery_table, replaced_wrongly, verdict, verdict_table
from scripts.demo_kills import Killer, plan_kills

RANKS, WINDOW = 4, 4
POLL_SECONDS = 0.02
SILENCE_LIMIT_SECONDS = 180.0
STOP_LIMIT_SECONDS = 10.0
AGENT = f"-m megatron.moevement.agent --replacement fork --nproc-per-node {RANKS}"
TORCHRUN = f"-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node {RANKS}"
MARK = "MOEVEMENT_DEMO"
MODEL = """
    --num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --num-experts 8 --moe-router-topk 2
    --moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall --pipeline-model-parallel-size 4
    --untie-embeddings-and-output-weights --disable-bias-linear --bf16 --hidden-dropout 0.1 --attention-dropout 0.1
    --clip-grad 1.0 --micro-batch-size 1 --global-batch-size 4 --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine
    --lr-warmup-iters 4 --use-cpu --tokenizer-type ByteLevelTokenizer --split 100,0,0
"""


class DemoError(Exception):
    """A part of the demo that did not work; the message says which and where its output is."""


class Screen:
    """Says what happens: bars on a terminal, else lines."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console)
        self._shown: dict[TaskID, tuple[int, str]] = {}

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def stage(self, name: str, total: int) -> TaskID:
        """A new bar."""
        task = self._bars.add_task(f"{name:<15}", total=total, note="starting")
        if not self.console.is_terminal:
            self.say(f"{name} ...")
        return task

    def show(self, task: TaskID, done: int, note: str) -> None:
        """Moves a bar on."""
        if self._shown.get(task) == (done, note):
            return
        self._shown[task] = (done, note)
        self._bars.update(task, completed=done, note=note)
        if not self.console.is_terminal:
            self.say(f"  {self._bars.tasks[task].description.strip()}: {done}/{self._bars.tasks[task].total} {note}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)


class Launch:
    """One launch of a program whose processes carry a mark in their environment, so that none is left behind."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        self._mark = uuid.uuid4().hex
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, MARK: self._mark, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        # Restarted workers must not look for the store of the launcher's first rendezvous.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, cwd=ROOT, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        limit = time.monotonic() + STOP_LIMIT_SECONDS
        while self._process.poll() is None and time.monotonic() < limit:
            time.sleep(POLL_SECONDS)
        for pid in self._marked():
            _signal(pid, signal.SIGKILL)
        self._process.wait()

    def kill(self, pid: int) -> bool:
        """Kills one of the launch's processes, without any warning to it; False if it is none or gone."""
        return pid in self._marked() and _signal(pid, signal.SIGKILL)

    def polls(self) -> Iterator[None]:
        """Yields until the program has ended well.

        Raises:
            DemoError: it ended badly, or wrote nothing for too long.
        """
        size, changed = -1, time.monotonic()
        while self._process.poll() is None:
            yield
            time.sleep(POLL_SECONDS)
            if (now := self.log.stat().st_size) != size:
                size, changed = now, time.monotonic()
            if time.monotonic() - changed > SILENCE_LIMIT_SECONDS:
                raise DemoError(f"no output for {SILENCE_LIMIT_SECONDS:.0f} s, see {self.log}")
        if self._process.returncode:
            lines = self.log.read_text(errors="replace").splitlines()
            errors = [line for line in lines if "rror" in line] or lines
            raise DemoError(f"ended with status {self._process.returncode}, see {self.log}:\n" + "\n".join(errors[-8:]))
        yield

    def _marked(self) -> Iterator[int]:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if f"{MARK}={self._mark}" in environment:
                yield int(folder.name)


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Demo:
    """What was asked for, and where things are."""

    iters: int
    kills: int
    seed: int
    output: Path
    keep: bool
    slots: SparseCheckpointConfig

    def command(self, launcher: str, folder: Path, extra: Sequence[str]) -> list[str]:
        """The command line of a training run that writes to `folder`."""
        model = [*MODEL.split(), "--train-iters", str(self.iters), "--seed", str(1000 + self.seed)]
        files = ["--data-path", str(self.output / "data" / "stdlib"), "--state-digest", str(folder / "digest")]
        return [sys.executable, *launcher.split(), str(ROOT / "pretrain_gpt.py"), *model, *files, *extra]

    def prepare(self, screen: Screen) -> None:
        """Makes the data: Python's own sources, in bytes."""
        task = screen.stage("prepare real text", 1)
        prefix = self.output / "data" / "stdlib"
        script = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--python-stdlib"]
        with Launch(
            [*script, "--max-megabytes", "2", "--output-prefix", str(prefix)], prefix.with_suffix(".log")
        ) as run:
            for _ in run.polls():
                pass
        screen.show(task, 1, prefix.with_suffix(".log").read_text().splitlines()[-1].partition(": ")[2])

    def undisturbed(self, screen: Screen) -> None:
        """The run that nobody disturbs, without sparse checkpoints."""
        folder = self.output / "undisturbed"
        task, tail = screen.stage("undisturbed run", self.iters), Tail()
        with Launch(self.command(TORCHRUN, folder, []), folder / "output.log") as run:
            for _ in run.polls():
                for line in tail.lines(run.log):
                    if line.lstrip().startswith("iteration ") and "| lm loss " in line:
                        number = int(line.split()[1].partition("/")[0])
                        screen.show(task, number, "loss " + line.split("| lm loss ")[1].split(" |")[0])

    def disturbed(self, screen: Screen) -> list[Kill]:
        """The run with sparse checkpoints whose workers are killed."""
        folder, config = self.output / "disturbed", self.slots
        flags = ["--sparse-ckpt", "--sparse-ckpt-window", str(WINDOW), "--sparse-ckpt-name", config.name]
        flags += ["--sparse-ckpt-log-dir", str(folder), "--sparse-ckpt-progress", "plain"]
        flags += ["--tensorboard-dir", str(folder / "tensorboard")]
        task, tail, narration = screen.stage("disturbed run", self.iters), Tail(), RecoveryNarration()
        with Launch(self.command(AGENT, folder, flags), folder / "output.log") as run:
            killer = Killer(plan_kills(self.kills, self.iters, self.seed, RANKS, WINDOW), run.kill)
            for _ in run.polls():
                lines = [line for rank in range(RANKS) for line in tail.lines(folder / f"events.rank{rank:05d}.jsonl")]
                for event in sorted(parse_lines(lines)[0], key=lambda e: float(e["time"])):
                    killer.take(event)
                    narrate(screen, task, narration, event)
                killed = killer.act()
                if killed is not None:
                    screen.say(f"    SIGKILL to rank {killed.rank}" + " in the recovery" * killed.in_recovery)
        return killer.done

    def report(self, screen: Screen, kills: Sequence[Kill]) -> tuple[Comparison, tuple[int, ...]]:
        """Compares the runs, draws plots, prints tables; returns also who was replaced without a kill."""
        from megatron.moevement.report.two_runs import report_two_runs

        found = report_two_runs(self.output / "undisturbed", self.output / "disturbed", kills, self.output)
        tables = recovery_table(found.outcomes), verdict_table(found.comparison, found.outcomes, found.pids)
        screen.console.print(*tables)
        return found.comparison, replaced_wrongly(found.pids, kills)

    def remove_slots(self) -> None:
        """Frees the snapshots' memory."""
        if not self.keep:
            shutil.rmtree(self.slots.job_directory, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.slots.job_directory.parent.rmdir()


def narrate(screen: Screen, task: TaskID, narration: RecoveryNarration, event: Event) -> None:
    """Shows what an event says: on rank 0 of all that concerns all, on every rank of what it replays."""
    kind = event["kind"]
    if kind == "recovery_phase" and event["done"] and event["phase"] in REPLAYING:
        words = f"{PHASE_WORDS[event['phase']]} {event['done']}/{event['of']}"
        screen.say(f"    rank {event['rank']} {words}: iteration {event['iteration'] + 1} replayed")
    if event["rank"] != 0:
        return
    if kind == "iteration" and not event["replayed"]:
        note = f"loss {event['loss']:.4f} slot {event['window_index'] + 1}/{event['window']}"
        screen.show(task, int(event["iteration"]) + 1, note)
    elif kind in ("process", "decision", "resumed"):
        for line in narration.lines(event):
            screen.say("    " + line)


def parse(argv: Sequence[str] | None) -> Demo:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description="Train, kill, recover, compare.", allow_abbrev=False)
    parser.add_argument("--iters", type=int, default=24, help="iterations of each run")
    parser.add_argument("--kills", type=int, default=3, help="workers to kill")
    parser.add_argument("--seed", type=int, default=1, help="of the training, and of who is killed when")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "demo", help="folder for logs, plots and summary"
    )
    parser.add_argument("--keep", action="store_true", help="keep the snapshots in shared memory")
    args = parser.parse_args(argv)
    if args.iters < 2 * WINDOW or args.kills < 0:
        parser.error(f"--iters must be at least {2 * WINDOW} and --kills at least 0")
    slots = SparseCheckpointConfig(enabled=True, name=f"demo-{uuid.uuid4().hex[:12]}")
    return Demo(args.iters, args.kills, args.seed, args.output.resolve(), args.keep, slots)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is 0 if nothing differs."""
    demo = parse(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    for name in ("data", "undisturbed", "disturbed"):
        shutil.rmtree(demo.output / name, ignore_errors=True)
    started = time.monotonic()
    screen = Screen()
    try:
        with screen:
            demo.prepare(screen)
            demo.undisturbed(screen)
            kills = demo.disturbed(screen)
        comparison, strangers = demo.report(screen, kills)
    except (DemoError, OSError) as error:
        screen.say(f"demo.py: error: {error}")
        return 1
    except KeyboardInterrupt:
        screen.say("demo.py: interrupted; workers and snapshots are removed")
        return 130
    finally:
        demo.remove_slots()
    screen.say(f"{verdict(comparison)}; {time.monotonic() - started:.0f} s in all")
    screen.say(f"plots, events and logs: {demo.output}")
    missed = demo.kills - len(kills)
    if missed:
        screen.say(f"{missed} of {demo.kills} kills found no moment before the run ended: raise --iters")
    if strangers:
        screen.say(f"ranks {list(strangers)} were replaced although nobody killed them: see the logs")
    return 0 if comparison.equal and not missed and not strangers else 1


if __name__ == "__main__":
    sys.exit(main())
