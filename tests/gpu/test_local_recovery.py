"""Localized recovery on GPUs: several ranks on one over gloo, one rank a GPU over NCCL; bitwise equal to a calm run.

python -m pytest -m gpu -s tests/gpu/test_local_recovery.py
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# The first slots come once the copies are calibrated.
ITERATIONS, LIMIT_SECONDS = 24, 65.0
MODEL = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 256 --num-experts 8 --moe-router-topk 2 "
    "--moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall --bf16 --clip-grad 1.0 --micro-batch-size 1 "
    "--global-batch-size 8 --lr 2e-3 --lr-warmup-iters 3 --deterministic-mode --split 100,0,0 "
    "--untie-embeddings-and-output-weights --disable-bias-linear --tokenizer-type ByteLevelTokenizer "
    f"--hidden-dropout 0.1 --attention-dropout 0.1 --train-iters {ITERATIONS}"
)
GPUS = torch.cuda.device_count()
LAYOUTS = [pytest.param("gloo", 2, 2, id="gloo-pp2-ep2")]
if GPUS >= 2:
    expert = GPUS // 2
    LAYOUTS.append(pytest.param("nccl", 2, expert, id=f"nccl-pp2-ep{expert}"))


def start(corpus: Path, directory: Path, layout: tuple[str, int, int], inject: str) -> subprocess.Popen[bytes]:
    """The job under the agent; its output in `directory`/log."""
    backend, stages, experts = layout
    directory.mkdir(parents=True)
    command = [sys.executable, "-m", "megatron.moevement.agent", "--nproc-per-node", str(stages * experts)]
    command += ["--hang-timeout-seconds", "60", str(ROOT / "pretrain_gpt.py"), *MODEL.split()]
    command += ["--data-path", str(corpus), "--distributed-backend", backend]
    command += ["--pipeline-model-parallel-size", str(stages), "--expert-model-parallel-size", str(experts)]
    command += ["--state-digest", str(directory / "digest"), "--sparse-ckpt", "--sparse-ckpt-window", "3"]
    command += ["--sparse-ckpt-name", f"gpu-{os.getpid()}-{directory.name}", "--sparse-ckpt-log-dir"]
    command += [str(directory / "events"), "--sparse-ckpt-progress", "plain"]
    command += ["--sparse-ckpt-inject", inject] if inject else []
    with (directory / "log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def ended(job: subprocess.Popen[bytes]) -> int | None:
    """The job's status; None: it takes too long."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return job.wait(LIMIT_SECONDS)
    return None


def events(directory: Path, ranks: int, kind: str) -> list[dict[str, Any]]:
    """Of all ranks."""
    found = []
    for rank in range(ranks):
        lines = (directory / "events" / f"events.rank{rank:05d}.jsonl").read_text().splitlines()
        found += [event for event in map(json.loads, lines) if event["kind"] == kind]
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "stages", "experts"), LAYOUTS)
def test_killed_and_recovered_in_place(tmp_path: Path, backend: str, stages: int, experts: int) -> None:
    corpus, ranks = tmp_path / "text", stages * experts
    prepare = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--python-stdlib", "--max-megabytes", "1"]
    subprocess.run([*prepare, "--output-prefix", str(corpus)], check=True, capture_output=True)
    plan = f"kill@rank={ranks - 1},iteration=14,point=forward:2; kill@rank=0,iteration=20,point=backward:1"
    jobs = {}
    for name, inject in (("calm", ""), ("killed", plan)):
        started = time.perf_counter()
        job = start(corpus, tmp_path / name, (backend, stages, experts), inject)
        try:
            assert ended(job) == 0, (tmp_path / name / "log").read_text()[-6000:]
        finally:
            job.kill()
        jobs[name] = time.perf_counter() - started
    decisions = events(tmp_path / "killed", ranks, "decision")
    assert {event["source"] for event in decisions} == {"local"}, decisions
    for rank in range(ranks):
        calm, killed = (
            json.loads((tmp_path / name / f"digest.rank{rank:05d}.json").read_text()) for name in ("calm", "killed")
        )
        assert calm["state"] == killed["state"]
        assert killed["history"].items() <= calm["history"].items()
    for event in events(tmp_path / "killed", ranks, "resumed"):
        print(f"\n{torch.cuda.get_device_name()} {backend} rank {event['rank']}:", json.dumps(event))
    print(f"seconds: {jobs}")
