"""The host memory of this rank's transcript: planned, taken on all ranks or on none, pinned, given back.

Trouble never ends training: without a transcript every recovery rolls all stages back.
"""

import shutil
from collections.abc import Mapping

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import StoreError, TranscriptInvalid
from megatron.moevement.events import EventLog
from megatron.moevement.operators.state import MemoryRange
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.snapshot.pinning import Pinning
from megatron.moevement.transcript.keys import Boundary
from megatron.moevement.transcript.log import TranscriptLog, transcript_path
from megatron.moevement.transcript.plan import plan_transcript, transcript_wanted
from moevement_ext import CopyEngine, DigestPool


class TranscriptMemory:
    """Makes, finds, pins and gives back the transcript file of one rank.

    Args:
        config: where it lies and how much it may take.
        rank: global rank.
        engine: pins the memory.
        digests: digests and verifies; transcripts are digested whatever `--sparse-ckpt-digest` says.
        events: told what there is, or why there is none.
    """

    def __init__(
        self, config: SparseCheckpointConfig, rank: int, engine: CopyEngine, digests: DigestPool, events: EventLog
    ) -> None:
        self._config, self._rank, self._engine = config, rank, engine
        self._digests, self._events = digests, events
        self._path = transcript_path(config.job_directory, rank)
        self._pinning: Pinning | None = None

    def create(
        self, boundary: Boundary, longest_run: int, run_id: str, agreement: Agreement, ranks_on_node: int
    ) -> TranscriptLog | None:
        """Takes the planned memory, or finds what an earlier worker of the same run left in it. Collective.

        Args:
            boundary: what there is to log.
            longest_run: iterations that a recovery may replay.
            run_id: of the slots.
            agreement: the control group.
            ranks_on_node: ranks whose files share the directory.

        Returns:
            None where there is to be no transcript, or on all ranks where one of them has no room; an event says why.

        Raises:
            ConfigError: a transcript is asked for where nothing crosses a boundary.
        """
        if not transcript_wanted(self._config.transcript, boundary.pipeline.stages):
            return None
        parent = next(p for p in (self._path, *self._path.parents) if p.is_dir())
        existing = sum(agreement.gather(self._path.stat().st_size if self._path.exists() else 0))
        # All ranks of the node take as much, and what their former files hold is free for them.
        room = (shutil.disk_usage(parent).free + existing) // ranks_on_node
        plan = plan_transcript(boundary, longest_run, self._config.transcript_memory_gib, room)
        log, problem = None, plan.problem
        if not problem:
            try:
                log = self._find(run_id, plan.shape) or TranscriptLog.create(
                    self._path, {"rank": self._rank, "run_id": run_id}, plan.shape, self._digests
                )
            except StoreError as error:
                problem = str(error)
        problems = [text for text in agreement.gather(problem) if text]
        if problems or log is None:
            if log is not None:
                log.remove()
            self._events.emit("transcript_off", reason=problems[0], memory_bytes=plan.total_bytes)
            return None
        self._events.emit("transcript", segments=plan.segments, memory_bytes=plan.total_bytes)
        self._pin(log)
        return log

    def reopen(self, run_id: str) -> TranscriptLog | None:
        """What an earlier worker of this rank left, for its replacement; None if there is nothing of this run.

        Not collective: a replacement may not speak to the others yet.
        """
        log = self._find(run_id, None)
        if log is not None:
            self._pin(log)
        return log

    def _find(self, run_id: str, shape: Mapping[str, int] | None) -> TranscriptLog | None:
        try:
            log = TranscriptLog.open(self._path, self._digests)
        except (StoreError, TranscriptInvalid):
            # Absent, damaged or of another format: its iterations are lost, and replaced by those of the next replay.
            return None
        found = {name: getattr(log.geometry, name) for name in shape or ()}
        if (log.rank, log.run_id, found) == (self._rank, run_id, shape or {}):
            return log
        log.close()
        return None

    def _pin(self, log: TranscriptLog) -> None:
        if self._pinning is not None:
            # Of the log before, which is closed next.
            self._pinning.close()
        self._pinning = Pinning(self._engine, [MemoryRange(*place) for place in log.segment_ranges])

    def wait_until_pinned(self) -> None:
        """Returns when all segments are pinned; copies to those that aren't are slower."""
        if self._pinning is not None:
            self._pinning.wait()

    def give_back(self, log: TranscriptLog, keep: bool) -> None:
        """Unpins the transcript and unmaps it; deletes it unless it is kept."""
        if self._pinning is not None:
            self._pinning.close()
            self._pinning = None
        if keep:
            log.close()
        else:
            log.remove()
