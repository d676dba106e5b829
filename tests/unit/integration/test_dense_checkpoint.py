"""Dense checkpoints over gloo: exact restore, failures that all ranks agree on, crashes in the middle of a save."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.distributed
WORKER = ROOT / "tests" / "distributed" / "dense_checkpoint_worker.py"
MODEL = """--hidden-size 32 --num-attention-heads 2 --seq-length 32 --num-experts 4 --moe-router-topk 2
 --micro-batch-size 1 --train-iters 8 --lr 1e-2 --lr-warmup-iters 3 --lr-decay-style cosine --clip-grad 0.5
 --make-vocab-size-divisible-by 16 --distributed-timeout-minutes 6""".split()

CASES = {
    "replicated": (
        4,
        "--num-layers 2 --bf16 --pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --global-batch-size 4"
        " --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-token-dispatcher-type alltoall",
    ),
    "distributed": (
        4,
        "--num-layers 2 --bf16 --pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --global-batch-size 4"
        " --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --hidden-dropout 0.1"
        " --untie-embeddings-and-output-weights --moe-aux-loss-coeff 1e-2",
    ),
    "interleaved_fp16": (
        2,
        "--num-layers 4 --disable-bias-linear --fp16 --initial-loss-scale 131072 --hysteresis 1 --loss-scale-window 2"
        " --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 2",
    ),
    "skipped_fp16": (
        2,
        "--num-layers 2 --disable-bias-linear --fp16 --initial-loss-scale 1e30 --hysteresis 1 --global-batch-size 2",
    ),
    "interleaved_distributed": (
        4,
        "--num-layers 4 --bf16 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
        " --use-distributed-optimizer --disable-bias-linear --swiglu --normalization RMSNorm --global-batch-size 4",
    ),
    "tensor_small_buckets": (
        4,
        "--num-layers 2 --bf16 --tensor-model-parallel-size 2 --sequence-parallel --global-batch-size 4"
        " --disable-bias-linear --use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 100",
    ),
}


@pytest.fixture(scope="module")
def corpus(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    assert ranks.codes("corpus", folder, 1, []) == [0], (folder / "corpus.rank0.log").read_text()
    return ["--data-path", str(folder / "corpus")]


class Ranks:
    """The fork server of `dense_checkpoint_worker.py`; `device` is `cpu` or `cuda`."""

    def __init__(self, device: str) -> None:
        self._flags = ["--use-cpu"] if device == "cpu" else ["--deterministic-mode"]
        # Asking the driver for devices would keep the forked ranks from using them; NVML may be asked.
        environment = {**os.environ, "MOEVEMENT_TEST_DEVICE": device, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        if device == "cuda" and not environment.get("CUDA_VISIBLE_DEVICES"):
            environment.pop("CUDA_VISIBLE_DEVICES", None)  # the other tests of this process hide them
        self._server = subprocess.Popen(
            [sys.executable, str(WORKER)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout is not None and self._server.stdout.readline() == "ready\n"

    def run(self, scenario: str, folder: Path, ranks: int, flags: list[str]) -> list[dict[str, Any]]:
        """What each rank found; all must have ended well."""
        codes = self.codes(scenario, folder, ranks, flags)
        logs = [(folder / f"{scenario}.rank{rank}.log").read_text() for rank in range(ranks)]
        assert codes == [0] * ranks, "\n".join(logs)
        return [json.loads((folder / f"{scenario}.rank{rank}.json").read_text()) for rank in range(ranks)]

    def codes(self, scenario: str, folder: Path, ranks: int, flags: list[str]) -> list[int]:
        """The exit code of each rank."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        request = {
            "scenario": scenario,
            "folder": str(folder),
            "ranks": ranks,
            "flags": self._flags + MODEL + flags,
            "port": port,
        }
        assert self._server.stdin is not None and self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        answer: list[int] = json.loads(self._server.stdout.readline())
        return answer

    def close(self) -> None:
        """Ends the server."""
        self._server.kill()
        self._server.wait()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    server = Ranks("cpu")
    yield server
    server.close()


@pytest.fixture(scope="module")
def gpu_ranks() -> Iterator[Ranks]:
    server = Ranks("cuda")
    yield server
    server.close()


