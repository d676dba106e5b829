"""Writes what crosses this rank's stage boundaries to the transcript, iteration by iteration."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megatron.moevement.errors import MoevementError, RecoveryError
from megatron.moevement.events import EventLog
from megatron.moevement.integration.fingerprint import fingerprint
from megatron.moevement.integration.host_copies import HostCopy
from megatron.moevement.integration.log_copy import COPY_TIMEOUT_SECONDS, LogCopier
from megatron.moevement.transcript.keys import BoundaryKey, Direction, Pipeline
from megatron.moevement.transcript.log import TranscriptLog
from moevement_ext import EngineError


class BoundaryRecorder:
    """Writes what this rank sends and the receipts of what it receives to the transcript.

    A transcript that can't be written never ends training: the iteration is left out of it, and an event says why.
    Between `finish` and `settle`, which `begin` calls, the copier, the counts and the draft in the log belong to the
    thread that commits.

    Args:
        pipeline: says what is sent and received, in which order.
        log: the transcript; None writes none.
        copier: copies sent tensors to the transcript.
        device: where boundary tensors are.
        events: told what is left out.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        log: TranscriptLog | None,
        copier: LogCopier,
        device: torch.device,
        events: EventLog,
    ) -> None:
        self.pipeline, self.log, self._copier, self._events = pipeline, log, copier, events
        self.iteration: int | None = None
        self._writing = False
        self._sent = dict.fromkeys(Direction, 0)
        self._received = dict.fromkeys(Direction, 0)
        rows = max(len(pipeline.received(direction)) for direction in Direction)
        self._prints = {d: torch.zeros(rows, dtype=torch.int64, device=device) for d in Direction}
        on_device = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._worker = ThreadPoolExecutor(1, "moevement-transcript", *on_device)
        self._commit: tuple[int, Future[None]] | None = None

    def begin(self, iteration: int) -> None:
        """Starts the transcript of `iteration`."""
        self.settle()
        self.iteration = iteration
        self._sent, self._received = dict.fromkeys(Direction, 0), dict.fromkeys(Direction, 0)
        self._writing = self.log is not None
        if self.log is not None:
            try:
                given_up = self.log.begin(iteration)
            except MoevementError as error:
                self._give_up(iteration, str(error))
                return
            if given_up not in (None, iteration):
                self._events.emit("transcript_failed", iteration=given_up, reason="given up, no free segment")

    def sent(self, direction: Direction, tensor: torch.Tensor) -> BoundaryKey:
        """Logs a tensor that is about to be sent; returns its key."""
        key = self._next(self._sent, direction, self.pipeline.sent(direction), "sends")
        if self._writing and self.log is not None and self.iteration is not None:
            try:
                self._copier.copy(tensor, self.log.add(key, tensor.numel() * tensor.element_size()))
            except (MoevementError, EngineError) as error:
                self._give_up(self.iteration, str(error))
        return key

    def expect(self, direction: Direction) -> BoundaryKey:
        """The key of the tensor that is received next."""
        return self._next(self._received, direction, self.pipeline.received(direction), "receives")

    def received(self, key: BoundaryKey, tensor: torch.Tensor) -> None:
        """Notes the receipt of a tensor that has arrived, as far as the current stream is concerned."""
        if self._writing and self.iteration is not None:
            try:
                fingerprint(tensor, self._prints[key.direction][key.order])
            except EngineError as error:
                self._give_up(self.iteration, str(error))

    def _next(
        self, counts: dict[Direction, int], direction: Direction, keys: Sequence[BoundaryKey], verb: str
    ) -> BoundaryKey:
        place = counts[direction]
        if self.iteration is None or place >= len(keys):
            raise RecoveryError(
                f"iteration {self.iteration}: the schedule {verb} more than the {len(keys)} {direction} tensors planned"
            )
        counts[direction] = place + 1
        return keys[place]

    def finish(self) -> None:
        """Ends the iteration: its copies are waited for on a thread, which then digests and commits; nobody waits here.

        At the end of an iteration the host is ahead of the device: what comes next is to be launched while it works.
        """
        iteration, self.iteration = self.iteration, None
        if not self._writing or self.log is None or iteration is None:
            return
        self._writing = False
        prints = {direction: HostCopy(self._prints[direction]) for direction, count in self._received.items() if count}
        self._commit = (iteration, self._worker.submit(self._complete, self.log, iteration, prints))

    def _complete(self, log: TranscriptLog, iteration: int, prints: dict[Direction, HostCopy]) -> None:
        self._copier.drain()
        for direction, copied in prints.items():
            found = copied.wait(COPY_TIMEOUT_SECONDS).tolist()
            for key in self.pipeline.received(direction)[: self._received[direction]]:
                log.note_received(key, found[key.order])
        log.commit(iteration)

    def abandon(self) -> None:
        """Ends an iteration that was interrupted, without a transcript of it."""
        if self._writing and self.iteration is not None:
            self._give_up(self.iteration, "")
        self.iteration = None

    def settle(self) -> None:
        """Waits until the iteration that was finished last is committed, or is left out."""
        if self._commit is not None:
            (iteration, commit), self._commit = self._commit, None
            try:
                commit.result()
            except (MoevementError, RuntimeError, TimeoutError) as error:
                # An error of the device itself, too: if it is lost, training meets that where it goes on.
                self._give_up(iteration, str(error))

    def close(self) -> None:
        """Ends the thread."""
        self.settle()
        self._worker.shutdown()

    def check_complete(self) -> None:
        """Raises RecoveryError unless everything that the schedule sends and receives has been sent and received."""
        for counts, keys, verb in (
            (self._sent, self.pipeline.sent, "sent"),
            (self._received, self.pipeline.received, "received"),
        ):
            for direction, count in counts.items():
                if count != len(keys(direction)):
                    raise RecoveryError(
                        f"iteration {self.iteration}: {count} of {len(keys(direction))} {direction} tensors were {verb}"
                    )

    def _give_up(self, iteration: int, why: str) -> None:
        """Leaves an iteration out of the transcript; without `why` nobody is told."""
        if iteration == self.iteration:
            self._writing = False
        # The segment may be taken again at once: nothing may write to it any more.
        with contextlib.suppress(EngineError):
            self._copier.drain()
        if self.log is not None:
            self.log.abandon(iteration)
        if why:
            if self.log is not None:
                # What was written of it before may be of an attempt that failed, and is not to be served.
                self.log.drop({iteration})
            self._events.emit("transcript_failed", iteration=iteration, reason=why)
