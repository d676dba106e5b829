"""Where dense checkpoints lie: Megatron's layout, changed only in steps that a crash can't leave half done.

    <save>/iter_0000123/                         a complete checkpoint of Step 123
    <save>/iter_0000124.partial/                 one that is being written, or was when its writer died
    <save>/iter_0000123.replaced/                the former checkpoint of the same step, until the new one is in place
    <save>/latest_checkpointed_iteration.txt     "123", moved last

Every function acts on one process's behalf; rank 0 calls those that change anything.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron.moevement.config import MIB
from megatron.moevement.errors import StoreError

LATEST = "latest_checkpointed_iteration.txt"
COMMON, SHARD_METADATA, CORE_CONFIG = "common.pt", ".metadata", "metadata.json"
_ESSENTIAL = (COMMON, SHARD_METADATA, CORE_CONFIG)
_ITERATION = re.compile(r"iter_(\d{7,})(\.replaced)?")
_PARTIAL, _REPLACED = ".partial", ".replaced"
_SPARE_BYTES = MIB


@dataclass(frozen=True, slots=True)
class Newest:
    """The step of the newest complete checkpoint, None without one; `reason` says why a newer one was passed over."""

    step: int | None
    reason: str


def checkpoint_path(save: Path, step: int) -> Path:
    """The directory of the checkpoint of `step`, whether it exists or not."""
    path = save / f"iter_{step:07d}"
    former = path.with_name(path.name + _REPLACED)
    return former if former.is_dir() and not path.is_dir() else path


def partial_path(save: Path, step: int) -> Path:
    """The directory in which the checkpoint of `step` is written."""
    return save / f"iter_{step:07d}{_PARTIAL}"


def missing_part(path: Path) -> str:
    """What keeps the directory from being a complete checkpoint; empty if it is one."""
    if not path.is_dir():
        return "the directory doesn't exist"
    lacking = [name for name in _ESSENTIAL if not (path / name).is_file()]
    return f"{', '.join(lacking)} missing" if lacking else ""


def newest_complete(save: Path, before: int | None = None) -> Newest:
    """What `latest_checkpointed_iteration.txt` names if it is complete, else the newest complete one.

    Args:
        save: the directory of `--save` or `--load`.
        before: pass over checkpoints of this step and later ones, which turned out to be unusable.
    """
    named, reason = _latest(save)
    if named is not None and (before is None or named < before):
        problem = missing_part(checkpoint_path(save, named))
        if not problem:
            return Newest(named, reason)
        reason = f"{checkpoint_path(save, named)}: {problem}"
    steps = {step for step in _steps(save) if before is None or step < before}
    complete = [step for step in steps if not missing_part(checkpoint_path(save, step))]
    return Newest(max(complete, default=None), reason)


def _latest(save: Path) -> tuple[int | None, str]:
    try:
        text = (save / LATEST).read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return None, "" if not _steps(save) else f"{save / LATEST}: missing"
    except OSError as error:
        return None, f"{save / LATEST}: {error.strerror}"
    return (
        (int(text), "") if text.isascii() and text.isdigit() else (None, f"{save / LATEST}: {text[:20]!r} is no step")
    )


def _steps(save: Path) -> set[int]:
    try:
        names = os.listdir(save)
    except (FileNotFoundError, NotADirectoryError):
        return set()
    return {int(match[1]) for match in map(_ITERATION.fullmatch, names) if match}


def prepare(save: Path, step: int) -> Path:
    """Creates the empty directory in which the checkpoint of `step` is written; clears what crashed saves left.

    Raises:
        OSError: it can't be created.
    """
    save.mkdir(parents=True, exist_ok=True)
    for name in os.listdir(save):
        path = save / name
        if not name.startswith("iter_"):
            continue
        if name.endswith(_PARTIAL):
            shutil.rmtree(path)
        elif name.endswith(_REPLACED):
            final = path.with_name(name.removesuffix(_REPLACED))
            if final.is_dir():
                shutil.rmtree(path)
            else:
                path.rename(final)
    partial = partial_path(save, step)
    partial.mkdir()
    return partial


def free_bytes(path: Path) -> int:
    """Bytes that this process may still write to the file system of `path`."""
    return shutil.disk_usage(path).free


def check_space(path: Path, required_bytes: int) -> None:
    """Refuses a save that doesn't fit, before a byte of it is written.

    Raises:
        StoreError: names the directory, what is needed and what is free.
        OSError: the file system can't be asked.
    """
    free, needed = free_bytes(path), required_bytes + _SPARE_BYTES
    if free < needed:
        raise StoreError(
            f"--save {path.parent}: a checkpoint needs {needed / MIB:.1f} MiB and {free / MIB:.1f} MiB are free; "
            "delete old checkpoints or choose another directory"
        )


def publish(save: Path, step: int) -> None:
    """Makes the written checkpoint the one that a restart finds: durable, renamed, then named as the latest.

    Raises:
        OSError: it isn't the latest; the former latest is untouched.
    """
    partial, final = partial_path(save, step), save / f"iter_{step:07d}"
    former = final.with_name(final.name + _REPLACED)
    sync(partial)
    replaces = final.is_dir()
    if replaces:
        final.rename(former)
    try:
        partial.rename(final)
    except OSError:
        if replaces:
            former.rename(final)
        raise
    sync(save)
    temporary = save / f"{LATEST}{_PARTIAL}"
    with temporary.open("w", encoding="ascii") as file:
        file.write(str(step))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(save / LATEST)
    sync(save)
    if replaces:
        shutil.rmtree(former, ignore_errors=True)


def discard(save: Path, step: int) -> None:
    """Removes a checkpoint that couldn't be written, as far as that is possible; the next save removes the rest."""
    shutil.rmtree(partial_path(save, step), ignore_errors=True)


def sync(path: Path) -> None:
    """Makes a file's bytes, or a directory's entries, durable.

    Raises:
        OSError: they may not be.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
