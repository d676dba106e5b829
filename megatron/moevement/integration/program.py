"""What `pretrain_gpt.py` does once the flags are parsed: build, recover, train, end cleanly."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron.moevement import injection
from megatron.moevement.agent.channel import EXIT_AGAIN, EXIT_REPLACE_ME
from megatron.moevement.agent.link import WorkerLink
from megatron.moevement.argument_checks import check_outputs
from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import ConfigError, JobEnded, JobStopped
from megatron.moevement.events import EventLog
from megatron.moevement.integration import dense_start, distributed, state_digest, train_loop, training_log
from megatron.moevement.integration.attach import SparseHooks, build_manager, copy_engine, ranks_on_node
from megatron.moevement.integration.boundary import boundary_of
from megatron.moevement.integration.dense_checkpoint import SaveResult, save_dense
from megatron.moevement.integration.generations import NEWS_SECONDS, failed_within
from megatron.moevement.integration.job import TrainingJob, build_job
from megatron.moevement.integration.localized import LocalizedTraining
from megatron.moevement.integration.operator_state import OperatorState
from megatron.moevement.integration.transcription import Transcription
from megatron.moevement.manager import SparseCheckpointManager
from megatron.moevement.planning import describe
from megatron.moevement.recovery.start import restart_count
from megatron.moevement.report.progress import ProgressDisplay, ProgressSettings
from megatron.moevement.report.tensorboard import TensorBoardScalars
from megatron.moevement.snapshot.calibration import PROBED_ITERATIONS
from megatron.moevement.training_config import TrainingConfig
from megatron.moevement.transcript.plan import describe_transcript

EXIT_PEER_LOST = 1
_LAST_LAP = "manager_seconds"
# What gloo and NCCL say, in words, when another process is gone.
_PEER_LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "Connection refused")


def run(config: TrainingConfig, sparse: SparseCheckpointConfig) -> None:
    """Trains, from where the job was before if it was stopped.

    Raises:
        ConfigError, StoreError: something that the user can mend; the message says what.
        SystemExit: after one line, if another rank is gone: the launcher restarts the job, an agent this process.
    """
    link = WorkerLink.from_environment()
    if link is not None and not sparse.enabled:
        raise ConfigError("--sparse-ckpt is missing: the agent needs it to recover; add it or use torchrun")
    if sparse.inject is not None:
        sparse.inject.check(config.world_size)
    if restart_count() == 0:
        # After a restart a save that fails is reported, and never ends training.
        check_outputs(config)
    if link is not None:
        _allow_descriptors()
    rank, startup = int(os.environ.get("RANK", "0")), _Startup()
    try:
        topology = distributed.start(config, link)
        startup.lap("connect_seconds")
        job = build_job(config, topology)
        startup.lap("job_seconds")
        # It would keep the process groups of a generation that has failed, and their sockets.
        del topology
        history = _train_sparse(job, sparse, link, startup) if sparse.enabled else _train(job)
        if config.state_digest is not None:
            state_digest.write_state_digest(config.state_digest, job, history)
        distributed.stop()
    except JobStopped as stopped:
        distributed.stop()
        if rank == 0:
            print(f"the job stops: {stopped}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_AGAIN) from None
    except JobEnded as error:
        if rank == 0:
            fresh = " without --sparse-ckpt-fresh" if sparse.fresh else ""
            kept = f"slots are kept in {sparse.job_directory}, the same command{fresh} goes on from them"
            print(f"the job ends: {error}; {kept} if they hold a window", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_AGAIN) from None
    except RuntimeError as error:
        broken = isinstance(error, dist.DistNetworkError) or any(text in str(error) for text in _PEER_LOST)
        # A replacement is told of the failure that it came for until it has joined.
        own = link is not None and link.replacement and not startup.over and not broken
        news = NEWS_SECONDS if broken and not startup.over else 0.0
        lost = link is not None and not own and failed_within(link, news)
        if not lost and not broken:
            raise
        print(f"rank {rank}: another rank is gone ({_first_line(error)})", file=sys.stderr, flush=True)
        # Whoever could not begin yet has nothing to keep: the agent replaces it.
        raise SystemExit(EXIT_REPLACE_ME if lost and not startup.over else EXIT_PEER_LOST) from None
    finally:
        if link is not None:
            link.close()


class _Startup:
    """What a process does before it can train or recover, one lap after another; whoever waits for it wants to know."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Ends a lap."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now

    @property
    def over(self) -> bool:
        """Whether this process has begun to train or to recover."""
        return _LAST_LAP in self.laps


