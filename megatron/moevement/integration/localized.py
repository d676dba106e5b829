"""Training under an agent: when a rank is lost, the others keep their process, and only its stage rolls back."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch.distributed as dist

from megatron.moevement.agent.link import WorkerLink
from megatron.moevement.errors import PeerLost, TranscriptInvalid
from megatron.moevement.events import EventLog
from megatron.moevement.integration import train_loop
from megatron.moevement.integration.attach import SparseHooks
from megatron.moevement.integration.generations import Generations
from megatron.moevement.integration.job import IterationOutcome, TrainingJob
from megatron.moevement.integration.operator_state import OperatorState
from megatron.moevement.integration.optimizer_setup import inner_optimizers
from megatron.moevement.integration.transcription import Transcription
from megatron.moevement.manager import SparseCheckpointManager
from megatron.moevement.recovery.decide import Decision, Offer, Position, SegmentPlan, decide
from megatron.moevement.recovery.scope import Grid, closure
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.types import IterationRecord

_EXIT_REPLACE_ME = 1


class LocalizedTraining:
    """Runs training through failures of other ranks. All methods are collective over the world.

    Args:
        job, state, manager: what is trained, and its slots.
        hooks: the manager's.
        transcription: what crosses stage boundaries.
        link: to the agent.
        events: told of every phase.
    """

    def __init__(
        self,
        job: TrainingJob,
        state: OperatorState,
        manager: SparseCheckpointManager,
        hooks: SparseHooks,
        transcription: Transcription,
        link: WorkerLink,
        events: EventLog,
    ) -> None:
        self._job, self._state, self._manager, self._sparse = job, state, manager, hooks
        self._transcription, self._link, self._events = transcription, link, events
        self._agreement = Agreement(job.topology.control)
        users = (self._agreement, state, manager, hooks, transcription)
        self._generations = Generations(job, link, users)
        # Whether job.step is a Step that this rank's state is of.
        self._clean = False
        job.agree_to_update = self._agree_to_update

    def run(self, begin: Callable[[], None], train: Callable[[], None]) -> None:
        """Trains to the end.

        Args:
            begin: makes the state that training starts from, on all ranks: from slots, from a dense checkpoint or from
                scratch.
            train: trains on from `job.step` to the end.

        Raises:
            JobEnded: the agent stops the job.
            RecoveryError: the replay wasn't exact.
        """
        first = not self._link.replacement
        while True:
            try:
                if first:
                    self._begin(begin)
                else:
                    self._recover(begin)
                train()
                return
            except (RuntimeError, PeerLost, TranscriptInvalid) as error:
                if not isinstance(error, TranscriptInvalid) and not self._generations.is_failure(error):
                    raise
                self._events.emit("failure_noticed", step=self._job.step, reason=str(error).split("\n")[0][:200])
            first = False
            self._generations.leave()

    def _begin(self, begin: Callable[[], None]) -> None:
        begin()
        self._clean = True

    # ----------------------------------------------------------------------------------------------- iteration

    def before_forward(self, iteration: int) -> None:
        """Starts the slot, remembers how the iteration begins, and has its transcript written."""
        self._link.beat("forward and backward", iteration)
        self._sparse.before_forward(iteration)
        self._state.remember(iteration)
        retention = self._manager.retention
        if retention is not None:
            run_id, longest = retention.run_id, retention.longest_run
            if not self._transcription.retain(run_id, retention.loadable_everywhere, longest):
                self._transcription.create(run_id, longest, self._agreement)

    def before_optimizer_step(self, iteration: int) -> None:
        """The fence."""
        self._link.beat("gradients", iteration)
        self._sparse.before_optimizer_step(iteration)

    def after_optimizer_step(self, iteration: int, outcome: IterationOutcome) -> None:
        """Hands over the record; what follows may write files."""
        self._link.beat("end of the iteration", iteration, resting=True)
        self._sparse.after_optimizer_step(iteration, outcome)

    def _agree_to_update(self) -> None:
        self._link.beat("update", self._job.step)
        self._agreement.barrier()

    # ------------------------------------------------------------------------------------------------ recovery

    def _recover(self, begin: Callable[[], None]) -> None:
        started = time.perf_counter()
        self._link.beat("joins", resting=True)
        self._generations.join()
        self._transcription.log_from_now_on()
        joined = time.perf_counter()
        grid, offers = self._offers()
        decision = decide(grid, offers)
        self._events.emit(
            "decision",
            generation=self._link.generation,
            source=decision.source,
            target=decision.target,
            stages=[list(plan.stages) for plan in decision.segments],
            runs=[[plan.run.first, plan.run.last] for plan in decision.segments],
            roll_forward=sorted(decision.roll_forward),
            reasons=decision.reasons,
            join_seconds=joined - started,
            agree_seconds=time.perf_counter() - joined,
        )
        if decision.source in ("local", "none"):
            self._local(decision, offers)
        else:
            self._together(decision, begin)
        self._agreement.barrier()
        self._events.emit("resumed", step=self._job.step, source=decision.source, seconds=time.perf_counter() - started)

    def _offers(self) -> tuple[Grid, Sequence[Offer]]:
        """Where all ranks stand, and what each can give."""
        job = self._job
        step = job.step if self._clean else None
        position = Position.FINAL if self._clean and job.decided is not None else Position.RUNNING
        pipelines = dist.get_process_group_ranks(job.topology.groups.pp)
        standings = self._agreement.gather((job.topology.pipeline_rank, pipelines, step))
        grid = self._grid([stage for stage, _, _ in standings], [ranks for _, ranks, _ in standings])
        failed = closure(grid, grid.stages_of(rank for rank, (_, _, step) in enumerate(standings) if step is None))
        slots = self._manager.interrupt(verify=job.topology.pipeline_rank in failed)
        records = dict(slots.records)
        newest = job.decided or (job.history[-1] if job.history else None)
        if self._clean and newest is not None and newest.iteration not in records:
            records[newest.iteration] = self._sparse.record_of(newest)
        offer = Offer(
            rank=job.topology.rank,
            step=step,
            position=position,
            run_id=slots.run_id,
            slots=slots.slots,
            operators=slots.operators,
            transcript=self._transcription.offer(),
            records=records,
            dense_step=None,
            problems=slots.problems,
        )
        return grid, self._agreement.gather(offer)

    def _grid(self, stages: Sequence[int], pipelines: Sequence[Sequence[int]]) -> Grid:
        config = self._job.config
        size, wraps = config.pipeline_model_parallel_size, config.virtual_pipeline_size is not None
        neighbours = []
        for stage, members in zip(stages, pipelines, strict=True):
            around = [stage - 1, stage + 1] if not wraps else [(stage - 1) % size, (stage + 1) % size]
            neighbours.append(frozenset(members[s] for s in around if 0 <= s < size) - {members[stage]})
        tied = size > 1 and not config.untie_embeddings_and_output_weights
        sharing = (frozenset({0, size - 1}),) if tied else ()
        return Grid(tuple(stages), sharing, wraps, tuple(neighbours))

    def _local(self, decision: Decision, offers: Sequence[Offer]) -> None:
        """The segments replay, the others wait with their state and serve."""
        groups = [dist.new_group(sorted(plan.ranks), backend="gloo") for plan in decision.segments]
        records = {iteration: offers[rank].records[iteration] for iteration, rank in decision.record_source.items()}
        rank = self._job.topology.rank
        for plan, group in zip(decision.segments, groups, strict=True):
            if rank in plan.ranks:
                self._replay(plan, decision.target, offers[rank].run_id, records, group)
                break
        else:
            self._stand_by(decision)
        last = self._job.history[-1] if self._job.history else None
        record = records.get(decision.target - 1)
        if record is None and last is not None and last.iteration == decision.target - 1:
            record = self._manager.record(last.iteration) or self._sparse.record_of(last)
        self._manager.resume(decision.loadable_everywhere, record)
        retention = self._manager.retention
        if retention is not None and not all(self._agreement.gather(self._transcription.complete)):
            self._transcription.create(retention.run_id, retention.longest_run, self._agreement)

    def _stand_by(self, decision: Decision) -> None:
        job = self._job
        self._link.beat("waits in place", resting=True)
        if job.topology.rank in decision.roll_forward:
            train_loop.apply_decided(job)
            job.reset_temporary_state()
        elif not self._state.rewind():
            job.reset_temporary_state()
        if job.config.use_distributed_optimizer:
            for chunk in job.chunks:
                chunk.start_param_sync(force_sync=True)
        replays = [[(i, p) for i in range(p.run.first, decision.target)] for p in decision.segments]
        for turn in itertools.zip_longest(*replays):
            for iteration, plan in filter(None, turn):
                self._transcription.serve(iteration, frozenset(plan.stages))

    def _replay(
        self,
        plan: SegmentPlan,
        target: int,
        run_id: str,
        records: Mapping[int, IterationRecord],
        group: dist.ProcessGroup,
    ) -> None:
        self._clean, self._job.decided = False, None
        self._link.beat("replays", resting=True)
        self._transcription.reopen(run_id)
        self._transcription.replay(frozenset(plan.stages), range(plan.run.first, target))
        with _gradient_statistics_within(self._job, group):
            self._manager.recover(plan.run, target, records, Agreement(group))
        self._transcription.log_from_now_on()
        self._clean = True

    def _together(self, decision: Decision, begin: Callable[[], None]) -> None:
        """All ranks roll back, as after a restart of all."""
        job = self._job
        if decision.source == "scratch" and job.history:
            print(f"rank {job.topology.rank}: nothing can be recovered; starting over", file=sys.stderr, flush=True)
            raise SystemExit(_EXIT_REPLACE_ME)
        self._clean, job.decided = False, None
        self._link.beat("rolls back with all", resting=True)
        begin()
        job.reset_temporary_state()
        job.history[:] = [outcome for outcome in job.history if outcome.iteration < job.step]
        self._clean = True


@contextlib.contextmanager
def _gradient_statistics_within(job: TrainingJob, group: dist.ProcessGroup) -> Iterator[None]:
    """Overflow checks of a replay reduce over the segment: the others don't take part, and the decision is recorded."""
    members = inner_optimizers(job.optimizer)
    before = [vars(member).get("grad_stats_parallel_group") for member in members]
    for member in members:
        member.grad_stats_parallel_group = group
    try:
        yield
    finally:
        for member, own in zip(members, before, strict=True):
            if own is None:
                del member.grad_stats_parallel_group
            else:
                member.grad_stats_parallel_group = own
