"""One job at a time: a slot file belongs to the process that holds its lock, and to no other."""

import fcntl
import os
import time
from pathlib import Path

from megatron.moevement.errors import StoreError

# A killed job's last workers may take this long to end before those of the next one find the lock free.
WAIT_SECONDS = 10.0
_POLL_SECONDS = 0.05
_ATTEMPTS = 100
# Record locks belong to the process, so a process may ask again; they end with it, or when a descriptor is closed.
_held: dict[Path, int] = {}


def lock_path(slots: Path) -> Path:
    """The lock file of a slot file."""
    return slots.with_suffix(".lock")


def hold(slots: Path, wait_seconds: float = WAIT_SECONDS) -> None:
    """Takes the lock of a slot file, for as long as this process lives or until `release`.

    Raises:
        StoreError: another process holds it, or the directory can't be written.
    """
    path = lock_path(slots)
    if path in _held:
        return
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            descriptor = _open(path)
        except OSError as error:
            raise StoreError(
                f"--sparse-ckpt-dir {path.parent}: {error.strerror}; choose a directory that can be written"
            ) from error
        taken = _taken(descriptor)
        if taken and _is_at(path, descriptor):
            break
        os.close(descriptor)
        if taken:
            continue
        if time.monotonic() >= deadline:
            raise StoreError(
                f"--sparse-ckpt-name {path.parent.name}: another running job uses {slots}; stop it or choose "
                "another name"
            )
        time.sleep(_POLL_SECONDS)
    _held[path] = descriptor


def _open(path: Path) -> int:
    attempts = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileNotFoundError, FileExistsError):
            # A rank that leaves the directory empty removes it, which may have been just now.
            attempts += 1
            if attempts == _ATTEMPTS:
                raise


def release(slots: Path, remove: bool) -> None:
    """Gives the lock back if this process holds it; `remove` deletes the lock file too."""
    descriptor = _held.pop(lock_path(slots), None)
    if descriptor is None:
        return
    if remove:
        lock_path(slots).unlink(missing_ok=True)
    os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the file is still the one at `path`: a holder that ends removes it, and others may have made another."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _taken(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
