"""What a failure costs: one worker is killed in the middle of an iteration, until training is there again.

    python scripts/bench/recovery.py                                 3 stages and 6 micro-batches on the CPU
    python scripts/bench/recovery.py --device gpu --model large      the same on GPUs, which ranks share if they must
    python scripts/bench/recovery.py --device gpu --model large --pipeline 2      on two GPUs over NCCL
    python scripts/bench/recovery.py --variants local,global --repeat 4 --modes rolling

The same model is trained in every variant, and its workers are killed at the same points: one of the middle stage, one
of the last stage, and so on, each before the middle micro-batch of its iteration. With the agent's warm processes a
victim waits beforehand until one stands by, as one does some time after a job's start.

`local`: under the agent, only the failed stage replays. `global`: under the agent without transcripts, all stages roll
back to slots. `restart`: torchrun restarts all workers, which find their slots. `dense`: torchrun and dense
checkpoints alone, every `--dense-interval` iterations; the kills hit the middle between two of them, which is what is
lost on average. 22 iterations is what the paper's Gemini saves at for GPT-MoE, which has 3 stages, at an MTBF of 10
minutes, the shortest interval in its table 3 for that model; longer ones are computed from the measured seconds.

Writes `<output>.json` after every variant, `<output>.png` and a table at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.bench import recovery_figures, recovery_report

WORKER = Path(__file__).resolve().parent / "recovery_worker.py"
MICRO_BATCHES = 6
# What the job prints, the agent included, in the folder of its variant.
OUTPUT = "output.log"
COMMON = (
    "--bf16 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0.01 --clip-grad 1.0 "
    "--lr 1e-4 --lr-decay-style constant --split 100,0,0 --tokenizer-type ByteLevelTokenizer --micro-batch-size 1 "
    "--untie-embeddings-and-output-weights --log-interval 1000000"
)
# name -> (data-parallel and expert-parallel ranks of a stage, flags)
MODELS = {
    "small": (
        1,
        "--num-layers 6 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --num-experts 8 "
        "--disable-bias-linear --hidden-dropout 0.1 --attention-dropout 0.1",
    ),
    "small-ep2": (
        2,
        "--num-layers 6 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --num-experts 8 "
        "--hidden-dropout 0.1 --attention-dropout 0.1 --expert-model-parallel-size 2",
    ),
    "large": (
        1,
        "--num-layers 6 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 --num-experts 16 "
        "--moe-ffn-hidden-size 2048 --swiglu --disable-bias-linear --hidden-dropout 0 --attention-dropout 0",
    ),
}
VARIANTS = ("local", "global", "restart", "dense")
# Those that run under the agent; torchrun starts the others.
AGENT = ("local", "global")
# Until a process stands by: it imports everything, maybe beside other work.
STAND_BY_SECONDS = 120.0
EXIT_FAILED = 1


def main() -> int:
    """Run the benchmark; the exit status is 1 if a variant could not be measured."""
    options = parse()
    # The job must not outlive this process, nor its slots in shared memory.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    result = heading(options)
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "text"
        prepare = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--python-stdlib"]
        subprocess.run([*prepare, "--max-megabytes", "2", "--output-prefix", str(corpus)], check=True, stdout=2)
        for name, mode in variants(options):
            label = name if mode is None else f"{name} {mode}"
            try:
                marks = measure(options, name, mode, corpus, Path(scratch) / label.replace(" ", "-"))
            except VariantFailed as error:
                print(f"{label}: {error}", file=sys.stderr, flush=True)
                result["failed"][label] = str(error)
                failed = True
                continue
            found = recovery_figures.figures(marks, ranks_of_a_stage(options), name in AGENT, MICRO_BATCHES)
            result["variants"][label] = {"mode": mode, **found}
            recovery_figures.compare(result)
            output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
            print(recovery_report.line(label, result["variants"][label]), file=sys.stderr, flush=True)
            unready = [one["iteration"] for one in found["recoveries"] if one["stood_by"] is False]
            if unready:
                print(
                    f"{label}: no process stood by within {STAND_BY_SECONDS:.0f} s before the kills in iterations "
                    f"{', '.join(map(str, unready))}: what follows them includes imports",
                    file=sys.stderr,
                    flush=True,
                )
    if result["variants"]:
        recovery_report.plot(result, output.with_suffix(".png"))
        recovery_report.print_table(result)
    return EXIT_FAILED if failed else 0


class VariantFailed(Exception):
    """The job of a variant has not ended well."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="small")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--pipeline", type=int, choices=(2, 3), default=3, help="stages (default: 3)")
    parser.add_argument("--window", type=int, default=3, help="W (default: 3, the paper's for GPT-MoE)")
    parser.add_argument("--modes", default="rolling,fixed", help="comma list of window modes")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma list; see above")
    parser.add_argument("--repeat", type=int, default=2, help="kills of each stage in each variant (default: 2)")
    parser.add_argument("--stages", help="comma list of the stages whose workers are killed (default: all but stage 0)")
    parser.add_argument("--dense-interval", type=int, default=22, help="iterations between dense checkpoints")
    parser.add_argument("--replacement", choices=("cold", "warm", "fork"), default="warm", help="the agent's")
    parser.add_argument("--pin", choices=("auto", "on", "off"), default="auto", help="each rank on cores of its own")
    parser.add_argument("--timeout-seconds", type=float, default=900.0, help="for the job of one variant")
    parser.add_argument("--output", default="runs/recovery", help="path of the results without ending")
    options = parser.parse_args()
    stages = tuple(map(str, range(options.pipeline)))
    options.stages = options.stages or ",".join(stages[1:])
    for flag, known in (("variants", VARIANTS), ("modes", ("rolling", "fixed")), ("stages", stages)):
        words = getattr(options, flag).split(",")
        if set(words) - set(known) or len(set(words)) < len(words):
            parser.error(f"--{flag} {getattr(options, flag)}: any of {', '.join(known)}, by commas, each once")
    for flag, low in (("window", 2), ("repeat", 1), ("dense_interval", 4 * options.window)):
        if getattr(options, flag) < low:
            parser.error(f"--{flag.replace('_', '-')} {getattr(options, flag)}: give {low} or more")
    if options.pin == "on" and len(os.sched_getaffinity(0)) < ranks(options):
        parser.error(f"--pin on: {ranks(options)} ranks need as many cores; use --pin off")
    return options


