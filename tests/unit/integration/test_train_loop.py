"""Tests of the training loop: order of hooks, outcomes, skipped updates, learning."""

from collections.abc import Callable

from megatron.moevement.integration import train_loop
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.train_loop import IterationOutcome, NoHooks


class Recorder:
    """Writes down every hook with the state that it sees."""

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.calls: list[tuple[str, int, int]] = []
        self.outcomes: list[IterationOutcome] = []

    def before_forward(self, iteration: int) -> None:
        self.calls.append(("forward", iteration, self.job.step))

    def before_optimizer_step(self, iteration: int) -> None:
        self.calls.append(("step", iteration, self.job.step))

    def after_optimizer_step(self, iteration: int, outcome: IterationOutcome) -> None:
        self.calls.append(("after", iteration, self.job.step))
        self.outcomes.append(outcome)


def test_hooks_see_the_steps_around_an_iteration(build: Callable[..., TrainingJob]) -> None:
    job = build(train_iters=2)
    recorder = Recorder(job)
    history = train_loop.train(job, recorder)
    assert recorder.calls == [
        ("forward", 0, 0),
        ("step", 0, 0),
        ("after", 0, 1),
        ("forward", 1, 1),
        ("step", 1, 1),
        ("after", 1, 2),
    ]
    assert history == recorder.outcomes
    assert [outcome.iteration for outcome in history] == [0, 1]
    assert all(outcome.grad_norm and not outcome.skipped for outcome in history)


def test_training_learns(build: Callable[..., TrainingJob]) -> None:
    history = train_loop.train(build(train_iters=12), NoHooks())
    assert history[-1].loss < history[0].loss - 0.5


def test_it_goes_on_from_its_step_and_stops_at_the_exit_interval(build: Callable[..., TrainingJob]) -> None:
    job = build(train_iters=8, exit_interval=3)
    job.step = 1
    assert [outcome.iteration for outcome in train_loop.train(job, NoHooks())] == [1, 2]


def test_an_overflow_skips_the_update_but_not_the_data(build: Callable[..., TrainingJob]) -> None:
    job = build(bf16=False, fp16=True, train_iters=2, initial_loss_scale=2.0**40, hysteresis=1)
    history = train_loop.train(job, NoHooks())
    assert [outcome.skipped for outcome in history] == [True, True]
    assert [outcome.loss_scale for outcome in history] == [2.0**40, 2.0**39]
    assert history[0].grad_norm is None
    assert job.scheduler.num_steps == 0
    assert job.consumed_samples == 8
