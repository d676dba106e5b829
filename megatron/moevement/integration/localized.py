"""Training under an agent: when a rank is lost, the others keep their process, and only its stage rolls back."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from megatron.moevement import injection
from megatron.moevement.agent.channel import EXIT_REPLACE_ME
from megatron.moevement.agent.link import WorkerLink
from megatron.moevement.errors import JobEnded, PeerLost, SlotInvalid, TranscriptInvalid
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
from megatron.moevement.recovery.phase_log import PhaseLog
from megatron.moevement.recovery.phases import Phase
from megatron.moevement.recovery.scope import Grid, closure
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.types import IterationRecord


def _no_checkpoint() -> int | None:
    return None


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
        self._phases = PhaseLog(events)
        self._agreement = Agreement(job.topology.control)
        users = (self._agreement, state, manager, hooks, transcription)
        self._generations = Generations(job, link, users)
        # Whether training ends before its end, because the agent was told to stop.
        self.stopped = False
        # Whether job.step is a Step that this rank's state is of.
        self._clean = False
        # Whether this process may still compile what it runs, for longer than others may be kept waiting.
        self._young = job.topology.device.type == "cuda"
        # Ranks whose processes were replaced since training last went on.
        self._replaced: set[int] = {link.rank} if link.replacement else set()
        job.agree_to_update = self._agree_to_update
        events.listen(self._note_progress)

    def run(
        self,
        begin: Callable[[], None],
        train: Callable[[], None],
        newest_dense: Callable[[], int | None] = _no_checkpoint,
    ) -> None:
        """Trains to the end.

        Args:
            begin: makes the state that training starts from, on all ranks: from slots, from a dense checkpoint or from
                scratch.
            train: trains on from `job.step` to the end.
            newest_dense: step of the newest dense checkpoint, equal on all ranks; None without one.

        Raises:
            JobEnded: the agent stops the job.
            RecoveryError: the replay wasn't exact.
        """
        first = not self._link.replacement
        self._events.emit("process", pid=os.getpid(), replacement=not first, stage=self._job.topology.pipeline_rank)
        while True:
            try:
                if first:
                    self._begin(begin)
                else:
                    self._recover(begin, newest_dense)
                train()
                # Nobody ends while another may still need what this rank holds.
                self._link.beat("ends")
                self._agreement.barrier()
                return
            except (RuntimeError, PeerLost, TranscriptInvalid, SlotInvalid) as error:
                damaged = isinstance(error, (TranscriptInvalid, SlotInvalid))
                if not damaged and not self._generations.is_failure(error):
                    raise
                if self._link.ending:
                    raise JobEnded(self._link.ending) from None
                self._events.emit("failure_noticed", step=self._job.step, reason=str(error).split("\n")[0][:200])
            first = False
            self._phases.enter(Phase.LEAVE)
            self._generations.leave()

    def _begin(self, begin: Callable[[], None]) -> None:
        begin()
        self._clean = True

    # ----------------------------------------------------------------------------------------------- iteration

    def before_forward(self, iteration: int) -> None:
        """Starts the slot, remembers how the iteration begins, and has its transcript written."""
        self._link.beat("forward and backward", iteration, resting=self._young)
        self._sparse.before_forward(iteration)
        self._state.remember(iteration)
        retention = self._manager.retention
        if retention is not None:
            run_id, longest = retention.run_id, retention.longest_run
            if not self._transcription.retain(run_id, retention.loadable_everywhere, longest):
                self._transcription.create(run_id, longest, self._agreement)

    def before_optimizer_step(self, iteration: int) -> None:
        """The fence."""
        self._link.beat("gradients", iteration, resting=self._young)
        self._sparse.before_optimizer_step(iteration)

    def after_optimizer_step(self, iteration: int, outcome: IterationOutcome) -> None:
        """Hands over the record; what follows may write files."""
        self._link.beat("end of the iteration", iteration, resting=True)
        self._sparse.after_optimizer_step(iteration, outcome)
        self._young = False
        self._link.beat("between iterations", iteration)

    def _note_progress(self, event: Mapping[str, Any]) -> None:
        """Replays are watched like iterations; loading slots may take long."""
        if event["kind"] == "recovery_phase":
            self._link.beat(event["phase"], resting=self._young or event["phase"] == Phase.LOAD)

    def _agree_to_update(self) -> None:
        self._link.beat("update", self._job.step)
        # A collective that NCCL aborted returns without an error, and with any values: they must not count as decided.
        self._link.check()
        self._settled = self._job.step
        # What is a barrier for the update also tells all of them, in the same iteration, that the job is to stop.
        stop = self._agreement.maximum([float(bool(self._link.stopping))])[0] > 0
        if stop and self._job.end is not None and self._job.end > self._job.step + 1:
            self._job.end, self.stopped = self._job.step + 1, True

    # ------------------------------------------------------------------------------------------------ recovery

    def _recover(self, begin: Callable[[], None], newest_dense: Callable[[], int | None]) -> None:
        self._link.beat("joins")
        self._phases.enter(Phase.JOIN)
        injection.reached("join")
        self._generations.join()
        self._transcription.log_from_now_on()
        self._phases.enter(Phase.AGREE)
        self._link.beat("agrees")
        injection.reached("agree")
        grid, offers = self._offers()
        decision = decide(grid, offers)
        if decision.source not in ("local", "none"):
            dense_step = newest_dense()
            decision = decide(grid, [dataclasses.replace(offer, dense_step=dense_step) for offer in offers])
        alone = decision.source in ("local", "none")
        scope = _stages(decision) if alone else sorted(set(grid.stages))
        self._events.emit(
            "decision",
            generation=self._link.generation,
            source=decision.source,
            target=decision.target,
            scope=scope,
            segments=[
                {"stages": plan.stages, "run": [plan.run.first, plan.run.last], "feeders": sorted(plan.feeders)}
                for plan in decision.segments
            ],
            replaced=sorted(self._replaced),
            roll_forward=sorted(decision.roll_forward),
            reasons=decision.reasons,
        )
        if alone:
            self._local(decision, offers)
        else:
            self._together(decision, begin)
        self._meet(decision, scope)

    def _meet(self, decision: Decision, scope: Sequence[int]) -> None:
        """The barrier before training goes on; whoever displays something learns what the others did."""
        phases = self._phases
        injection.reached("meet")
        job = self._job
        stood = self._agreement.gather((phases.seconds, phases.replayed, phases.total_seconds, job.end))
        # A process that took over a rank doesn't know where the run ends.
        job.end = max((end for *_, end in stood if end is not None), default=None)
        longest: dict[str, float] = {}
        for seconds, *_ in stood:
            for phase in seconds.keys() - {Phase.MEET}:
                longest[phase] = max(longest.get(phase, 0.0), seconds[phase])
        self._events.emit(
            "resumed",
            generation=self._link.generation,
            step=job.step,
            source=decision.source,
            scope=scope,
            replayed=max(replayed for _, replayed, *_ in stood),
            # A process that took over a rank has seen only a part of it.
            seconds=max(total for _, _, total, _ in stood),
            phase_seconds=phases.seconds,
            longest_phase_seconds=longest,
        )
        phases.enter(Phase.TRAIN)
        self._replaced.clear()

    def _offers(self) -> tuple[Grid, Sequence[Offer]]:
        """Where all ranks stand, and what each can give."""
        job = self._job
        step = job.step if self._clean else None
        if job.decided is not None and self._settled != job.step:
            job.decided = None
        position = Position.FINAL if self._clean and job.decided is not None else Position.RUNNING
        pipelines = dist.get_process_group_ranks(job.topology.groups.pp)
        standings = self._agreement.gather((job.topology.pipeline_rank, pipelines, step, self._replaced))
        grid = self._grid([stage for stage, _, _, _ in standings], [ranks for _, ranks, _, _ in standings])
        failed = closure(grid, grid.stages_of(rank for rank, (_, _, step, _) in enumerate(standings) if step is None))
        self._replaced.update(*(replaced for _, _, _, replaced in standings))
        self._link.beat("verifies slots", resting=True)
        slots = self._manager.interrupt(verify=job.topology.pipeline_rank in failed)
        self._link.beat("agrees")
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
        self._phases.enter(Phase.MEET)
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
        self._link.beat("waits in place")
        injection.reached("wait")
        rank = job.topology.rank
        if rank in decision.roll_forward:
            self._phases.enter(Phase.ROLL_FORWARD)
            injection.reached("roll_forward", decision.target - 1)
            train_loop.apply_decided(job)
            job.reset_temporary_state()
        elif not self._state.rewind():
            job.reset_temporary_state()
        if job.config.use_distributed_optimizer:
            for chunk in job.chunks:
                chunk.start_param_sync(force_sync=True)
        replays = [[(i, p) for i in range(p.run.first, decision.target)] for p in decision.segments]
        served = [len(turns) for turns, plan in zip(replays, decision.segments, strict=True) if rank in plan.feeders]
        self._phases.enter(Phase.SERVE if served else Phase.MEET, sum(served))
        for turn in itertools.zip_longest(*replays):
            for iteration, plan in filter(None, turn):
                injection.reached("serve", iteration)
                self._transcription.serve(iteration, frozenset(plan.stages))
                if rank in plan.feeders:
                    self._phases.advance(iteration)

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
        self._phases.load(target)
        self._transcription.reopen(run_id)
        self._transcription.replay(frozenset(plan.stages), range(plan.run.first, target))
        with _gradient_statistics_within(self._job, group):
            self._manager.recover(plan.run, target, records, Agreement(group))
        self._transcription.log_from_now_on()
        self._clean = True

    def _together(self, decision: Decision, begin: Callable[[], None]) -> None:
        """All ranks roll back, as after a restart of all."""
        job = self._job
        if decision.source == "scratch" and not job.pristine:
            print(f"rank {job.topology.rank}: nothing can be recovered; starting over", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_REPLACE_ME)
        if job.pristine:
            # What is kept of a Step 0 that was begun includes the random state; building doesn't make that again.
            self._state.rewind()
        self._clean, job.decided = False, None
        self._link.beat("rolls back with all", resting=True)
        self._phases.load(decision.target)
        begin()
        job.reset_temporary_state()
        self._transcription.forget()
        job.history[:] = [outcome for outcome in job.history if outcome.iteration < job.step]
        self._clean = True
        self._phases.enter(Phase.MEET)


def _stages(decision: Decision) -> list[int]:
    """Stages that roll back."""
    return sorted(stage for plan in decision.segments for stage in plan.stages)


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
