"""Does it work at all here: two stages are trained under the agent, the second one is killed once and recovers.

    python scripts/bench/smoke.py LOG [--device gpu|cpu] [--seconds 60]

Everything goes to the file LOG while it happens: the output of agent and workers, every event, and, when time is up,
the stacks of all threads of all processes, which are then ended. The exit status is 0 if the job ended well after a
localized recovery.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron.moevement.report.read_events import Event, Tail, parse_lines

# The first slots come once the copies are calibrated.
RANKS, ITERATIONS, POLL_SECONDS, STACK_SECONDS = 2, 20, 0.2, 3.0
MARK = "MOEVEMENT_SMOKE"
MODEL = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 256 --num-experts 8 --moe-router-topk 2 "
    "--moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall --bf16 --clip-grad 1.0 --micro-batch-size 1 "
    "--global-batch-size 4 --lr 2e-3 --lr-warmup-iters 3 --split 100,0,0 --untie-embeddings-and-output-weights "
    "--disable-bias-linear --tokenizer-type ByteLevelTokenizer --hidden-dropout 0.1 --attention-dropout 0.1 "
    f"--train-iters {ITERATIONS} --pipeline-model-parallel-size {RANKS} --sparse-ckpt --sparse-ckpt-window 3 "
    "--sparse-ckpt-progress plain --sparse-ckpt-inject kill@rank=1,iteration=14,point=forward:2"
)
DEVICES = {
    "gpu": "--distributed-backend nccl --deterministic-mode",
    "cpu": "--distributed-backend gloo --use-cpu",
}


def main() -> int:
    """Runs the job; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--device", choices=sorted(DEVICES), default="gpu")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    deadline, word = time.monotonic() + options.seconds, uuid.uuid4().hex
    options.log.unlink(missing_ok=True)
    # All writers append.
    with tempfile.TemporaryDirectory() as scratch, options.log.open("a", buffering=1) as log, memory() as slots:
        folder = Path(scratch)
        prepare = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--python-stdlib", "--max-megabytes", "1"]
        subprocess.run([*prepare, "--output-prefix", str(folder / "text")], check=True, stdout=log)
        command = [sys.executable, "-m", "megatron.moevement.agent", "--nproc-per-node", str(RANKS)]
        command += [str(ROOT / "pretrain_gpt.py"), *MODEL.split(), *DEVICES[options.device].split()]
        command += ["--data-path", str(folder / "text"), "--sparse-ckpt-log-dir", str(folder)]
        command += ["--sparse-ckpt-dir", slots, "--sparse-ckpt-name", "smoke"]
        job = subprocess.Popen(command, cwd=ROOT, env=environment(word), stdout=log, stderr=log)
        events, tail = list[Event](), Tail()
        try:
            while job.poll() is None and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                events += news(tail, folder, options.log)
            if job.poll() is None:
                log.write(f"not done after {options.seconds:.0f} s; the stacks of all threads:\n")
                signal_all(word, signal.SIGUSR1)
                time.sleep(STACK_SECONDS)
        finally:
            signal_all(word, signal.SIGKILL)
            job.wait()
        events += news(tail, folder, options.log)
    return report(job.returncode, events)


def memory() -> tempfile.TemporaryDirectory[str]:
    """A folder for slots."""
    return tempfile.TemporaryDirectory(prefix="moevement-smoke-", dir="/dev/shm")


def environment(word: str) -> dict[str, str]:
    """Of the job: its processes can be found, write their stacks when asked, and torch tells what it does to groups."""
    paths = [str(ROOT / "scripts" / "bench" / "traces"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {MARK: word, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return {"TORCH_CPP_LOG_LEVEL": "INFO", "NCCL_DEBUG": "WARN", **os.environ, **own}


def news(tail: Tail, folder: Path, log: Path) -> list[Event]:
    """What the ranks have told since the last call; it is added to the log."""
    lines = [line for rank in range(RANKS) for line in tail.lines(folder / f"events.rank{rank:05d}.jsonl")]
    with log.open("a") as file:
        file.writelines(f"event {line}\n" for line in lines)
    return parse_lines(lines)[0]


def signal_all(word: str, number: signal.Signals) -> None:
    """Sends a signal to every process of the job."""
    for pid in processes(word):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def processes(word: str) -> Iterator[int]:
    """The job's, found by a word in their environment."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={word}".encode() in path.read_bytes():
                yield int(path.parent.name)


def report(status: int, events: list[Event]) -> int:
    """What happened in a few lines; the exit status."""
    started = min((float(event["time"]) for event in events), default=0.0)
    for event in sorted(events, key=lambda e: float(e["time"])):
        if event["kind"] in ("injected", "failure_noticed", "decision", "recovery_phase", "resumed"):
            shown = {k: v for k, v in event.items() if k not in ("time", "rank", "kind")}
            print(f"  {event['time'] - started:7.2f} s rank {event['rank']} {event['kind']} {shown}"[:300])
    sources = [event["source"] for event in events if event["kind"] == "resumed"]
    good = status == 0 and sources == ["local"] * RANKS
    print(f"smoke: {'good' if good else 'BAD'}, status {status}, recoveries {sources}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
