"""What a sparse snapshot in every iteration costs: iterations with and without, interleaved in one run of one job.

    python scripts/bench/overhead.py                                       the demo's model on the CPU, 4 processes
    python scripts/bench/overhead.py --model 16-experts --window auto      1.7 B parameters on one GPU
    python scripts/bench/overhead.py --model 64-experts --variants off,sparse,sparse-undigested,dcp,nvrx

Blocks of iterations alternate between the variants. `off`: the manager isn't called. `sparse`: a slot in every
iteration, with digests as `--digest` says; `sparse-undigested`: without. `sparse-copy`: what a slot holds, by torch's
`copy_` on a side stream. `dense-sync`, `dense-side`: everything in every iteration by `copy_`, waited for at once or on
a side stream. A sparse variant may have switches, such as `sparse:digests=host`, `sparse:digests=device:blocks=32`,
`sparse:chunks=2x4` (MiB, in flight), `sparse:copies=off:digests=off` or `sparse:pauses` (scripts/bench/switches.py).
`transcript`: what crosses stage boundaries is logged as under the agent, without slots; `sparse-transcript`: both.
They need several stages (`--model 8-experts-pp4-gloo`: four ranks on one GPU; `16-experts-pp2`: a rank a GPU over
NCCL). If an iteration is missing in the transcript the exit status is 1: to write less would look cheap.
`dcp`: torch.distributed.checkpoint.async_save of everything in every iteration; `nvrx`: the local checkpoint of
nvidia-resiliency-ext; both run after the others, because a save takes many iterations. All blocks train on the same
batches, at a small learning rate, so that routers send the same tokens to the same experts. The first iteration of a
block isn't counted, because the block before it is still being digested.

On a GPU iterations vary by several percent over seconds. Each block of a variant therefore has a block of `off` beside
it, and what counts is the ratio of their medians: the median over all pairs, and its 95% interval (bootstrap; none for
fewer than six pairs). Many short blocks (`--block 3 --blocks 20`) resolve small overheads, few long ones don't.

Besides the time of iterations it shows how long processors were busy in them, all threads of all ranks together.
Writes `<output>.json` and `<output>.png`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.bench.overhead_report import LABELS, left_out, plot, print_table

WORKER = Path(__file__).resolve().parent / "overhead_worker.py"
SLOTS = Path("/dev/shm/moevement")

# The gradients' norm is computed, and they are never scaled: some iterations would be longer than others.
COMMON = "--bf16 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0.01 --clip-grad 1000 "
COMMON += (
    "--lr 1e-6 --lr-decay-style constant --split 100,0,0 --tokenizer-type ByteLevelTokenizer --train-iters 1000000"
)
DEMO = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --num-experts 8 --hidden-dropout 0.1 "
    "--attention-dropout 0.1 --micro-batch-size 1 --global-batch-size 4 --pipeline-model-parallel-size 2 "
    "--expert-model-parallel-size 2 --use-cpu --distributed-backend gloo"
)
# One micro-batch of 65,536 tokens. Experts are launched one by one; where the GPU is done with one before the host has
# launched the next, the host's noise is what is measured. So there are few layers of large experts, and of more of them
# each token goes to more: each has 8,192 tokens.
LARGE = (
    "--num-layers 2 --hidden-size 2048 --num-attention-heads 16 --seq-length 1024 --swiglu --disable-bias-linear "
    "--hidden-dropout 0 --attention-dropout 0 --micro-batch-size 64 --global-batch-size 64 "
)
# name -> (processes, flags)
MODELS = {
    "demo": (4, DEMO),
    "16-experts": (1, LARGE + "--num-experts 16 --moe-ffn-hidden-size 8192"),
    "32-experts": (1, LARGE + "--num-experts 32 --moe-ffn-hidden-size 4096 --moe-router-topk 4"),
    # Over NCCL, four micro-batches through a stage a GPU.
    "16-experts-pp2": (
        2,
        LARGE + "--num-layers 4 --micro-batch-size 8 --global-batch-size 32 --num-experts 16 "
        "--moe-ffn-hidden-size 4096 --pipeline-model-parallel-size 2 --untie-embeddings-and-output-weights "
        "--distributed-backend nccl",
    ),
    # Four ranks share one GPU, eight micro-batches: boundary tensors of 4 MiB.
    "8-experts-pp4-gloo": (
        4,
        "--num-layers 4 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --num-experts 8 "
        "--disable-bias-linear --hidden-dropout 0 --attention-dropout 0 --micro-batch-size 2 --global-batch-size 16 "
        "--pipeline-model-parallel-size 4 --untie-embeddings-and-output-weights --distributed-backend gloo",
    ),
    "64-experts": (
        1,
        LARGE + "--num-layers 1 --hidden-size 4096 --num-experts 64 --moe-ffn-hidden-size 2048 --moe-router-topk 8",
    ),
    # Twice the launches for as much arithmetic: the host can't keep the device busy.
    "64-experts-launches": (1, LARGE + "--num-experts 64 --moe-ffn-hidden-size 2048 --moe-router-topk 8"),
}
# Variants that write a transcript, and those whose name may be followed by switches.
TRANSCRIBED = ("transcript", "sparse-transcript")
SWITCHED = ("sparse", "sparse-transcript")
# With fewer pairs even their whole range holds the median with less than 95%.
FEWEST_PAIRS = 6
RESAMPLINGS, SEED = 10_000, 1


def main() -> int:
    """Run the benchmark; the exit status is that of the job."""
    options = parse()
    output = Path(options.output)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "text"
        prepare = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--python-stdlib"]
        subprocess.run([*prepare, "--max-megabytes", "2", "--output-prefix", str(corpus)], check=True, stdout=2)
        raw = Path(scratch) / "raw.json"
        name = f"overhead-{uuid.uuid4().hex[:12]}"
        with running(job_command(options, corpus, raw, name), SLOTS / name) as job:
            status = wait(job, options.limit_seconds)
            if status:
                print(f"the job ended with status {status}: results are of what it measured before", file=sys.stderr)
            if not raw.exists():
                return status or 1
            # Before a job that took too long is ended: to free its pinned memory takes it a while.
            problem = report(summarize(options, json.loads(raw.read_text())), output)
            return status or problem


def report(result: dict[str, Any], output: Path) -> int:
    """Writes, plots and prints the result; the exit status, 1 if a transcript wasn't written."""
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, output.with_suffix(".png"))
    print_table(result)
    problem = transcript_problem(result)
    if problem:
        print(f"its figures say nothing of the transcript: {problem}", file=sys.stderr)
    return 1 if problem else 0


