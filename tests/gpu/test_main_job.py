"""The main job on one GPU: several ranks over gloo, a worker killed, everything bitwise equal.

python -m pytest -m gpu tests/gpu
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The first slots come once the copies are calibrated.
RANKS, ITERATIONS, KILL_AT = 4, 30, 12

MODEL = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --num-experts 8 --moe-router-topk 2 "
    "--moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall --pipeline-model-parallel-size 2 "
    "--expert-model-parallel-size 2 --bf16 --clip-grad 1.0 --micro-batch-size 1 --global-batch-size 8 --lr 2e-3 "
    "--lr-warmup-iters 3 --distributed-backend gloo --deterministic-mode --split 100,0,0 "
    f"--tokenizer-type ByteLevelTokenizer --train-iters {ITERATIONS}"
)


def start(corpus: Path, directory: Path, flags: list[str]) -> subprocess.Popen[bytes]:
    """Starts the job under torchrun, its output in `directory`/log."""
    directory.mkdir(parents=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--monitor-interval", "0.1"]
    launcher += ["--max-restarts", "3", str(ROOT / "pretrain_gpt.py"), *MODEL.split(), "--data-path", str(corpus)]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    with (directory / "log").open("w") as log:
        command = [*launcher, "--state-digest", str(directory / "digest"), *flags]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def pid_of(events: Path, rank: int) -> int:
    """The worker of `rank`: the process that has the rank's event file open."""
    wanted = events / f"events.rank{rank:05d}.jsonl"
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if any(link.resolve() == wanted for link in (process / "fd").iterdir()):
                    return int(process.name)
            except OSError:
                continue
    raise AssertionError(f"no process of rank {rank}")


def loadable(events: Path) -> bool:
    """Whether every rank can load some step."""
    told = (json.loads(line) for line in events.read_text().splitlines(keepends=True) if line.endswith("\n"))
    return any(event["kind"] == "iteration" and event["loadable_step"] >= KILL_AT for event in told)


def digests(directory: Path) -> list[dict[str, dict[str, object]]]:
    """What each rank wrote of its state at the end."""
    return [json.loads((directory / f"digest.rank{rank:05d}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", [[], ["--use-distributed-optimizer"]], ids=["whole", "distributed"])
def test_killed_on_the_gpu_and_bit_identical(tmp_path: Path, optimizer: list[str]) -> None:
    corpus = tmp_path / "text"
    prepare = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--python-stdlib", "--max-megabytes", "1"]
    subprocess.run([*prepare, "--output-prefix", str(corpus)], check=True, capture_output=True)
    calm = start(corpus, tmp_path / "calm", optimizer)
    assert calm.wait(240) == 0, (tmp_path / "calm" / "log").read_text()[-3000:]
    events = (tmp_path / "events").resolve()
    flags = ["--sparse-ckpt", "--sparse-ckpt-window", "3", "--sparse-ckpt-name", f"gpu-{os.getpid()}"]
    killed = start(corpus, tmp_path / "killed", [*optimizer, *flags, "--sparse-ckpt-log-dir", str(events)])
    first = events / "events.rank00000.jsonl"
    while not (first.exists() and loadable(first)):
        assert killed.poll() is None, (tmp_path / "killed" / "log").read_text()[-3000:]
        time.sleep(0.02)
    os.kill(pid_of(events, 3), signal.SIGKILL)
    assert killed.wait(300) == 0, (tmp_path / "killed" / "log").read_text()[-3000:]
    assert '"recovery_finished"' in first.read_text()
    for calm_rank, killed_rank in zip(digests(tmp_path / "calm"), digests(tmp_path / "killed"), strict=True):
        assert calm_rank["state"] == killed_rank["state"]
        assert killed_rank["history"].items() <= calm_rank["history"].items()