def variants(options: argparse.Namespace) -> list[tuple[str, str | None]]:
    """What is measured, in order: every variant with slots in every window mode."""
    chosen = [name for name in VARIANTS if name in options.variants.split(",")]
    sparse = [(name, mode) for mode in options.modes.split(",") for name in chosen if name != "dense"]
    return [*sparse, *((name, None) for name in chosen if name == "dense")]


def ranks_of_a_stage(options: argparse.Namespace) -> int:
    """Ranks of one pipeline stage."""
    return MODELS[options.model][0]


def ranks(options: argparse.Namespace) -> int:
    """Processes of the job."""
    return int(options.pipeline) * ranks_of_a_stage(options)


def kills(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Iteration and victim of every kill: in the middle between two dense checkpoints, stage after stage."""
    interval, stages = options.dense_interval, [int(stage) for stage in options.stages.split(",")]
    victims = [stage * ranks_of_a_stage(options) for _ in range(options.repeat) for stage in stages]
    return [(interval * (number + 1) + interval // 2, victim) for number, victim in enumerate(victims)]


def cores(options: argparse.Namespace) -> str:
    """The cores of each rank, none where they aren't pinned."""
    available = sorted(os.sched_getaffinity(0))
    share = len(available) // ranks(options)
    if options.pin == "off" or share == 0:
        return ""
    return ";".join(",".join(map(str, available[r * share : (r + 1) * share])) for r in range(ranks(options)))


def backend(options: argparse.Namespace) -> list[str]:
    """Flags of the device: NCCL needs a GPU for each rank, under gloo they share."""
    if options.device == "cpu":
        return ["--use-cpu", "--distributed-backend", "gloo"]
    import torch

    found = "nccl" if torch.cuda.device_count() >= ranks(options) else "gloo"
    # A replay whose sends differ in a bit from what the neighbours received is an error.
    return ["--deterministic-mode", "--distributed-backend", found]


def job_command(
    options: argparse.Namespace, name: str, mode: str | None, corpus: Path, folder: Path, slots: Path
) -> list[str]:
    """The command line of a variant's job."""
    plan = kills(options)
    agent = ["-m", "megatron.moevement.agent", "--nproc-per-node", str(ranks(options))]
    agent += ["--replacement", options.replacement]
    waits = name in AGENT and options.replacement == "warm"
    if waits:
        # A victim that waits must not be taken for one that hangs.
        agent += ["--hang-timeout-seconds", str(STAND_BY_SECONDS + 60)]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks(options)), "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "--rdzv-id", uuid.uuid4().hex]
    torchrun += ["--monitor-interval", "0.1", "--max-restarts", "1000"]
    words = [*(agent if name in AGENT else torchrun), str(WORKER), *COMMON.split()]
    words += [*MODELS[options.model][1].split(), *backend(options), "--data-path", str(corpus)]
    words += ["--pipeline-model-parallel-size", str(options.pipeline)]
    words += ["--global-batch-size", str(MICRO_BATCHES * ranks_of_a_stage(options))]
    words += ["--train-iters", str(plan[-1][0] + 3), "--marks", str(folder)]
    words += ["--kills", ",".join(f"{iteration}:{victim}" for iteration, victim in plan), "--cores", cores(options)]
    if waits:
        # Further back than a recovery goes, and after the recovery before.
        words += ["--agent-output", str(folder / OUTPUT), "--stand-by-iterations", str(2 * options.window + 2)]
        words += ["--stand-by-seconds", str(STAND_BY_SECONDS)]
    if name == "dense":
        checkpoints = str(folder / "checkpoints")
        words += ["--save", checkpoints, "--load", checkpoints, "--save-interval", str(options.dense_interval)]
        return [sys.executable, *words]
    assert mode is not None
    words += ["--sparse-ckpt", "--sparse-ckpt-window", str(options.window), "--sparse-ckpt-window-mode", mode]
    words += ["--sparse-ckpt-dir", str(slots.parent), "--sparse-ckpt-name", slots.name, "--sparse-ckpt-reorder", "off"]
    words += ["--sparse-ckpt-progress", "plain", "--sparse-ckpt-transcript", "auto" if name == "local" else "off"]
    return [sys.executable, *words]


