"""Slots that a running process uses are refused to every other, and to nobody once it is gone."""

import contextlib
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from megatron.moevement.errors import StoreError
from megatron.moevement.store.lock import hold, lock_path, release


def _hold_until_killed(slots: Path, held: Event) -> None:
    hold(slots, 0.0)
    held.set()
    signal.pause()


def test_another_process_is_refused_until_the_holder_is_killed(tmp_path: Path) -> None:
    slots = tmp_path / "my-run" / "rank00000.slots"
    context = multiprocessing.get_context("fork")
    held = context.Event()
    holder = context.Process(target=_hold_until_killed, args=(slots, held))
    holder.start()
    assert held.wait(60) and holder.pid is not None
    with pytest.raises(StoreError, match="--sparse-ckpt-name my-run: another running job uses"):
        hold(slots, 0.0)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    hold(slots, 0.0)
    hold(slots, 0.0)
    release(slots, remove=True)
    assert not lock_path(slots).exists()


def test_a_lock_file_that_its_holder_removes_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, take, attempts = tmp_path / "rank00000.slots", fcntl.lockf, list[int]()

    def removed_first(descriptor: int, how: int) -> None:
        if not attempts:
            lock_path(slots).unlink()
        attempts.append(descriptor)
        take(descriptor, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", removed_first)
        hold(slots, 0.0)
    assert len(attempts) == 2 and lock_path(slots).exists()
    release(slots, remove=True)


def test_a_released_lock_may_stay_as_a_file(tmp_path: Path) -> None:
    slots = tmp_path / "rank00000.slots"
    release(slots, remove=True)
    hold(slots, 0.0)
    release(slots, remove=False)
    assert lock_path(slots).exists()


def test_a_directory_that_cannot_be_made_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--sparse-ckpt-dir .*choose a directory"):
        hold(tmp_path / "file" / "rank00000.slots", 0.0)
    with pytest.raises(StoreError, match="File name too long"):
        hold(tmp_path / ("a" * 300) / "rank00000.slots", 0.0)


def test_a_directory_that_others_make_and_remove_meanwhile(tmp_path: Path) -> None:
    slots, ended = tmp_path / "my-run" / "rank00000.slots", threading.Event()

    def leave_it_empty() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):
                slots.parent.rmdir()
            time.sleep(0.0002)

    remover = threading.Thread(target=leave_it_empty)
    remover.start()
    try:
        for _ in range(300):
            hold(slots, 0.0)
            release(slots, remove=True)
    finally:
        ended.set()
        remover.join()