def transcript_problem(result: dict[str, Any]) -> str:
    """Why a variant says nothing about the transcript; empty if every one of its iterations was written."""
    for name, one in result["variants"].items():
        if is_transcribed(name) and ("transcript" not in one or not one["transcript"]["iterations"]):
            return f"{name}: nothing was written to the transcript"
        if "transcript" in one and any(one["transcript"]["left_out_by_rank"]):
            return f"{name}: {left_out(one['transcript'])}"
    return ""


def is_transcribed(name: str) -> bool:
    """Whether a variant writes a transcript."""
    return name.partition(":")[0] in TRANSCRIBED


@contextlib.contextmanager
def running(command: list[str], slots: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A job, which is over afterwards, and its slots are gone; its workers don't outlive it."""
    with subprocess.Popen(command, cwd=ROOT, env=environment()) as job:
        try:
            yield job
        finally:
            # The launcher ends its workers, and kills those that don't within half a minute.
            job.terminate()
            job.wait()
            shutil.rmtree(slots, ignore_errors=True)


def wait(job: subprocess.Popen[bytes], limit_seconds: float | None) -> int:
    """The job's status; 124 if it takes longer than the limit."""
    try:
        return job.wait(limit_seconds)
    except subprocess.TimeoutExpired:
        return 124


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="demo")
    parser.add_argument("--window", default="4", help="W, or auto")
    parser.add_argument("--copy-share", help="--sparse-ckpt-copy-share of the job, for --window auto")
    parser.add_argument("--mode", choices=("fixed", "rolling"), default="rolling")
    parser.add_argument("--digest", choices=("on", "host", "off"), default="on", help="--sparse-ckpt-digest of the job")
    parser.add_argument("--variants", default="off,sparse", help="comma list; see above")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of each variant")
    parser.add_argument("--block", type=int, default=6, help="iterations of a block, the first of which isn't counted")
    parser.add_argument("--slow-iterations", type=int, default=3, help="counted iterations of dcp and nvrx")
    parser.add_argument(
        "--profile", type=int, default=0, help="iterations of each variant under torch's profiler, on a GPU"
    )
    parser.add_argument(
        "--baseline-every", type=int, default=1, help="dense and sparse-copy take part in every N-th round only"
    )
    parser.add_argument("--scratch", default="", help="directory for what dcp and nvrx write; default: a temporary one")
    parser.add_argument("--output", default="runs/overhead", help="path of the results without ending")
    parser.add_argument(
        "--limit-seconds",
        type=float,
        help="run fewer rounds, so that all variants have their turn until then; end the job then",
    )
    options = parser.parse_args()

    def refuse(text: str) -> NoReturn:
        parser.exit(2, f"overhead.py: error: {text}\n")

    counted = options.blocks * (options.block - 1) if min(options.blocks, options.block) > 0 else 0
    # Quartiles need two.
    if min(counted, options.slow_iterations) < 2:
        refuse("--blocks, --block and --slow-iterations: at least two iterations of each variant must count")
    if options.baseline_every < 1:
        refuse(f"--baseline-every {options.baseline_every}: give 1 or more")
    names = options.variants.split(",")
    if options.window != "auto" and not (options.window.isdigit() and int(options.window) > 0):
        refuse(f"--window {options.window}: give a number of slots or auto")
    try:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--output {options.output}: {error.strerror}; choose another directory")
    unknown = {name for name in names if name.partition(":")[0] not in LABELS}
    if unknown:
        refuse(f"--variants {options.variants}: {min(unknown)} is unknown: give 'off' and any of {', '.join(LABELS)}")
    if "off" not in names:
        refuse(f"--variants {options.variants}: 'off' is missing, which all others are compared with")
    for name in names:
        if ":" in name and name.partition(":")[0] not in SWITCHED:
            refuse(f"--variants {name}: only {' and '.join(SWITCHED)} have switches")
        if is_transcribed(name) and stages(options.model) == 1:
            several = ", ".join(model for model in sorted(MODELS) if stages(model) > 1)
            refuse(
                f"--variants {name}: nothing crosses a stage boundary in --model {options.model}; take one of {several}"
            )
    if "transcript" in names and options.window == "auto" and not any(name.startswith("sparse") for name in names):
        refuse("--window auto: the transcript alone has no slots to plan a window for; give W or add sparse")
    return options


