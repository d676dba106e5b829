"""What a sparse snapshot in every iteration costs: iterations with and without, interleaved in one run of one job.

    python scripts/bench/overhead.py                                  the demo's model on the CPU, 4 processes
    python scripts/bench/overhead.py --model 16-experts --window 4    2.6 B parameters on one GPU

Blocks of iterations alternate between `off` (the manager isn't called) and `sparse` (a slot in every iteration, with
digests). The first iteration of a block isn't counted, because the block before it is still being digested. Writes
`<output>.json` and `<output>.png`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).resolve().parent / "overhead_worker.py"

COMMON = "--bf16 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0.01 --clip-grad 1.0 "
COMMON += (
    "--lr 1e-4 --lr-decay-style constant --split 100,0,0 --tokenizer-type ByteLevelTokenizer --train-iters 1000000"
)
DEMO = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --num-experts 8 --hidden-dropout 0.1 "
    "--attention-dropout 0.1 --micro-batch-size 1 --global-batch-size 4 --pipeline-model-parallel-size 2 "
    "--expert-model-parallel-size 2 --use-cpu --distributed-backend gloo"
)
# name -> (processes, flags)
MODELS = {
    "demo": (4, DEMO),
    "16-experts": (
        1,
        "--num-layers 6 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 --num-experts 16 --swiglu "
        "--moe-ffn-hidden-size 4096 --disable-bias-linear --hidden-dropout 0 --attention-dropout 0 "
        "--micro-batch-size 2 --global-batch-size 4",
    ),
}


def main() -> int:
    """Run the benchmark; the exit status is that of the job."""
    options = parse()
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "text"
        prepare = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--python-stdlib"]
        subprocess.run([*prepare, "--max-megabytes", "2", "--output-prefix", str(corpus)], check=True, stdout=2)
        raw = Path(scratch) / "raw.json"
        status = subprocess.run(job_command(options, corpus, raw), cwd=ROOT, env=environment(), check=False).returncode
        if status:
            return status
        result = summarize(options, json.loads(raw.read_text()))
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, output.with_suffix(".png"))
    print_table(result)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="demo")
    parser.add_argument("--window", default="4", help="W, or auto")
    parser.add_argument("--mode", choices=("fixed", "rolling"), default="rolling")
    parser.add_argument("--digest", choices=("on", "off"), default="on")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of each variant")
    parser.add_argument("--block", type=int, default=6, help="iterations of a block, the first of which isn't counted")
    parser.add_argument("--output", default="runs/overhead", help="path of the results without ending")
    return parser.parse_args()


def job_command(options: argparse.Namespace, corpus: Path, raw: Path) -> list[str]:
    """The torchrun command of the job."""
    processes, model = MODELS[options.model]
    sparse = ["--sparse-ckpt", "--sparse-ckpt-window", options.window, "--sparse-ckpt-window-mode", options.mode]
    sparse += ["--sparse-ckpt-reorder", "off", "--sparse-ckpt-digest", options.digest]
    sparse += ["--sparse-ckpt-name", f"overhead-{uuid.uuid4().hex[:12]}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [*model.split(), *COMMON.split(), "--data-path", str(corpus), *sparse]
    measured = ["--raw", str(raw), "--blocks", str(options.blocks), "--block", str(options.block)]
    return [*launcher, str(WORKER), *words, *measured]


def environment() -> dict[str, str]:
    """One thread a process: four of them share the cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def summarize(options: argparse.Namespace, raw: dict[str, Any]) -> dict[str, Any]:
    """Medians, quartiles (seconds) and the ratio of the medians; per pair of neighbouring blocks too."""
    seconds = raw["seconds"]
    variants = {}
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        variants[name] = {"iterations": len(values), "median": middle, "quartiles": [low, high], "seconds": values}
    pairs = [statistics.median(s) / statistics.median(o) - 1 for o, s in zip(*raw["blocks"].values(), strict=True)]
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "device": raw["device"],
            "python": platform.python_version(),
            "torch": raw["torch"],
        },
        "model": options.model,
        "parameters": raw["parameters"],
        "window": raw["window"],
        "mode": options.mode,
        "variants": variants,
        "overhead": variants["sparse"]["median"] / variants["off"]["median"] - 1,
        "overhead_of_block_pairs": sorted(pairs),
        "slot_mib": raw["slot_bytes"] / (1 << 20),
        "stall_seconds": statistics.median(raw["stall_seconds"]),
        "begin_seconds": statistics.median(raw["begin_seconds"]),
        "copy_seconds": statistics.median(raw["copy_seconds"]),
        "digest_seconds": statistics.median(raw["digest_seconds"]),
        "failed_slots": raw["failed_slots"],
        "peak_device_mib": raw["peak_device_mib"],
    }


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_table(result: dict[str, Any]) -> None:
    """The result for people."""
    machine = result["machine"]
    size = result["parameters"] / 1e6
    print(f"\n{result['model']}: {size:.1f} M parameters a rank, W={result['window']} {result['mode']}")
    print(f"{machine['device']}, {machine['cores']} cores ({machine['processor']}), torch {machine['torch']}")
    for name, values in result["variants"].items():
        low, high = values["quartiles"]
        print(
            f"  {name:7s} median {values['median']:.4f} s, quartiles {low:.4f} to {high:.4f}, n={values['iterations']}"
        )
    pairs = result["overhead_of_block_pairs"]
    print(
        f"  overhead {100 * result['overhead']:+.2f}% (block pairs {100 * pairs[0]:+.2f}% to {100 * pairs[-1]:+.2f}%)"
    )
    print(
        f"  slot {result['slot_mib']:.2f} MiB: begin {1000 * result['begin_seconds']:.2f} ms on the training thread, "
        f"copy {1000 * result['copy_seconds']:.2f} ms, stall {1000 * result['stall_seconds']:.2f} ms, "
        f"digest {1000 * result['digest_seconds']:.2f} ms; failed slots {result['failed_slots']}"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Every counted iteration of both variants, with medians."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    for row, values in enumerate(result["variants"].values()):
        milliseconds = [1000 * s for s in values["seconds"]]
        axes.scatter(milliseconds, [row + 0.04 * (i % 7 - 3) for i in range(len(milliseconds))], s=14, alpha=0.5)
        axes.plot([1000 * values["median"]] * 2, [row - 0.3, row + 0.3], color="black", linewidth=1.5)
    axes.set_yticks(
        range(len(result["variants"])), ["no snapshots", "sparse, every iteration"][: len(result["variants"])]
    )
    axes.set_ylim(-0.6, 1.6)
    axes.set_xlabel("milliseconds an iteration (line: median)")
    axes.set_title(
        f"{result['model']}: overhead {100 * result['overhead']:+.2f}% on {result['machine']['device']}", loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