def measure(
    options: argparse.Namespace, name: str, mode: str | None, corpus: Path, folder: Path
) -> list[recovery_figures.Mark]:
    """Runs the job of a variant; its notes.

    Raises:
        VariantFailed: it has not ended well; the message holds the end of its output.
    """
    folder.mkdir()
    (folder / "checkpoints").mkdir()
    slots = Path("/dev/shm/moevement") / f"recovery-{uuid.uuid4().hex[:12]}"
    log = folder / OUTPUT
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    # Restarted workers must not look for the store of the launcher's first rendezvous.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    command = job_command(options, name, mode, corpus, folder, slots)
    started = time.monotonic()
    try:
        with log.open("wb") as output:
            job = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            try:
                status: int | str = job.wait(options.timeout_seconds)
            except subprocess.TimeoutExpired:
                status = f"none after {options.timeout_seconds:.0f} s"
            finally:
                end(job)
    finally:
        shutil.rmtree(slots, ignore_errors=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if status != 0:
        last = "\n  ".join(log.read_text(errors="replace").splitlines()[-12:])
        raise VariantFailed(f"the job's status is {status} after {time.monotonic() - started:.0f} s:\n  {last}")
    return recovery_figures.read(folder)


def end(job: subprocess.Popen[bytes]) -> None:
    """Ends the job's launcher, which ends its workers."""
    if job.poll() is None:
        job.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)


def heading(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, where and how."""
    import torch

    words = [Path(word).name if word == options.output else word for word in sys.argv[1:]]
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if options.device == "gpu" else []
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    known = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "command": " ".join(["python scripts/bench/recovery.py", *words]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": known[0] if known else platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "load_before": os.getloadavg()[0],
            "devices": names,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "model": options.model,
        "backend": backend(options)[-1],
        "ranks": ranks(options),
        "stages": options.pipeline,
        "micro_batches": MICRO_BATCHES,
        "cores_of_ranks": cores(options),
        "window": options.window,
        "dense_interval": options.dense_interval,
        "replacement": options.replacement,
        "kills": [{"iteration": iteration, "rank": victim} for iteration, victim in kills(options)],
        "variants": {},
        "failed": {},
    }


if __name__ == "__main__":
    sys.exit(main())
