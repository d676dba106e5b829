"""Training through failures, in a world of one rank: interrupted anywhere, it ends with the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import PeerLost
from megatron.moevement.events import EventLog
from megatron.moevement.integration import train_loop
from megatron.moevement.integration.attach import SparseHooks, build_manager, copy_engine
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.localized import LocalizedTraining
from megatron.moevement.integration.state_digest import digest_state, training_state
from megatron.moevement.integration.transcription import Transcription
from tests.unit.integration.test_generations import Link

FLAGS = {"train_iters": 6, "hidden_dropout": 0.1, "moe_router_enable_expert_bias": True, "lr_warmup_iters": 2}
FLAGS |= {"moe_router_score_function": "sigmoid"}


class Lab:
    """A job under a link that fails where a test says."""

    def __init__(self, job: TrainingJob, directory: Path, link: Link) -> None:
        self.job, self.link = job, link
        self.events: list[dict[str, Any]] = []
        log = EventLog(None, 0)
        log.listen(self.events.append)
        config = SparseCheckpointConfig(enabled=True, directory=directory, window=2)
        engine = copy_engine(job.topology.device, config)
        self.manager, state = build_manager(job, config, log, engine)
        hooks = SparseHooks(job, self.manager, train_loop.NoHooks())
        transcription = Transcription(job, config, engine, 1, log)
        self.training = LocalizedTraining(job, state, self.manager, hooks, transcription, link, log)  # type: ignore[arg-type]

    def run(self) -> dict[str, str]:
        """Trains to the end; digests of the state."""
        self.training.run(self.begin, self.train, lambda: None)
        self.manager.finish(durable=True)
        return digest_state(training_state(self.job))

    def begin(self) -> None:
        """From slots or from scratch."""
        self.manager.start(None)

    def train(self) -> None:
        """To the end."""
        train_loop.train(self.job, self.training)

    def decisions(self) -> list[str]:
        """Sources of the recoveries."""
        return [event["source"] for event in self.events if event["kind"] == "decision"]


def fail(owner: Any, name: str, call: int, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer is lost before or after call number `call` of `owner.name`."""
    original, calls = getattr(owner, name), {"n": 0}

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == call and not after:
            raise PeerLost("lost before")
        result = original(*arguments, **options)
        if calls["n"] == call and after:
            raise PeerLost("lost after")
        return result

    monkeypatch.setattr(owner, name, wrapped)


POINTS = [
    (train_loop, "run_forward_backward", False),
    (train_loop, "run_forward_backward", True),
    (train_loop, "share_loss", True),
    (train_loop.optimizer_setup, "decide_update", True),
    (TrainingJob, "share_weights", False),
    (SparseHooks, "after_optimizer_step", False),
    (SparseHooks, "after_optimizer_step", True),
    (SparseHooks, "before_forward", True),
]


@pytest.mark.parametrize(("owner", "name", "after"), POINTS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("call", [1, 4])
def test_an_interrupted_iteration_runs_again_or_is_finished(
    owner: Any,
    name: str,
    after: bool,
    call: int,
    build: Callable[..., TrainingJob],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calm = Lab(build(**FLAGS), tmp_path / "calm", Link())
    wanted = calm.run()
    assert not calm.decisions()
    lab = Lab(build(**FLAGS), tmp_path / "lost", Link())
    fail(owner, name, call, after, monkeypatch)
    assert lab.run() == wanted
    assert lab.decisions() == ["none"] and lab.link.generation == 1
    assert [outcome.iteration for outcome in lab.job.history] == list(range(6))


def test_a_failure_in_a_recovery_starts_it_again(
    build: Callable[..., TrainingJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Lab(build(**FLAGS), tmp_path / "calm", Link()).run()
    lab = Lab(build(**FLAGS), tmp_path / "lost", Link())
    fail(train_loop, "run_forward_backward", 4, True, monkeypatch)
    fail(LocalizedTraining, "_offers", 1, True, monkeypatch)
    fail(LocalizedTraining, "_local", 1, True, monkeypatch)
    assert lab.run() == wanted
    assert lab.decisions() == ["none", "none"] and lab.link.generation == 3


@pytest.mark.parametrize(("when", "ends"), [(2, 3), (5, 6)])
def test_told_to_stop_it_ends_after_the_iteration(
    build: Callable[..., TrainingJob], tmp_path: Path, when: int, ends: int
) -> None:
    link = Link()

    class Told(Lab):
        def train(self) -> None:
            inner = self.job.agree_to_update

            def told() -> None:
                link.stopping = "SIGTERM" if self.job.step == when else ""
                inner()

            self.job.agree_to_update = told
            super().train()

    lab = Told(build(**FLAGS), tmp_path, link)
    lab.run()
    assert lab.job.step == ends
    # In the last iteration there is nothing to stop.
    assert lab.training.stopped == (ends < 6)


def test_a_replacement_starts_with_a_recovery(build: Callable[..., TrainingJob], tmp_path: Path) -> None:
    wanted = Lab(build(**FLAGS), tmp_path / "calm", Link()).run()
    first = Lab(build(**FLAGS, exit_interval=4), tmp_path / "lost", Link())
    first.training.run(first.begin, first.train, lambda: None)
    first.manager.interrupt(verify=False)
    # The process is gone without a goodbye; another one takes its rank.
    link = Link()
    link.replacement = True
    second = Lab(build(**FLAGS), tmp_path / "lost", link)
    assert second.run() == wanted
    assert second.decisions() == ["global"]


def test_other_errors_are_not_swallowed(build: Callable[..., TrainingJob], tmp_path: Path) -> None:
    lab = Lab(build(**FLAGS), tmp_path, Link())

    def broken() -> None:
        raise ValueError("no peer is lost")

    with pytest.raises(ValueError, match="no peer"):
        lab.training.run(lab.begin, broken, lambda: None)
    lab.manager.finish(durable=True)
