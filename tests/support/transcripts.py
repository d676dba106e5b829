"""Transcripts for tests: small ones with known bytes."""

import ctypes
from pathlib import Path

from megatron.moevement.transcript.keys import Direction, Pipeline
from megatron.moevement.transcript.log import TranscriptLog
from moevement_ext import DigestPool

MIDDLE = Pipeline(3, 1, 4, 1, 3)
RECORD_BYTES = 100
SHAPE = {"slots": 4, "manifest_bytes": 8192, "data_bytes": 2048}


def create(path: Path, rank: int = 1, run_id: str = "run") -> TranscriptLog:
    """An empty transcript with room for four iterations of `MIDDLE`."""
    return TranscriptLog.create(path, {"rank": rank, "run_id": run_id}, SHAPE, DigestPool())


def content(iteration: int, direction: Direction, order: int) -> bytes:
    """The bytes of a record."""
    seed = iteration * 31 + order * 7 + (direction is Direction.FORWARD)
    return bytes((seed + i * 3) % 251 for i in range(RECORD_BYTES))


def write(log: TranscriptLog, iteration: int, commit: bool = True) -> None:
    """Logs an iteration."""
    log.begin(iteration)
    for direction in Direction:
        for key in MIDDLE.sent(direction):
            ctypes.memmove(log.add(key, RECORD_BYTES), content(iteration, direction, key.order), RECORD_BYTES)
        for key in MIDDLE.received(direction):
            log.note_received(key, iteration * 1000 - key.order)
    if commit:
        log.commit(iteration)
