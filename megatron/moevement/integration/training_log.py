"""What a training run reports: a line per interval on rank 0, and TensorBoard scalars."""

from __future__ import annotations

from typing import Any

from megatron.moevement.integration.train_loop import Hooks, IterationOutcome
from megatron.moevement.training_config import TrainingConfig


def log_line(outcome: IterationOutcome, config: TrainingConfig) -> str:
    """One line about one iteration, iterations counted from 1 as Megatron prints them."""
    norm = "skipped (overflow)" if outcome.grad_norm is None else f"{outcome.grad_norm:.3f}"
    scale = f" | loss scale {outcome.loss_scale:g}" if config.fp16 else ""
    tokens = outcome.samples * config.seq_length / max(outcome.seconds, 1e-9)
    return (
        f"iteration {outcome.iteration + 1:>6}/{config.train_iters} | lm loss {outcome.loss:.4f} | grad norm {norm}"
        f" | lr {outcome.learning_rate:.3e}{scale} | {outcome.seconds:.3f} s | {tokens:,.0f} tokens/s"
    )


class TrainingLog:
    """Hooks that report every outcome and pass every call on to other hooks.

    Args:
        config: the training configuration.
        rank: only rank 0 prints and writes.
        inner: the hooks that are called before the report.
    """

    def __init__(self, config: TrainingConfig, rank: int, inner: Hooks) -> None:
        self.config = config
        self.rank = rank
        self.inner = inner
        self.scalars = self._open_scalars()

    def before_forward(self, iteration: int) -> None:
        self.inner.before_forward(iteration)

    def before_optimizer_step(self, iteration: int) -> None:
        self.inner.before_optimizer_step(iteration)

    def after_optimizer_step(self, iteration: int, outcome: IterationOutcome) -> None:
        self.inner.after_optimizer_step(iteration, outcome)
        if self.rank == 0:
            if (iteration + 1) % self.config.log_interval == 0:
                print(log_line(outcome, self.config), flush=True)
            self._write_scalars(outcome)

    def close(self) -> None:
        """Flush the scalars; call it once, at the end."""
        if self.scalars is not None:
            self.scalars.close()

    def _open_scalars(self) -> Any:
        if self.rank != 0 or self.config.tensorboard_dir is None:
            return None
        from torch.utils import tensorboard

        writer: Any = tensorboard.SummaryWriter
        return writer(self.config.tensorboard_dir)

    def _write_scalars(self, outcome: IterationOutcome) -> None:
        if self.scalars is None:
            return
        values = {
            "lm loss": outcome.loss,
            "grad-norm": outcome.grad_norm,
            "learning-rate": outcome.learning_rate,
            "loss-scale": outcome.loss_scale,
            "iteration-seconds": outcome.seconds,
        }
        for name, value in values.items():
            if value is not None:
                self.scalars.add_scalar(name, value, outcome.iteration + 1)
