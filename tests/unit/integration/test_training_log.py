"""Tests of log lines and scalars."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.moevement.integration.train_loop import IterationOutcome, NoHooks
from megatron.moevement.integration.training_log import TrainingLog, log_line
from megatron.moevement.training_config import TrainingConfig


def outcome(iteration: int = 0, skipped: bool = False) -> IterationOutcome:
    return IterationOutcome(
        iteration=iteration,
        loss=2.5,
        grad_norm=None if skipped else 1.25,
        skipped=skipped,
        learning_rate=1e-3,
        loss_scale=1024.0,
        samples=4,
        seconds=0.5,
    )


def test_a_line_says_it_all(make_config: Callable[..., TrainingConfig]) -> None:
    line = log_line(outcome(), make_config())
    for part in ("1/4", "lm loss 2.5000", "grad norm 1.250", "lr 1.000e-03", "128 tokens/s"):
        assert part in line
    assert "loss scale" not in line
    skipped = log_line(outcome(skipped=True), make_config(bf16=False, fp16=True))
    assert "skipped (overflow)" in skipped
    assert "loss scale 1024" in skipped


def test_only_rank_zero_prints_and_only_every_interval(
    make_config: Callable[..., TrainingConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(log_interval=2)
    for rank in (0, 1):
        log = TrainingLog(config, rank, NoHooks())
        for iteration in range(4):
            log.before_forward(iteration)
            log.before_optimizer_step(iteration)
            log.after_optimizer_step(iteration, outcome(iteration))
        log.close()
    assert capsys.readouterr().out.count("\n") == 2


def test_scalars_are_written(make_config: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    log = TrainingLog(make_config(tensorboard_dir=str(tmp_path)), 0, NoHooks())
    log.after_optimizer_step(0, outcome(skipped=True))
    log.close()
    assert [path.name for path in tmp_path.iterdir() if "tfevents" in path.name]
