"""Transcripts go to the ranks that replay; a damaged one is refused on both sides, and nobody waits for it."""

import multiprocessing
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron.moevement.errors import TranscriptInvalid
from megatron.moevement.integration.bundle_exchange import BundleExchange
from megatron.moevement.transcript.keys import Direction
from megatron.moevement.transcript.log import TranscriptLog
from moevement_ext import DigestPool
from tests.support.transcripts import MIDDLE, content, create, write

STAGES = 3
pytestmark = pytest.mark.distributed


def refusal(exchange: BundleExchange, log: TranscriptLog, iteration: int) -> str:
    """Why the delivery to stage 1 fails on this rank; empty if it doesn't."""
    try:
        exchange.deliver(log, iteration, frozenset({1}))
    except TranscriptInvalid as error:
        return str(error)
    return ""


def stage(rank: int, folder: str) -> None:
    """Stage 1 replays; gradients of iteration 8 are damaged, and nobody has iteration 9."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=STAGES)
    log = create(Path(folder) / f"t{rank}", rank)
    for iteration in (7, 8):
        write(log, iteration)
    exchange = BundleExchange(MIDDLE.at(rank), range(STAGES), dist.group.WORLD, DigestPool())
    bundles = exchange.deliver(log, 7, frozenset({1}))
    assert len(bundles) == (2 if rank == 1 else 0)
    for bundle, sender, direction in zip(bundles, (0, 2), Direction, strict=False):
        assert (bundle.rank, bundle.iteration, bundle.direction) == (sender, 7, direction)
        assert [bytes(r.data) for r in bundle.records] == [content(7, direction, order) for order in range(4)]
    assert exchange.deliver(log, 7, frozenset(range(STAGES))) == []
    log.records(8, Direction.BACKWARD)[1].data[9] ^= 4
    for iteration, text, concerned in ((8, "gradient 1", (1, 2)), (9, "no transcript of iteration 9", (0, 1, 2))):
        told = refusal(exchange, log, iteration)
        assert (text in told) == (rank in concerned) and bool(told) == (rank in concerned)
    assert len(exchange.deliver(log, 7, frozenset({1}))) == (2 if rank == 1 else 0)
    dist.destroy_process_group()


def test_what_is_outside_goes_inside(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=stage, args=(rank, str(tmp_path))) for rank in range(STAGES)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    assert [process.exitcode for process in ranks] == [0] * STAGES
