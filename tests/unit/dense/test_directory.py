"""Which checkpoint a restart finds, and that no step of a save can lose the last good one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron.moevement.dense import directory
from megatron.moevement.errors import StoreError


def fill(path: Path, content: str = "x") -> None:
    for name in ("common.pt", ".metadata", "metadata.json"):
        (path / name).write_text(content)


def saved(save: Path, step: int, content: str = "x") -> Path:
    fill(directory.prepare(save, step), content)
    directory.publish(save, step)
    return directory.checkpoint_path(save, step)


def test_a_published_checkpoint_is_the_newest_in_megatrons_layout(tmp_path: Path) -> None:
    save = tmp_path / "deep" / "save"
    assert directory.newest_complete(save) == directory.Newest(None, "")
    assert saved(save, 123) == save / "iter_0000123"
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "123"
    saved(save, 12345678)
    assert directory.newest_complete(save) == directory.Newest(12345678, "")
    assert sorted(os.listdir(save)) == ["iter_0000123", "iter_12345678", "latest_checkpointed_iteration.txt"]


def test_an_incomplete_one_is_passed_over_with_a_reason(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    (saved(tmp_path, 5) / ".metadata").unlink()
    assert directory.newest_complete(tmp_path) == directory.Newest(3, f"{tmp_path}/iter_0000005: .metadata missing")


@pytest.mark.parametrize("text", ["", "release", "-4", "9" * 5, "\xb2"])
def test_a_useless_latest_file_is_passed_over_with_a_reason(tmp_path: Path, text: str) -> None:
    saved(tmp_path, 3)
    (tmp_path / directory.LATEST).write_text(text, encoding="latin-1")
    found = directory.newest_complete(tmp_path)
    assert found.step == 3 and str(tmp_path) in found.reason
    (tmp_path / directory.LATEST).unlink()
    found = directory.newest_complete(tmp_path)
    assert found.step == 3 and "missing" in found.reason


def test_an_older_one_is_found_when_the_newest_turned_out_to_be_damaged(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        saved(tmp_path, step)
    assert [directory.newest_complete(tmp_path, before).step for before in (7, 6, 5, 2)] == [6, 4, 4, None]


def test_what_crashed_saves_left_is_removed_by_the_next_one_and_never_taken(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    fill(directory.prepare(tmp_path, 4))
    (tmp_path / "iter_notes.txt").write_text("of the user")
    assert directory.newest_complete(tmp_path) == directory.Newest(3, "")
    directory.prepare(tmp_path, 5)
    assert sorted(os.listdir(tmp_path)) == ["iter_0000003", "iter_0000005.partial", "iter_notes.txt", directory.LATEST]
    directory.discard(tmp_path, 5)
    directory.discard(tmp_path, 5)
    assert not (tmp_path / "iter_0000005.partial").exists()


class Crash(BaseException):
    """Stands for a kill: nothing after it runs."""


@pytest.mark.parametrize("replaces", [False, True])
def test_a_crash_at_any_system_call_leaves_a_complete_checkpoint(
    tmp_path: Path, replaces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    survived = 0
    for calls in range(20):
        save = tmp_path / str(calls)
        saved(save, 3, "old")
        if replaces:
            saved(save, 4, "old")
        with monkeypatch.context() as patch:
            remaining = [calls]

            def counted(name: str, original: object, patch: pytest.MonkeyPatch, left: list[int]) -> None:
                def call(*arguments: object, **options: object) -> object:
                    if left[0] == 0:
                        raise Crash
                    left[0] -= 1
                    return original(*arguments, **options)  # type: ignore[operator]

                patch.setattr(os, name, call)

            fill(directory.prepare(save, 4), "new")
            for name in ("fsync", "rename", "replace", "rmdir", "unlink"):
                counted(name, getattr(os, name), patch, remaining)
            try:
                directory.publish(save, 4)
                survived += 1
            except Crash:
                pass
        found = directory.newest_complete(save)
        assert found.step == 4 if replaces else found.step in (3, 4)
        path = directory.checkpoint_path(save, found.step or 0)
        assert not directory.missing_part(path)
        assert {(path / name).read_text() for name in ("common.pt", ".metadata", "metadata.json")} <= {"old", "new"}
        saved(save, 9)
        assert directory.newest_complete(save, before=9).step in (found.step, 4)
        assert not [name for name in os.listdir(save) if name.endswith((".partial", ".replaced"))]
    assert 1 <= survived < 20


def test_an_unwritable_place_is_an_os_error_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 4, "old")
    fill(directory.prepare(tmp_path, 4), "new")

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(30, "Read-only file system")
        os.rename(self, target)
        return target

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Read-only"):
        directory.publish(tmp_path, 4)
    assert (tmp_path / "iter_0000004" / "common.pt").read_text() == "old"
    assert directory.newest_complete(tmp_path).step == 4
    (tmp_path / "a_file").write_text("")
    with pytest.raises(FileExistsError):
        directory.prepare(tmp_path / "a_file", 1)


def test_a_save_that_does_not_fit_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = directory.prepare(tmp_path, 1)
    directory.check_space(partial, 1000)
    monkeypatch.setattr(directory, "free_bytes", lambda path: 10 << 20)
    directory.check_space(partial, 9 << 20)
    with pytest.raises(StoreError, match=r"--save .* needs 11.0 MiB and 10.0 MiB are free"):
        directory.check_space(partial, 10 << 20)