def stages(model: str) -> int:
    """Pipeline stages of a model."""
    words = MODELS[model][1].split()
    flag = "--pipeline-model-parallel-size"
    return int(words[words.index(flag) + 1]) if flag in words else 1


def job_command(options: argparse.Namespace, corpus: Path, raw: Path, name: str) -> list[str]:
    """The torchrun command of the job, whose slots are in `SLOTS`/`name`."""
    processes, model = MODELS[options.model]
    sparse = ["--sparse-ckpt", "--sparse-ckpt-window", options.window, "--sparse-ckpt-window-mode", options.mode]
    sparse += ["--sparse-ckpt-copy-share", options.copy_share] if options.copy_share else []
    sparse += ["--sparse-ckpt-reorder", "off", "--sparse-ckpt-digest", options.digest]
    sparse += ["--sparse-ckpt-dir", str(SLOTS), "--sparse-ckpt-name", name]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [*COMMON.split(), *model.split(), "--data-path", str(corpus), *sparse]
    measured = ["--raw", str(raw), "--blocks", str(options.blocks), "--block", str(options.block)]
    measured += ["--variants", options.variants, "--slow-iterations", str(options.slow_iterations)]
    measured += ["--profile", str(options.profile)]
    measured += ["--baseline-every", str(options.baseline_every)]
    measured += ["--scratch", options.scratch or str(raw.parent)]
    if options.limit_seconds is not None:
        measured += ["--ends-at", str(time.time() + options.limit_seconds)]
    return [*launcher, str(WORKER), *words, *measured]


