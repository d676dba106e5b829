"""TensorBoard scalars from the events of rank 0."""

from pathlib import Path
from typing import Any

from megatron.moevement.report.read_events import Event, start_of

# Scalar name -> field of the `iteration` event.
_SCALARS = {
    "lm loss": "loss",
    "grad-norm": "grad_norm",
    "learning-rate": "learning_rate",
    "iteration-seconds": "seconds",
    "sparse-ckpt/slot-bytes": "slot_bytes",
    "sparse-ckpt/stall-seconds": "stall_seconds",
    "sparse-ckpt/oldest-age-steps": "oldest_age_steps",
    "sparse-ckpt/memory-used-bytes": "memory_used_bytes",
    "sparse-ckpt/failed-slots": "failed_slots",
}


class TensorBoardScalars:
    """A listener for `EventLog.listen` that writes scalars, with iterations counted from 1 as Megatron does.

    Every iteration has one point, whichever process wrote it: one that goes on after a failure elsewhere passes over
    iterations that it has written already, and the one that takes over from a killed one replaces what that wrote of
    iterations that run again. A directory that can't be written ends the scalars, never the training; `failure` then
    says why.
    """

    def __init__(self, directory: Path, tokens_per_iteration: int) -> None:
        self.failure = ""
        self._directory = directory
        self._tokens = tokens_per_iteration
        self._writer: Any = None
        self._first_step = self._written = self._replay_step = 0

    def __call__(self, event: Event) -> None:
        """Takes one event; kinds without scalars are passed over."""
        if self.failure:
            return
        try:
            self._take(event)
        except OSError as error:
            self.failure = f"{self._directory}: {error}; no more TensorBoard scalars are written"
            self._writer = None

    def close(self) -> None:
        """Writes what is buffered."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.close()
        except OSError as error:
            self.failure = f"{self._directory}: {error}"

    def _take(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "start":
            self._begin_at(start_of(event)[1])
        elif kind == "recovery_started":
            # A process that takes over a rank starts here; without catching up it is only told of what is later.
            self._begin_at(int(event["last"]))
        elif kind == "decision":
            self._replay_step = min((segment["run"][1] for segment in event["segments"]), default=event["target"])
        elif kind == "resumed":
            self._resumed(event)
        elif kind == "recovery_finished":
            writer, step = self._open(), int(event["step"])
            writer.add_scalar("sparse-ckpt/recovery-seconds", event["seconds"], step)
            writer.add_scalar("sparse-ckpt/recovery-replays", event["replays"], step)
            writer.flush()
        elif kind == "iteration":
            self._iteration(event)

    def _begin_at(self, step: int) -> None:
        if self._writer is None:
            self._first_step = self._written = step

    def _resumed(self, event: Event) -> None:
        # Not at the Step that training goes on from: who takes over later begins behind its newest slot, and what the
        # one before wrote from there on is replaced.
        writer, step = self._open(), self._replay_step
        for phase, seconds in event["longest_phase_seconds"].items():
            writer.add_scalar(f"sparse-ckpt-recovery/{phase}-seconds", seconds, step)
        writer.add_scalar("sparse-ckpt-recovery/seconds", event["seconds"], step)
        writer.add_scalar("sparse-ckpt-recovery/replayed-iterations", event["replayed"], step)
        writer.add_scalar("sparse-ckpt-recovery/scope-stages", len(event["scope"]), step)
        writer.flush()

    def _iteration(self, event: Event) -> None:
        writer, number = self._open(), int(event["iteration"]) + 1
        if number <= self._written:
            return
        self._written = number
        for name, key in _SCALARS.items():
            if event.get(key) is not None:
                writer.add_scalar(name, event[key], number)
        if event.get("seconds"):
            writer.add_scalar("tokens-per-second", self._tokens / event["seconds"], number)
        # A worker may be killed at any time, and the iterations before its newest window never run again.
        writer.flush()

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils import tensorboard

            create: Any = tensorboard.SummaryWriter
            # The recovery's own scalars stand at `first_step`, the first iteration's behind it.
            self._writer = create(str(self._directory), purge_step=self._first_step + 1)
        return self._writer
