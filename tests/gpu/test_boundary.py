"""The boundary transcript on one GPU: fingerprints, copies behind a busy stream, a stage that replays alone.

python -m pytest -m gpu tests/gpu
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.moevement.integration.fingerprint import fingerprint
from megatron.moevement.integration.log_copy import EngineCopier
from moevement_ext import CopyEngine, HostRegion

ROOT = Path(__file__).resolve().parents[2]
# Of the fingerprint, whose keys repeat after so many.
BLOCK_WORDS = 1 << 21
MODEL = (
    "--num-layers 4 --hidden-size 512 --num-attention-heads 8 --seq-length 512 --num-experts 8 --moe-router-topk 2 "
    "--moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall --bf16 --micro-batch-size 2 --global-batch-size 16 "
    "--lr 2e-3 --distributed-backend gloo --split 100,0,0 --tokenizer-type ByteLevelTokenizer --train-iters 2 "
    "--disable-bias-linear --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 "
)


@pytest.mark.gpu
@pytest.mark.parametrize("elements", [1, 3, 1000, 2 * BLOCK_WORDS, 5 * BLOCK_WORDS + 17])
def test_a_fingerprint_is_the_same_on_the_gpu(elements: int) -> None:
    tensor = torch.randn(elements, generator=torch.Generator().manual_seed(elements)).to(torch.bfloat16)
    results = []
    for device in ("cpu", "cuda"):
        result = torch.zeros((), dtype=torch.int64, device=device)
        fingerprint(tensor.to(device), result)
        results.append(int(result))
    assert results[0] == results[1]


@pytest.mark.gpu
def test_copies_are_right_although_the_memory_is_used_again() -> None:
    count, elements = 64, 1 << 20
    # In shared memory, as a transcript is: the kernel pins no pages of a file on a disk.
    path = f"/dev/shm/moevement-test-{os.getpid()}"
    region = HostRegion.create(path, count * elements * 4, prefault=True)
    os.unlink(path)
    with CopyEngine("cuda") as engine:
        assert engine.register_host(region.address, region.nbytes)
        copier = EngineCopier(engine, 16 << 20)
        for number in range(count):
            source = torch.empty(elements, dtype=torch.float32, device="cuda")
            # The value is there only after work that takes a while.
            busy = torch.randn(2048, 2048, device="cuda")
            for _ in range(4):
                busy = (busy @ busy).clamp(-1, 1)
            source.fill_(number).add_(busy[0, 0], alpha=0.0)
            copier.copy(source, region.address + number * elements * 4)
            # As core does with an output that is sent; the allocator may give the memory away now.
            source.data = torch.empty(1, device="cuda")
            torch.full((elements,), -1.0, device="cuda")
        copier.drain()
        copied = torch.frombuffer(memoryview(region), dtype=torch.float32).view(count, elements)
        for number in range(count):
            assert bool((copied[number] == number).all())
        del copied
        engine.unregister_host(region.address)


@pytest.mark.gpu
@pytest.mark.parametrize("flags", ["--pipeline-model-parallel-size 4"], ids=["pp4"])
def test_a_stage_replays_alone_on_the_gpu(tmp_path: Path, flags: str) -> None:
    corpus = tmp_path / "text"
    prepare = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--python-stdlib", "--max-megabytes", "1"]
    subprocess.run([*prepare, "--output-prefix", str(corpus)], check=True, capture_output=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "127.0.0.1:0", str(ROOT / "tests" / "gpu" / "boundary_rank.py"), str(tmp_path)]
    place = os.environ.get("BOUNDARY_TEST_FLAGS", "--deterministic-mode").split()
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    command = [*launcher, *MODEL.split(), *flags.split(), *place, "--data-path", str(corpus)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads((tmp_path / f"found.rank{rank}.json").read_text()) for rank in range(4)]
    for rank in found:
        assert rank["log_is_invisible"] and rank["replay_is_exact"] and not rank["troubles"] and rank["gradients"] > 5
    assert [rank["bundles"] for rank in found] == [0, 2, 0, 0]
