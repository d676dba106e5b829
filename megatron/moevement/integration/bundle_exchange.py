"""Sends an iteration of a transcript to a rank that replays, over a gloo group, as bytes."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron.moevement.errors import TranscriptInvalid
from megatron.moevement.transcript.keys import Direction
from megatron.moevement.transcript.log import TranscriptLog
from megatron.moevement.transcript.packing import Bundle, pack, unpack
from moevement_ext import DigestPool

# gloo counts elements in 32 bits.
_PART_BYTES = 1 << 30


def send_bundle(
    log: TranscriptLog, iteration: int, direction: Direction, receiver: int, group: dist.ProcessGroup
) -> None:
    """Sends what this rank sent in `direction`; returns when it is sent.

    Args:
        log: this rank's transcript.
        iteration, direction: which part of it.
        receiver: global rank.
        group: of backend gloo, with both ranks.

    Raises:
        TranscriptInvalid: the transcript can't be used; the receiver is told, and raises it too.
    """
    try:
        packed = pack(log, iteration, direction)
    except TranscriptInvalid as error:
        text = bytearray(str(error).encode())
        _send(text, -len(text), receiver, group)
        raise
    _send(packed, len(packed), receiver, group)


def receive_bundle(sender: int, group: dist.ProcessGroup, digests: DigestPool) -> Bundle:
    """The bundle that `send_bundle` of global rank `sender` sends; verified.

    Raises:
        TranscriptInvalid: the sender's transcript can't be used, or it has changed on the way.
    """
    length = torch.zeros(1, dtype=torch.int64)
    dist.recv(length, sender, group)
    buffer = torch.empty(abs(int(length)), dtype=torch.uint8)
    for part in buffer.split(_PART_BYTES):
        dist.recv(part, sender, group)
    content = buffer.numpy().data
    if int(length) < 0:
        raise TranscriptInvalid(bytes(content).decode())
    return unpack(content, digests)


def _send(content: bytearray, length: int, receiver: int, group: dist.ProcessGroup) -> None:
    """A negative length says that the content is the text of an error."""
    dist.send(torch.tensor([length], dtype=torch.int64), receiver, group)
    for part in torch.frombuffer(content, dtype=torch.uint8).split(_PART_BYTES):
        dist.send(part, receiver, group)
