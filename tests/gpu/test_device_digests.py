"""Digests that the GPU makes against those that threads make of the copied bytes, and a job that relies on them.

python -m pytest -m gpu -s tests/gpu/test_device_digests.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron.moevement.store.host_store import HostStore
from moevement_ext import DIGEST_LEAF_BYTES, CopyEngine, DeviceDigests, DigestPool, EngineError

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
DEVICE_BYTES = 256 * MIB
LIMITS = {"ranges_limit": 4000, "bytes_limit": 1 << 30}
TIMEOUT_SECONDS = 60.0
# The first slots come once the copies are calibrated.
KILL_AT, ITERATIONS = 16, 20
MODEL = (
    "--num-layers 2 --hidden-size 256 --num-attention-heads 4 --seq-length 128 --num-experts 4 --moe-router-topk 2 "
    "--moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall --bf16 --clip-grad 1.0 --micro-batch-size 1 "
    "--global-batch-size 4 --lr 2e-3 --lr-warmup-iters 3 --split 100,0,0 --tokenizer-type ByteLevelTokenizer "
    "--untie-embeddings-and-output-weights --disable-bias-linear "
    f"--train-iters {ITERATIONS}"
)
# Where there is no GPU, the job's test itself can be tried: "--use-cpu --distributed-backend gloo".
PLACE = os.environ.get("DIGEST_TEST_FLAGS", "--deterministic-mode --distributed-backend gloo").split()
Words = npt.NDArray[np.uint64]


def words(values: list[int]) -> Words:
    """As the native core takes them."""
    return np.array(values, dtype=np.uint64)


class Twin:
    """The same random bytes on the GPU and on the host."""

    def __init__(self, nbytes: int = DEVICE_BYTES) -> None:
        self.host = np.random.default_rng(5).integers(0, 256, nbytes, dtype=np.uint8)
        self.device = torch.from_numpy(self.host).cuda()
        torch.cuda.synchronize()

    def digests(self, ranges: list[tuple[int, int]]) -> bytes:
        """Of the host's bytes, by threads."""
        with DigestPool(4) as pool:
            base = self.host.ctypes.data
            ticket = pool.submit(words([base + at for at, _ in ranges]), words([size for _, size in ranges]))
            found = pool.wait(ticket, TIMEOUT_SECONDS)
        assert found is not None
        return found

    def on_device(self, digests: DeviceDigests, ranges: list[tuple[int, int]]) -> bytes:
        """Of the device's bytes, by the device."""
        base, stream = self.device.data_ptr(), torch.cuda.current_stream().cuda_stream
        sizes = words([size for _, size in ranges])
        found = digests.wait(
            digests.submit(words([base + at for at, _ in ranges]), sizes, stream, "a test"), TIMEOUT_SECONDS
        )
        assert found is not None
        return found


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [1, 16, 64, 500])
def test_random_ranges(blocks: int) -> None:
    twin, random = Twin(), np.random.default_rng(blocks)
    with DeviceDigests("cuda", **LIMITS, blocks=blocks) as digests:
        for largest in (300, 5000, 3 * DIGEST_LEAF_BYTES, 4 * MIB):
            ranges = [(0, 0)]
            for _ in range(150):
                size = int(random.integers(0, largest))
                start = int(random.integers(0, DEVICE_BYTES - size))
                ranges.append((start - start % (1, 2, 4, 8, 16)[int(random.integers(5))], size))
            assert twin.on_device(digests, ranges) == twin.digests(ranges)
        whole = [(0, DEVICE_BYTES)]
        assert twin.on_device(digests, whole) == twin.digests(whole)


@pytest.mark.gpu
def test_every_alignment_and_every_length_class() -> None:
    twin = Twin(2 * MIB)
    edges = [0, 1, 16, 17, 128, 129, 240, 241, 256, 1023, 1024, 1025, 1088, 2048, DIGEST_LEAF_BYTES]
    with DeviceDigests("cuda", **LIMITS) as digests:
        ranges = [(skew, base + edge) for skew in range(17) for base in (0, DIGEST_LEAF_BYTES) for edge in edges]
        assert twin.on_device(digests, ranges) == twin.digests(ranges)


