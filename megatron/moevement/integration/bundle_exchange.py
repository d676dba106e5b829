"""Brings neighbours' transcripts to the ranks that replay, over a gloo group, as bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron.moevement.errors import TranscriptInvalid
from megatron.moevement.transcript.keys import Delivery, Pipeline, deliveries
from megatron.moevement.transcript.log import TranscriptLog
from megatron.moevement.transcript.packing import Bundle, pack, unpack
from moevement_ext import DigestPool

# gloo counts bytes of a message in 32 bits at some places.
_PART_BYTES = 1 << 30


class BundleExchange:
    """Gives and takes transcripts along one pipeline.

    Args:
        pipeline: this rank's place.
        members: global ranks of this rank's pipeline, by stage.
        group: of backend gloo, with all of them.
        digests: verifies what arrives.
    """

    def __init__(
        self, pipeline: Pipeline, members: Sequence[int], group: dist.ProcessGroup, digests: DigestPool
    ) -> None:
        self._pipeline, self._members, self._group, self._digests = pipeline, members, group, digests

    def deliver(self, log: TranscriptLog | None, iteration: int, scope: frozenset[int]) -> list[Bundle]:
        """One iteration, from the stages outside of `scope` to those inside. All ranks of the pipeline call it.

        Returns:
            what this rank is given.

        Raises:
            TranscriptInvalid: on the sender and on the receiver of a transcript that can't be used, and on the receiver
                of one that has changed on the way; after all other deliveries of this rank.
        """
        found, problems = [], list[TranscriptInvalid]()
        for delivery in deliveries(self._pipeline, scope):
            try:
                if self._pipeline.stage == delivery.sender:
                    self._give(log, iteration, delivery)
                elif self._pipeline.stage == delivery.receiver:
                    found.append(self._take(self._members[delivery.sender]))
            except TranscriptInvalid as error:
                problems.append(error)
        if problems:
            raise problems[0]
        return found

    def _give(self, log: TranscriptLog | None, iteration: int, delivery: Delivery) -> None:
        receiver = self._members[delivery.receiver]
        try:
            if log is None:
                raise TranscriptInvalid(f"rank {dist.get_rank()} has no transcript")
            packed = pack(log, iteration, delivery.direction)
        except TranscriptInvalid as error:
            text = bytearray(str(error).encode())
            self._send(text, -len(text), receiver)
            raise
        self._send(packed, len(packed), receiver)

    def _send(self, content: bytearray, length: int, receiver: int) -> None:
        """A negative length says that the content is the text of an error."""
        dist.send(torch.tensor([length], dtype=torch.int64), receiver, self._group)
        for part in torch.frombuffer(content, dtype=torch.uint8).split(_PART_BYTES):
            dist.send(part, receiver, self._group)

    def _take(self, sender: int) -> Bundle:
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, sender, self._group)
        buffer = torch.empty(abs(int(length)), dtype=torch.uint8)
        for part in buffer.split(_PART_BYTES):
            dist.recv(part, sender, self._group)
        content = buffer.numpy().data
        if int(length) < 0:
            raise TranscriptInvalid(bytes(content).decode())
        return unpack(content, self._digests)