def compare(ranks: Ranks, count: int, flags: list[str], folder: Path) -> list[dict[str, Any]]:
    """Trains, saves and trains on; loads in new processes and trains on; compares every bit."""
    saved = ranks.run("save", folder, count, flags)
    loaded = ranks.run("load", folder, count, flags)
    for before, after in zip(saved, loaded, strict=True):
        assert before["ok"], before["error"]
        assert before["disturbed"] == []
        assert (after["newest"], after["step"]) == (3, 3)
        assert differing(before["saved"], after["loaded"]) == []
        assert after["same_addresses"]
        assert after["history"] == before["history"]
        assert differing(before["final"], after["final"]) == []
    assert any(after["flipped_final"] != before["final"] for before, after in zip(saved, loaded, strict=True))
    return saved


@pytest.mark.parametrize("case", CASES)
def test_a_load_restores_every_bit(case: str, ranks: Ranks, corpus: list[str], tmp_path: Path) -> None:
    count, text = CASES[case]
    flags = text.split() + corpus
    saved = compare(ranks, count, flags, tmp_path)
    assert (tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert saved[0]["nbytes"] == sum(
        p.stat().st_size for p in (tmp_path / "save" / "iter_0000003").iterdir() if p.suffix != ".json"
    )
    if "fp16" in case:
        skipped = ["True" in outcome for outcome in saved[0]["first"] + saved[0]["history"]]
        assert any(skipped) and all(skipped) == (case == "skipped_fp16"), saved[0]
    if case == "distributed":
        changed = [flag for flag in flags if not flag.startswith("--overlap")]
        refused = ranks.run("mismatch", tmp_path, count, changed)
        assert {answer["refused"].split(" was ")[0] for answer in refused} == {"ConfigError: --overlap-grad-reduce"}


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_failed_save_is_agreed_and_leaves_the_former_checkpoint(
    ranks: Ranks, corpus: list[str], tmp_path: Path, small_disk: Path
) -> None:
    flags = [
        *"--num-layers 2 --disable-bias-linear --bf16 --global-batch-size 2 --use-distributed-optimizer".split(),
        *corpus,
    ]
    for found in ranks.run("fail", tmp_path, 2, flags):
        assert found["first"] and found["retry"] and found["again"]
        assert "delete old checkpoints" in found["too_small"]
        assert "No space left" in found["disk_full"]
        assert found["left_on_full_disk"] == []
        assert found["one_rank"].startswith("rank 1:") and "File too large" in found["one_rank"]
        assert found["not_a_directory"].startswith("rank 0:")
        assert found["newest_after_failures"] == 1
        assert found["names"] == ["iter_0000001", "iter_0000003", "latest_checkpointed_iteration.txt"]
        refused = found["refused"]
        assert refused["flipped"].startswith("StoreError") and "digest is wrong" in refused["flipped"]
        assert refused["absent"].startswith("StoreError")
        assert refused["foreign"].startswith("ConfigError: --load")
        assert refused["unchanged"] and refused["older"] == 1
        assert all("\n" not in found[name] for name in ("too_small", "disk_full", "one_rank", "not_a_directory"))


def test_a_crash_in_the_middle_of_a_save_leaves_the_former_checkpoint(
    ranks: Ranks, corpus: list[str], tmp_path: Path
) -> None:
    flags = [*"--num-layers 2 --disable-bias-linear --bf16 --global-batch-size 2".split(), *corpus]
    codes = ranks.codes("crash", tmp_path, 2, flags)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    before = [json.loads((tmp_path / f"before_crash.rank{rank}.json").read_text()) for rank in range(2)]
    for saved, found in zip(before, ranks.run("after_crash", tmp_path, 2, flags), strict=True):
        assert saved["ok"] and found["newest"] == 3 and found["ok"]
        assert differing(saved["state"], found["loaded"]) == []
        assert "iter_0000004.partial" in found["left"]
        assert found["cleared"] == ["iter_0000003", "iter_0000004", "latest_checkpointed_iteration.txt"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("count", "text"),
    [
        (1, "--num-layers 2 --bf16 --global-batch-size 2"),
        (1, "--num-layers 2 --fp16 --initial-loss-scale 131072 --global-batch-size 2 --use-distributed-optimizer"),
    ],
    ids=["replicated", "distributed"],
)
def test_a_load_restores_every_bit_on_a_gpu(
    gpu_ranks: Ranks, count: int, text: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    data = tmp_path_factory.mktemp("gpu_data")
    assert gpu_ranks.codes("corpus", data, 1, []) == [0], (data / "corpus.rank0.log").read_text()
    compare(gpu_ranks, count, [*text.split(), "--disable-bias-linear", "--data-path", str(data / "corpus")], tmp_path)