@pytest.mark.gpu
def test_a_flipped_bit_is_noticed_in_any_leaf() -> None:
    twin, random = Twin(4 * MIB), np.random.default_rng(7)
    ranges = [(at * MIB, MIB - 100) for at in range(4)]
    with DeviceDigests("cuda", **LIMITS) as digests:
        before = twin.on_device(digests, ranges)
        assert before == twin.digests(ranges)
        for leaf in range(MIB // DIGEST_LEAF_BYTES):
            at = 2 * MIB + leaf * DIGEST_LEAF_BYTES + int(random.integers(DIGEST_LEAF_BYTES - 100))
            twin.device[at] ^= 1 << int(random.integers(8))
            after = twin.on_device(digests, ranges)
            twin.device[at] = int(twin.host[at])
            assert after[32:48] != before[32:48]
            assert after[:32] == before[:32] and after[48:] == before[48:]
        assert twin.on_device(digests, ranges) == before


@pytest.mark.gpu
def test_digests_made_beside_a_copy_are_those_of_the_copy() -> None:
    twin = Twin()
    copied = torch.empty(DEVICE_BYTES, dtype=torch.uint8, pin_memory=True)
    size = 1_000_004  # so that three of four addresses are no multiple of 16
    starts = list(range(0, DEVICE_BYTES - size, size))
    sources, sizes = words([twin.device.data_ptr() + at for at in starts]), words([size] * len(starts))
    targets = words([copied.data_ptr() + at for at in starts])
    with CopyEngine("cuda") as engine, DeviceDigests("cuda", **LIMITS) as digests, DigestPool(4) as pool:
        for number in range(4):
            copied.zero_()
            # Both wait for what the stream does to the bytes before.
            twin.device += number
            stream = torch.cuda.current_stream().cuda_stream
            ticket = digests.submit(sources, sizes, stream)
            assert engine.wait(engine.submit(sources, targets, sizes, stream), TIMEOUT_SECONDS)
            found = digests.wait(ticket, TIMEOUT_SECONDS)
            assert found is not None and found == pool.wait(pool.submit(targets, sizes), TIMEOUT_SECONDS)
            assert digests.seconds(ticket) > 0
        copied[5] ^= 1
        assert pool.wait(pool.submit(targets, sizes), TIMEOUT_SECONDS) != found, "the control"
        assert 0 < digests.device_bytes < 2 * MIB


@pytest.mark.gpu
def test_one_batch_at_a_time_and_errors() -> None:
    twin = Twin(MIB)
    with pytest.raises(EngineError, match=r"no CUDA device 99.*\[csrc/"):
        DeviceDigests("cuda", 99, **LIMITS)
    with DeviceDigests("cuda", **LIMITS) as digests:
        at, size = words([twin.device.data_ptr()]), words([MIB])
        first = digests.submit(at, size, label="first")
        with pytest.raises(EngineError, match="first are not over"):
            digests.submit(at, size)
        digests.cancel(first)
        torch.cuda.synchronize()
        assert twin.on_device(digests, [(0, MIB)]) == twin.digests([(0, MIB)])


def run_job(corpus: Path, directory: Path, name: str, *flags: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Status, output and events of a job of one process."""
    directory.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", str(ROOT / "pretrain_gpt.py"), *MODEL.split(), *PLACE]
    command += ["--data-path", str(corpus), "--state-digest", str(directory / "digest"), *flags]
    if name:
        command += ["--sparse-ckpt", "--sparse-ckpt-window", "3", "--sparse-ckpt-name", name]
        command += ["--sparse-ckpt-log-dir", str(directory), "--sparse-ckpt-progress", "plain"]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    log = directory / "events.rank00000.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done.returncode, done.stdout + done.stderr, events


@pytest.mark.gpu
def test_a_slot_that_is_damaged_in_host_memory_is_refused(tmp_path: Path) -> None:
    corpus, name = tmp_path / "text", f"gpu-digests-{os.getpid()}"
    prepare = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--python-stdlib", "--max-megabytes", "1"]
    subprocess.run([*prepare, "--output-prefix", str(corpus)], check=True, capture_output=True)
    slots = Path("/dev/shm/moevement") / name
    try:
        status, output, _ = run_job(corpus, tmp_path / "calm", "")
        assert status == 0, output[-4000:]
        kill = ("--sparse-ckpt-inject", f"kill@rank=0,point=forward,iteration={KILL_AT}")
        status, output, events = run_job(corpus, tmp_path / "killed", name, *kill)
        show("killed", output)
        assert status != 0 and signal.SIGKILL.name in output, output[-4000:]
        digested = {event["digested_by"] for event in events if event["kind"] == "slot"}
        assert digested == ({"threads"} if "--use-cpu" in PLACE else {"device"})
        assert not [event for event in events if event["kind"] == "slot_failed"]
        store = HostStore.open(slots / "rank00000.slots")
        newest = max(store.committed)
        data, _ = store.data(newest)
        data[256] ^= 4
        data.release()
        store.close()
        status, output, events = run_job(corpus, tmp_path / "again", name)
        show("again", output)
        assert status == 0, output[-4000:]
    finally:
        shutil.rmtree(slots, ignore_errors=True)
    (start,) = (event for event in events if event["kind"] == "start")
    assert any(f"slot of step {newest}: the digest of" in reason for reason in start["reasons"]), start
    # All other slots are right: the run goes up to the one before.
    assert len(start["reasons"]) == 1 and start["run"][1] == newest - 1
    calm, again = (json.loads((tmp_path / kind / "digest.rank00000.json").read_text()) for kind in ("calm", "again"))
    assert calm["state"] == again["state"] and again["history"].items() <= calm["history"].items()


def show(name: str, output: str) -> None:
    """Keeps the output where results are collected, if anywhere."""
    if directory := os.environ.get("RESULTS_DIRECTORY"):
        Path(directory, f"{name}.log").write_text(output)
