"""The boundary transcript of a training job: made when slots are, written in every iteration, served in a recovery."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import TranscriptInvalid
from megatron.moevement.events import EventLog
from megatron.moevement.integration.ahead import Ahead
from megatron.moevement.integration.boundary import boundary_of, boundary_recorder, log_boundary, replay_boundary
from megatron.moevement.integration.bundle_exchange import BundleExchange
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.log_copy import log_copier
from megatron.moevement.recovery.plan import iterations_to_keep
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.transcript.log import TranscriptLog
from megatron.moevement.transcript.packing import Bundle
from megatron.moevement.transcript_memory import TranscriptMemory
from moevement_ext import CopyEngine, DigestPool


class Transcription:
    """Opens or makes this rank's transcript and gives the job communicators that use it.

    Args:
        job: whose boundaries are logged.
        config: where the file lies and how large it may be.
        engine: copies from a GPU.
        ranks_on_node: share the directory.
        events: told of the memory, and of why there is no transcript.
    """

    def __init__(
        self,
        job: TrainingJob,
        config: SparseCheckpointConfig,
        engine: CopyEngine,
        ranks_on_node: int,
        events: EventLog,
    ) -> None:
        self._job, self._ranks_on_node, self._events = job, ranks_on_node, events
        self._digests = DigestPool(config.threads(ranks_on_node))
        self._memory = TranscriptMemory(config, job.topology.rank, engine, self._digests, events)
        self._copier = log_copier(engine, job.topology.device)
        self._log: TranscriptLog | None = None
        self._recorder = boundary_recorder(job, None, self._copier, events)
        self._run_id = ""

    @property
    def complete(self) -> bool:
        """Whether this rank writes a transcript."""
        return self._log is not None

    def create(self, run_id: str, longest_run: int, agreement: Agreement) -> None:
        """Makes the transcripts of a run, and keeps those that there are. Collective."""
        boundary = boundary_of(self._job)
        self._run_id = run_id
        # What is committed to the file now would be missing in what is found in it.
        self._recorder.settle()
        self._use(self._memory.create(boundary, longest_run, run_id, agreement, self._ranks_on_node))

    def wait_until_pinned(self) -> None:
        """Returns when the memory is pinned, which goes on beside training; copies to it are slower before."""
        self._memory.wait_until_pinned()

    def reopen(self, run_id: str) -> None:
        """Finds what an earlier worker of this rank left of the run, if this process has nothing yet."""
        if self._run_id != run_id:
            self._run_id = run_id
            self._recorder.settle()
            self._use(self._memory.reopen(run_id))

    def forget(self) -> None:
        """All ranks have rolled back, and some are new: the transcripts of what comes are made, or found, together."""
        self._run_id = ""

    def _use(self, log: TranscriptLog | None) -> None:
        if self._log is not None and log is not self._log:
            self._log.close()
        self._log = log
        self._recorder = boundary_recorder(self._job, log, self._copier, self._events)
        self.log_from_now_on()

    def log_from_now_on(self) -> None:
        """A communicator over the present groups that writes the transcript, if there is one."""
        log_boundary(self._job, self._recorder)

    def retain(self, run_id: str, loadable_everywhere: int, longest_run: int) -> bool:
        """Frees iterations that no window needs; False if the transcript isn't of this run."""
        if self._log is not None and run_id == self._run_id:
            # Of those that were there when it was asked: one more may be committed meanwhile.
            found = self._log.iterations
            self._log.drop(found - iterations_to_keep(found, loadable_everywhere, longest_run))
        return run_id == self._run_id

    def offer(self) -> frozenset[int]:
        """Iterations that this rank can serve."""
        self._recorder.settle()
        return self._log.iterations if self._log is not None else frozenset()

    def replay(self, scope: frozenset[int], iterations: Sequence[int]) -> None:
        """A communicator for replays of the stages of `scope`, which asks the others for the transcripts of iterations.

        Until they are all replayed nothing else may be sent or received over the control group on this rank.
        """

        def fetch(iteration: int) -> Sequence[Bundle]:
            return self._deliver(iteration, scope)

        replay_boundary(self._job, self._recorder, scope, Ahead(fetch, iterations))

    def serve(self, iteration: int, scope: frozenset[int]) -> None:
        """Gives this rank's part of an iteration to its neighbours in `scope`.

        Raises:
            TranscriptInvalid: it can't be used; it is dropped, so that it isn't offered again.
        """
        try:
            self._deliver(iteration, scope)
        except TranscriptInvalid:
            if self._log is not None:
                self._log.drop({iteration})
            raise

    def _deliver(self, iteration: int, scope: frozenset[int]) -> Sequence[Bundle]:
        members = dist.get_process_group_ranks(self._job.topology.groups.pp)
        pipeline = boundary_of(self._job).pipeline
        exchange = BundleExchange(pipeline, members, self._job.topology.control, self._digests)
        return exchange.deliver(self._log, iteration, scope)

    def close(self, keep: bool) -> None:
        """Ends the commits; removes the file unless it is kept."""
        self._recorder.close()
        if self._log is not None:
            self._memory.give_back(self._log, keep)
        self._digests.close()