def environment() -> dict[str, str]:
    """One thread a process: four of them share the cores."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def summarize(options: argparse.Namespace, raw: dict[str, Any]) -> dict[str, Any]:
    """Medians and quartiles (seconds), and each variant's overhead: ratio to `off` of the same run, less one."""
    variants: dict[str, dict[str, Any]] = {}
    for name, blocks in raw["blocks"].items():
        seconds, busy = [s for block in blocks for s in block], raw["processor_seconds"][name]
        # One iteration is all there is if the job had no time for more.
        low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        variants[name] = {
            "iterations": len(seconds),
            "median": middle,
            "quartiles": [low, high],
            "processor_median": statistics.median(busy),
            "peak_device_mib": raw["peak_device_mib"][name],
            "seconds": seconds,
            "processor_seconds": busy,
        }
    off = variants["off"]
    for name, one in variants.items():
        blocks = raw["blocks"][name]
        one["overhead"] = one["median"] / off["median"] - 1
        one["processor_overhead"] = one["processor_median"] / off["processor_median"] - 1
        one["interval_at_3_percent"] = max(1, math.ceil((one["median"] - off["median"]) / (0.03 * off["median"])))
        beside = raw["off_beside"].get(name)
        if beside:
            neighbours = [(raw["blocks"]["off"][place], block) for place, block in zip(beside, blocks, strict=True)]
            pairs = sorted(statistics.median(block) / statistics.median(plain) - 1 for plain, block in neighbours)
            one["overhead_of_block_pairs"] = pairs
            one["overhead_median_of_pairs"] = statistics.median(pairs)
            one["overhead_interval_95"] = interval_of_median(pairs)
    slots = raw["slots"]
    for name, values in slots.pop("by_variant", {}).items():
        variants[name]["slot"] = {kind: statistics.median(seconds) for kind, seconds in values.items()}
    transcript = raw["transcript"]
    for name, found in raw["profile"].items():
        variants[name]["on_device"] = found
    for name, written in transcript.pop("by_variant", {}).items():
        variants[name]["transcript"] = written
    if slots:
        slots["begin_seconds"] = statistics.median(slots["begin_seconds"])
    return {
        "command": command(options),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "device": raw["device"],
            "python": platform.python_version(),
            "torch": raw["torch"],
        },
        "model": options.model,
        "processes": MODELS[options.model][0],
        "parameters": raw["parameters"],
        "mode": options.mode,
        "digest": options.digest,
        "slots": slots,
        "transcript": transcript,
        "variants": variants,
    }


def interval_of_median(values: list[float]) -> list[float] | None:
    """Bootstrap: between which numbers the median of what `values` were drawn from lies with 95%."""
    if len(values) < FEWEST_PAIRS:
        return None
    drawn = np.random.default_rng(SEED).choice(values, (RESAMPLINGS, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return [float(low), float(high)]


def command(options: argparse.Namespace) -> str:
    """The command line, without the directory that the results went to."""
    words = [Path(word).name if word == options.output else word for word in sys.argv[1:]]
    return " ".join(["python scripts/bench/overhead.py", *words])


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