def _allow_descriptors() -> None:
    """As many as the system permits: in a recovery the groups of two generations are open, some hundred each."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _first_line(error: RuntimeError) -> str:
    return str(error).split("\n")[0].split(". This is typically")[0][-120:]


class DenseSaver:
    """Hooks that write a dense checkpoint at `--save-interval` and `--sparse-ckpt-dense-interval`.

    A save that fails is reported and training goes on; the next interval tries again.
    """

    def __init__(self, job: TrainingJob, intervals: tuple[int, ...], events: EventLog, inner: train_loop.Hooks) -> None:
        self._job = job
        self._intervals = tuple(interval for interval in intervals if interval)
        self._events = events
        self._inner = inner
        self._saved_step: int | None = None

    def before_forward(self, iteration: int) -> None:
        """Nothing is saved here."""
        self._inner.before_forward(iteration)

    def before_optimizer_step(self, iteration: int) -> None:
        """Nothing is saved here."""
        self._inner.before_optimizer_step(iteration)

    def after_optimizer_step(self, iteration: int, outcome: train_loop.IterationOutcome) -> None:
        """Saves if an interval ends with this iteration."""
        self._inner.after_optimizer_step(iteration, outcome)
        if any((iteration + 1) % interval == 0 for interval in self._intervals):
            self.save()

    def forget(self) -> None:
        """After a failure: a process that took over a rank doesn't know what was saved, and saving is collective."""
        self._saved_step = None

    def save(self) -> bool:
        """Saves `Step job.step` to `--save` unless that is there already; whether it is durable."""
        directory = self._job.config.save
        if directory is None:
            return False
        if self._saved_step == self._job.step:
            return True
        injection.reached("dense_save", self._job.step)
        result: SaveResult = save_dense(self._job, directory)
        self._events.emit(
            "dense_save",
            step=result.step,
            ok=result.ok,
            seconds=result.seconds,
            nbytes=result.nbytes,
            error=result.error,
        )
        if result.ok:
            self._saved_step = result.step
        return result.ok


def _train(job: TrainingJob) -> list[train_loop.IterationOutcome]:
    """Training without sparse checkpoints."""
    log = training_log.TrainingLog(job.config, job.topology.rank, train_loop.NoHooks())
    found = dense_start.newest_dense(job, also_save=False)
    if found is not None:
        dense_start.load_newest(job, *found)
    elif restart_count() == 0:
        dense_start.check_scratch(job)
    events = EventLog(None, job.topology.rank)
    if job.topology.rank == 0:
        events.listen(ProgressDisplay(ProgressSettings(job.config.train_iters, 1, 1, "plain")))
    saver = DenseSaver(job, (job.config.save_interval or 0,), events, log)
    history = train_loop.train(job, saver)
    saver.save()
    log.close()
    return history


def _train_sparse(
    job: TrainingJob, sparse: SparseCheckpointConfig, link: WorkerLink | None, startup: _Startup
) -> list[train_loop.IterationOutcome]:
    """Training with a slot in every iteration."""
    events = EventLog(sparse.log_directory, job.topology.rank)
    close_reports = _listen(job, sparse, events)
    if sparse.inject is not None:
        place = (job.topology.rank, job.topology.world_size, restart_count())
        injection.arm(sparse.inject, sparse.job_directory, place, lambda text: events.emit("injected", fault=text))
    try:
        history = _train_with_manager(job, sparse, events, link, startup)
        injection.disarm(forget=True)
        return history
    finally:
        injection.disarm()
        close_reports()
        events.close()


