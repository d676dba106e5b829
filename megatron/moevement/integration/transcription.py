"""The boundary transcript of a training job: made when slots are, written in every iteration, served in a recovery."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch.distributed as dist

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import MoevementError, TranscriptInvalid
from megatron.moevement.events import EventLog
from megatron.moevement.integration.boundary import (
    boundary_pipeline,
    boundary_recorder,
    boundary_tensor_bytes,
    log_boundary,
    replay_boundary,
)
from megatron.moevement.integration.bundle_exchange import BundleExchange
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.log_copy import EngineCopier, HostCopier, LogCopier
from megatron.moevement.recovery.plan import iterations_to_keep
from megatron.moevement.transcript.log import TranscriptLog, transcript_path
from megatron.moevement.transcript.plan import plan_transcript
from moevement_ext import CopyEngine, DigestPool

_OUTSTANDING_BYTES_LIMIT = 64 << 20


class Transcription:
    """Opens or makes this rank's transcript and gives the job communicators that use it.

    Args:
        job: whose boundaries are logged.
        config: where the file lies and how large it may be.
        engine: copies from a GPU.
        events: told of the memory, and of why there is no transcript.
    """

    def __init__(self, job: TrainingJob, config: SparseCheckpointConfig, engine: CopyEngine, events: EventLog) -> None:
        self._job, self._config, self._events = job, config, events
        self._path = transcript_path(config.job_directory, dist.get_rank())
        self._digests = DigestPool(config.threads(_ranks_on_node()))
        self._copier: LogCopier = HostCopier()
        if job.topology.device.type == "cuda":
            self._copier = EngineCopier(engine, _OUTSTANDING_BYTES_LIMIT)
        self._log: TranscriptLog | None = None
        self._recorder = boundary_recorder(job, None, self._copier)
        self._run_id = ""

    @property
    def wanted(self) -> bool:
        """Whether this job has boundaries to log, and logging is on."""
        return self._job.config.pipeline_model_parallel_size > 1 and self._config.transcript != "off"

    def open(self, run_id: str, longest_run: int) -> None:
        """Opens the transcript of the run, or makes one; without room there is none, and that is reported."""
        if not self.wanted or run_id == self._run_id:
            return
        self._run_id = run_id
        if self._log is not None:
            self._log.remove()
            self._log = None
        try:
            self._log = self._existing(run_id) or self._new(run_id, longest_run)
        except MoevementError as error:
            self._events.emit("transcript_off", reason=str(error))
            return
        self._recorder = boundary_recorder(self._job, self._log, self._copier)
        self.log_from_now_on()

    def _existing(self, run_id: str) -> TranscriptLog | None:
        if not self._path.exists():
            return None
        try:
            log = TranscriptLog.open(self._path, self._digests)
        except MoevementError:
            return None
        if log.run_id == run_id:
            return log
        log.close()
        return None

    def _new(self, run_id: str, longest_run: int) -> TranscriptLog:
        free = shutil.disk_usage(self._path.parent).free // _ranks_on_node()
        plan = plan_transcript(
            boundary_pipeline(self._job),
            boundary_tensor_bytes(self._job),
            longest_run,
            self._config.transcript_memory_gib,
            free,
        )
        if plan.problem:
            raise TranscriptInvalid(plan.problem)
        content = {"rank": dist.get_rank(), "run_id": run_id}
        log = TranscriptLog.create(self._path, content, plan.shape, self._digests)
        self._events.emit("transcript", memory_bytes=plan.total_bytes, iterations=plan.segments)
        return log

    def log_from_now_on(self) -> None:
        """A communicator over the present groups that writes the transcript, if there is one."""
        log_boundary(self._job, self._recorder)

    def retain(self, loadable_everywhere: int, longest_run: int) -> None:
        """Frees iterations that no window needs."""
        if self._log is not None:
            self._log.truncate(iterations_to_keep(self._log.iterations, loadable_everywhere, longest_run))

    def offer(self) -> frozenset[int]:
        """Iterations that this rank can serve."""
        self._recorder.settle()
        return self._log.iterations if self._log is not None else frozenset()

    def replay(self, scope: frozenset[int]) -> None:
        """A communicator for replays of the stages of `scope`, which asks the others for their transcripts."""
        exchange = self._exchange()

        def fetch(iteration: int) -> Any:
            return exchange.deliver(self._log, iteration, scope)

        replay_boundary(self._job, self._recorder, scope, fetch)

    def serve(self, iteration: int, scope: frozenset[int]) -> None:
        """Gives this rank's part of an iteration to its neighbours in `scope`.

        Raises:
            TranscriptInvalid: it can't be used; it is dropped, so that it isn't offered again.
        """
        try:
            self._exchange().deliver(self._log, iteration, scope)
        except TranscriptInvalid:
            if self._log is not None:
                self._log.truncate(self._log.iterations - {iteration})
            raise

    def _exchange(self) -> BundleExchange:
        members = dist.get_process_group_ranks(self._job.topology.groups.pp)
        pipeline = boundary_pipeline(self._job)
        return BundleExchange(pipeline, members, self._job.topology.control, self._digests)

    def close(self, keep: bool) -> None:
        """Ends the commits; removes the file unless it is kept."""
        self._recorder.close()
        if self._log is not None:
            if keep:
                self._log.close()
            else:
                self._log.remove()
        self._digests.close()


def _ranks_on_node() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(dist.get_world_size())))
