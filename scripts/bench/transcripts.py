"""The boundary transcript of the overhead benchmark: one for all variants that write one, and what was written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import ConfigError
from megatron.moevement.events import EventLog
from megatron.moevement.recovery.plan import iterations_to_keep
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.transcript.keys import Direction
from scripts.bench.slots import Snapshots

RUN_ID = "overhead"
# How far behind the iteration that begins all ranks know of each other's slots, in a job that takes them.
TOLD_BEHIND = 3


class Transcripts:
    """A transcript, written in the iterations inside `recording`. Collective over the ranks.

    Args:
        training: the job.
        config: of the transcript.
        engine: copies from a GPU; that of the slots where there are any.
        longest_run: iterations that a recovery may replay.

    Raises:
        ConfigError: there is no room for it, or nothing crosses a boundary.
    """

    def __init__(self, training: Any, config: SparseCheckpointConfig, engine: Any, longest_run: int) -> None:
        from megatron.moevement.integration import attach
        from megatron.moevement.integration.boundary import boundary_of
        from megatron.moevement.integration.transcription import Transcription

        self._training, self._longest_run, self._directory = training, longest_run, config.job_directory
        self._agreement = Agreement(training.topology.control)
        self._boundary = boundary_of(training)
        self._memory: dict[str, Any] = {}
        self._variant, self._why = "", "--sparse-ckpt-transcript off"
        self._reasons: dict[str, str] = {}
        self._iterations: dict[str, int] = {}
        self._left_out: dict[str, set[int]] = {}
        # Of the iteration that is run next, among those with a transcript: blocks repeat the job's own.
        self._next, self._told = 0, -1
        events = EventLog(None, training.topology.rank)
        events.listen(self._note)
        self._transcription = Transcription(training, config, engine, attach.ranks_on_node(), events)
        self._transcription.create(RUN_ID, longest_run, self._agreement)
        if not self._transcription.complete:
            self.close()
            raise ConfigError(f"--variants: there is no transcript to measure: {self._why}")
        self._transcription.wait_until_pinned()
        self._use_plain_communicator()

    def _note(self, event: dict[str, Any]) -> None:
        if event["kind"] == "transcript":
            self._memory = {name: event[name] for name in ("segments", "memory_bytes")}
        elif event["kind"] == "transcript_off":
            self._why = event["reason"]
        elif event["kind"] == "transcript_failed":
            self._left_out.setdefault(self._variant, set()).add(event["iteration"])
            self._reasons.setdefault(self._variant, event["reason"])

    @contextlib.contextmanager
    def recording(self, name: str) -> Iterator[None]:
        """Around a block of iterations of a variant; the job has its plain communicator before and after it."""
        self._variant, first = name, self._next
        self._transcription.log_from_now_on()
        logged = self._training.communicator
        begin: Callable[[int], None] = logged.begin

        def begin_next(_iteration: int) -> None:
            begin(self._next)

        try:
            with mock.patch.object(logged, "begin", begin_next):
                yield
            # Waits for the last commit, which must not take the processors of the block that follows.
            written = self._transcription.offer()
        finally:
            self._use_plain_communicator()
        self._iterations[name] = self._iterations.get(name, 0) + self._next - first
        kept = iterations_to_keep(frozenset(range(first, self._next)), self._told, self._longest_run)
        self._left_out.setdefault(name, set()).update(kept - written)

    def _use_plain_communicator(self) -> None:
        from megatron.moevement.integration.job import build_communicator

        training = self._training
        training.communicator = build_communicator(training.config, training.topology, training.model_config)

    def before_forward(self, told_behind: int) -> None:
        """Frees what no window needs, as a job does before each iteration; all ranks' slots are that far behind."""
        self._told = self._next - told_behind
        self._transcription.retain(RUN_ID, self._told, self._longest_run)

    def after_iteration(self) -> None:
        """Counts it."""
        self._next += 1

    def warm_up(self, iterate: Callable[[], object]) -> None:
        """Writes every segment once."""
        with self.recording(""):
            for _ in range(self._memory["segments"]):
                iterate()
        self._iterations.clear()

    def figures(self) -> dict[str, Any]:
        """Of all ranks, besides their memory: bytes sent in an iteration, and iterations that were left out."""
        pipeline = self._boundary.pipeline
        sent = sum(len(pipeline.sent(direction)) for direction in Direction) * self._boundary.tensor_bytes
        gathered = self._agreement.gather((sent, self._left_out, self._reasons))
        by_variant = {}
        for name, iterations in self._iterations.items():
            left_out = [len(of_rank.get(name, ())) for _, of_rank, _ in gathered]
            reasons = sorted({of_rank[name] for _, _, of_rank in gathered if name in of_rank})
            by_variant[name] = {"iterations": iterations, "left_out_by_rank": left_out, "reasons": reasons}
        return {
            **self._memory,
            "longest_run": self._longest_run,
            "tensor_bytes": self._boundary.tensor_bytes,
            "bytes_by_rank": [of_rank for of_rank, _, _ in gathered],
            "by_variant": by_variant,
        }

    def close(self) -> None:
        """Removes the transcript, and its directory unless there are slots in it."""
        self._transcription.close(keep=False)
        with contextlib.suppress(OSError):
            self._directory.rmdir()


class Transcribed:
    """Hooks of a variant with a transcript, around its other ones, if any.

    Args:
        transcripts: told of every iteration.
        inner: hooks of the slots, or none.
        slots: what `inner` takes; None for a transcript alone.
    """

    def __init__(self, transcripts: Transcripts, inner: Any, slots: Snapshots | None) -> None:
        self._transcripts, self._inner, self._slots = transcripts, inner, slots

    def before_forward(self, iteration: int) -> None:
        """Starts the slot, then truncates the transcript."""
        self._inner.before_forward(iteration)
        self._transcripts.before_forward(TOLD_BEHIND if self._slots is None else self._slots.told_behind)

    def before_optimizer_step(self, iteration: int) -> None:
        """The fence."""
        self._inner.before_optimizer_step(iteration)

    def after_optimizer_step(self, iteration: int, outcome: Any) -> None:
        """Hands over the record."""
        self._inner.after_optimizer_step(iteration, outcome)
        self._transcripts.after_iteration()