def _train_with_manager(
    job: TrainingJob,
    sparse: SparseCheckpointConfig,
    events: EventLog,
    link: WorkerLink | None,
    startup: _Startup,
) -> list[train_loop.IterationOutcome]:
    if sparse.dense_interval and job.config.save is None:
        raise ConfigError(f"--sparse-ckpt-dense-interval {sparse.dense_interval} needs --save: name a directory")
    engine = copy_engine(job.topology.device, sparse)
    manager, state = build_manager(job, sparse, events, engine)
    startup.lap(_LAST_LAP)
    events.emit("startup", **startup.laps)
    if sparse.dry_run:
        _print_plan(job, sparse, manager, state)
        return []
    intervals = (job.config.save_interval or 0, sparse.dense_interval)
    saver = DenseSaver(job, intervals, events, train_loop.NoHooks())

    def begin() -> None:
        saver.forget()
        source = _begin(job, sparse, manager, restart_count() > 0 or (link is not None and link.generation > 0))
        if source == "slots" and sparse.dense_after_recovery:
            saver.save()

    hooks = SparseHooks(job, manager, saver)
    stopped: str | None = None
    if link is None:
        begin()
        train_loop.train(job, hooks)
        durable = saver.save()
    else:
        transcription = Transcription(job, sparse, engine, ranks_on_node(), events)
        localized = LocalizedTraining(job, state, manager, hooks, transcription, link, events)

        def train() -> None:
            saver.forget()
            train_loop.train(job, localized)
            # Inside, so that a rank that dies in the last save is replaced too.
            link.beat("saves", resting=True)
            saver.save()

        def newest_dense() -> int | None:
            found = dense_start.newest_dense(job, also_save=True)
            return None if found is None else found[1]

        localized.run(begin, train, newest_dense)
        durable = saved = saver.save()
        stopped = link.stopping if localized.stopped else None
        if stopped is not None and not dense_start.loads_what_it_saves(job):
            # The next start looks for it in --load alone.
            durable = False
        transcription.close(keep=sparse.keep or not durable)
    if manager.plan is None and job.topology.rank == 0:
        print(_no_slot_was_taken(sparse), file=sys.stderr, flush=True)
    kept = manager.finish(durable)
    if stopped is not None:
        goes_on = dense_start.what_is_kept(job, sparse, kept and manager.has_window, saved)
        raise JobStopped(f"{stopped} after iteration {job.step}, {goes_on}")
    if kept and job.topology.rank == 0:
        print(f"slots kept in {sparse.job_directory} (remove them with the directory)", flush=True)
    return job.history


def _begin(job: TrainingJob, sparse: SparseCheckpointConfig, manager: SparseCheckpointManager, restarted: bool) -> str:
    """Loads what there is; `slots`, `dense` or `scratch`."""
    found, discarded = dense_start.newest_dense(job, also_save=restarted), False
    if sparse.fresh and not restarted:
        # What refuses the start does so while the slots are there.
        if found is None:
            dense_start.check_scratch(job)
        discarded = any(sparse.job_directory.glob("*.slots"))
    start = manager.start(None if found is None else found[1])
    if discarded and job.topology.rank == 0:
        print(f"--sparse-ckpt-fresh: the slots that were in {sparse.job_directory} are discarded", flush=True)
    if start.source == "dense" and found is not None:
        dense_start.load_newest(job, *found)
    if start.source == "scratch" and not (restarted or sparse.fresh):
        try:
            dense_start.check_scratch(job)
        except ConfigError:
            # A refused start leaves nothing behind.
            manager.finish(durable=True)
            raise
    return start.source


def _no_slot_was_taken(sparse: SparseCheckpointConfig) -> str:
    return (
        f"no slot was taken: the run ended before --sparse-ckpt-window auto had measured (it takes "
        f"{sparse.measure_iterations + PROBED_ITERATIONS} iterations); force --sparse-ckpt-window for short runs"
    )


def _listen(job: TrainingJob, sparse: SparseCheckpointConfig, events: EventLog) -> Callable[[], None]:
    """Connects display and TensorBoard to the events of rank 0; returns what closes them."""
    if job.topology.rank != 0:
        return lambda: None
    tokens = job.config.samples_per_iteration * job.config.seq_length
    settings = ProgressSettings(
        job.config.train_iters, tokens, job.config.log_interval, sparse.progress, sparse.log_level
    )
    display = ProgressDisplay(settings)
    events.listen(display)
    if job.config.tensorboard_dir is None:
        return display.close
    scalars = TensorBoardScalars(Path(job.config.tensorboard_dir), tokens)
    events.listen(scalars)

    def close() -> None:
        display.close()
        scalars.close()

    return close


def _print_plan(
    job: TrainingJob, sparse: SparseCheckpointConfig, manager: SparseCheckpointManager, state: OperatorState
) -> None:
    """`--sparse-ckpt-dry-run`: trains as many iterations as `auto` needs to time, prints the plan, changes nothing."""
    manager.start(None)
    for chunk in job.chunks:
        chunk.train()
    hooks = SparseHooks(job, manager, train_loop.NoHooks())
    while manager.plan is None:
        if job.step >= job.config.train_iters:
            raise ConfigError(
                f"--sparse-ckpt-dry-run: {job.config.train_iters} iterations are too few to time for 'auto'; "
                "force --sparse-ckpt-window or raise --train-iters"
            )
        train_loop.train_iteration(job, hooks)
    if job.topology.rank == 0:
        print("sparse checkpointing plan (rank 0)")
        lines = describe(manager.plan, state, sparse, job.topology.world_size)
        limit, longest = sparse.transcript_memory_gib, manager.plan.longest_run
        lines += describe_transcript(boundary_of(job), sparse.transcript, longest, limit)
        for line in lines:
            print("  " + line, flush=True)
    manager.finish(durable=False)
