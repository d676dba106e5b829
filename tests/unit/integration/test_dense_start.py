"""Which dense checkpoint a job starts from: of --load, of --save after a restart, and an older one if it is damaged.

And what is said of slots and checkpoints when a job stops.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import ConfigError, StoreError
from megatron.moevement.integration import dense_start


def job(load: str | None, save: str | None, rank: int = 0) -> Any:
    """A job with these flags."""
    return SimpleNamespace(config=SimpleNamespace(load=load, save=save), topology=SimpleNamespace(rank=rank))


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Steps of the checkpoints that a directory holds."""
    there: dict[str, list[int]] = {}

    def find(directory: Path | str, before: int | None = None) -> Any:
        found = [step for step in there.get(str(directory), []) if before is None or step < before]
        return SimpleNamespace(step=max(found, default=None))

    monkeypatch.setattr(dense_start, "find_dense", find)
    return there


def test_save_counts_after_a_restart_alone(steps: dict[str, list[int]]) -> None:
    steps.update(a=[4], b=[2, 8])
    assert dense_start.newest_dense(job("a", "b"), also_save=False) == ("a", 4)
    assert dense_start.newest_dense(job("a", "b"), also_save=True) == ("b", 8)
    assert dense_start.newest_dense(job(None, "b"), also_save=False) is None


def test_a_load_without_a_checkpoint_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert dense_start.newest_dense(job("a", None), also_save=False) is None
    assert "warning: --load a: no dense checkpoint there" in capsys.readouterr().err
    assert dense_start.newest_dense(job("a", None, rank=1), also_save=False) is None
    assert not capsys.readouterr().err


def test_a_start_from_scratch_that_nobody_can_mean_is_refused(steps: dict[str, list[int]]) -> None:
    dense_start.check_scratch(job(None, "b"))
    dense_start.check_scratch(job(None, None))
    dense_start.check_scratch(job("./b", "b"))
    for save in (None, "b"):
        with pytest.raises(ConfigError, match="--load a: no dense checkpoint is there; correct the folder"):
            dense_start.check_scratch(job("a", save))
    steps["b"] = [8]
    with pytest.raises(ConfigError, match="--save b holds a checkpoint of step 8: add --load b"):
        dense_start.check_scratch(job(None, "b"))


def test_a_damaged_checkpoint_gives_way_to_an_older_one(
    steps: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps["a"] = [2, 4, 8]
    damaged, loaded = {8}, list[int]()

    def load(_job: Any, directory: str, step: int) -> None:
        if step in damaged:
            raise StoreError(f"{directory}: step {step} is damaged")
        loaded.append(step)

    monkeypatch.setattr(dense_start, "load_dense", load)
    dense_start.load_newest(job("a", None), "a", 8)
    assert loaded == [4] and "step 8 is damaged; trying an older one" in capsys.readouterr().err
    damaged.update(steps["a"])
    with pytest.raises(StoreError, match="every dense checkpoint is damaged; choose another directory"):
        dense_start.load_newest(job("a", None), "a", 8)
    assert loaded == [4]


@pytest.mark.parametrize(
    ("load", "save", "fresh", "window", "saved", "said"),
    [
        (None, None, False, True, False, "slots are kept in d/n; the same command goes on from there"),
        (None, "b", True, True, True, "slots are kept in d/n; the same command without --sparse-ckpt-fresh goes on"),
        (None, None, False, False, False, "before the first window was complete; the same command starts where"),
        ("./b", "b", False, False, True, "a dense checkpoint is in b; the same command goes on from there"),
        ("a", "b", False, False, True, "a dense checkpoint is in b; add --load b to go on from there"),
    ],
)
def test_from_what_a_stopped_job_goes_on(
    load: str | None, save: str | None, fresh: bool, window: bool, saved: bool, said: str
) -> None:
    config = SparseCheckpointConfig(enabled=True, directory=Path("d"), name="n", fresh=fresh)
    assert dense_start.what_is_kept(job(load, save), config, window, saved).startswith(said)
