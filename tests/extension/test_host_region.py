"""HostRegion: bytes that outlive a process, errors with the right errno, and no dangling view."""

from __future__ import annotations

import errno
import gc
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from moevement_ext import HostRegion

MIB = 1 << 20

WRITER = """
import os, signal, sys
from moevement_ext import HostRegion
region = HostRegion.create(sys.argv[1], 1 << 20, prefault=True)
memoryview(region)[64:64 + 1000] = bytes(range(250)) * 4
region.store_word(8, 0xFEEDFACECAFEBEEF)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def tiny_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.fail(f"this test must be allowed to mount a tmpfs (run it as root): {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("place", ["shared memory", "folder"])
def test_bytes_survive_a_killed_writer(place: str, shm_path: Path, tmp_path: Path) -> None:
    path = shm_path if place == "shared memory" else tmp_path / "region"
    writer = subprocess.run([sys.executable, "-c", WRITER, str(path)], timeout=60, check=False)
    assert writer.returncode == -signal.SIGKILL
    with HostRegion.open(path) as region:
        assert region.nbytes == len(region) == MIB
        assert region.load_word(8) == 0xFEEDFACECAFEBEEF
        assert bytes(region)[64:1064] == bytes(range(250)) * 4
        assert bytes(region)[1064:] == bytes(MIB - 1064)


def test_two_mappings_see_each_other(shm_path: Path) -> None:
    with HostRegion.create(shm_path, 4096) as first, HostRegion.open(shm_path, writable=True) as second:
        second.store_word(4088, 2**64 - 1)
        assert first.load_word(4088) == 2**64 - 1
        assert first.address != second.address
        assert first.path == str(shm_path)


@pytest.mark.parametrize("prefault", [False, True])
def test_full_file_system_is_enospc_and_leaves_no_file(tiny_tmpfs: Path, prefault: bool) -> None:
    path = tiny_tmpfs / "region"
    with pytest.raises(OSError, match="No space left") as caught:
        HostRegion.create(path, 2 * MIB, prefault=prefault)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert "populate.cpp:" in str(caught.value)
    assert list(tiny_tmpfs.iterdir()) == []
    # What was taken meanwhile is given back: nearly all of it can be had, and written.
    with HostRegion.create(path, MIB - 65536, prefault=prefault) as region:
        memoryview(region)[:] = b"\1" * region.nbytes


def test_an_existing_file_is_neither_overwritten_nor_removed(tmp_path: Path) -> None:
    path = tmp_path / "region"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        HostRegion.create(path, 4096)
    assert path.read_bytes() == b"precious"


def test_system_errors_have_their_errno(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        HostRegion.open(tmp_path / "absent")
    with pytest.raises(FileNotFoundError):
        HostRegion.create(tmp_path / "absent" / "region", 8)
    empty = tmp_path / "empty"
    empty.touch()
    for path in (empty, tmp_path):
        with pytest.raises(OSError, match="Invalid argument") as caught:
            HostRegion.open(path)
        assert caught.value.errno == errno.EINVAL
    for nbytes in (0, 2**63):
        with pytest.raises(ValueError, match="nbytes"):
            HostRegion.create(tmp_path / "region", nbytes)
    assert sorted(tmp_path.iterdir()) == [empty]


@pytest.mark.parametrize("offset", [1, 4, 4089, 4092, 4096, 2**64 - 8])
def test_wrong_offsets(shm_path: Path, offset: int) -> None:
    with HostRegion.create(shm_path, 4096) as region:
        with pytest.raises(IndexError):
            region.load_word(offset)
        with pytest.raises(IndexError):
            region.store_word(offset, 1)
        assert bytes(region) == bytes(4096)


def test_a_region_smaller_than_a_word_has_none(shm_path: Path) -> None:
    with HostRegion.create(shm_path, 7) as region, pytest.raises(IndexError):
        region.load_word(0)


def test_read_only(shm_path: Path) -> None:
    HostRegion.create(shm_path, 64).close()
    with HostRegion.open(shm_path) as region:
        assert not region.writable
        with memoryview(region) as view:
            assert view.readonly
            with pytest.raises(TypeError):
                view[0] = 1
        with pytest.raises(PermissionError):
            region.store_word(0, 1)
        assert region.load_word(0) == 0


def test_close_waits_for_views(shm_path: Path) -> None:
    region = HostRegion.create(shm_path, 4096)
    view = memoryview(region)
    array = np.frombuffer(memoryview(region), dtype=np.uint64)
    tensor = torch.frombuffer(memoryview(region), dtype=torch.uint8)
    assert array.ctypes.data == tensor.data_ptr() == region.address
    with pytest.raises(BufferError):
        region.close()
    assert not region.closed
    tensor[0] = 9
    assert view[0] == 9
    view.release()
    del array
    # The tensor alone still holds its view.
    with pytest.raises(BufferError):
        region.close()
    del tensor
    gc.collect()
    region.close()
    region.close()
    assert region.closed
    for use in (lambda: region.address, lambda: region.nbytes, lambda: region.load_word(0), lambda: memoryview(region)):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_a_view_keeps_a_forgotten_region_mapped(shm_path: Path) -> None:
    view = memoryview(HostRegion.create(shm_path, 4096))
    gc.collect()
    view[100] = 7
    assert shm_path.read_bytes()[100] == 7


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("huge_pages", [False, True])
def test_pages_are_filled_by_threads(shm_path: Path, threads: int, huge_pages: bool) -> None:
    done: list[int] = []
    nbytes = 300 * MIB + 5
    with HostRegion.create(shm_path, nbytes, True, threads, huge_pages, done.append) as region:
        assert done == sorted(done)
        assert done[-1] == nbytes
        # The file has its space, although nothing is written to it.
        assert shm_path.stat().st_blocks * 512 >= nbytes
        memoryview(region)[nbytes - 1 : nbytes] = b"\7"
        with HostRegion.open(shm_path, populate_threads=threads) as reader:
            assert memoryview(reader)[nbytes - 1] == 7
            assert memoryview(reader)[0] == 0


def test_an_error_of_the_progress_function_ends_the_creation(shm_path: Path, tmp_path: Path) -> None:
    def refuse(done: int) -> None:
        raise RuntimeError(f"enough after {done}")

    for path in (shm_path, tmp_path / "region"):
        with pytest.raises(RuntimeError, match="enough"):
            HostRegion.create(path, MIB, progress=refuse)
        assert not path.exists()
        with pytest.raises(TypeError, match="progress"):
            HostRegion.create(path, MIB, progress=1)  # type: ignore[arg-type]
        assert not path.exists()


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_meet_a_full_file_system(tiny_tmpfs: Path, threads: int) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        HostRegion.create(tiny_tmpfs / "region", 1024 * MIB, prefault=True, threads=threads)
    assert caught.value.errno == errno.ENOSPC
    assert list(tiny_tmpfs.iterdir()) == []
    # A file with a hole has no page for it there either.
    hole = tiny_tmpfs / "hole"
    with hole.open("wb") as file:
        file.truncate(2 * MIB)
    with pytest.raises(OSError, match="No space left"):
        HostRegion.open(hole, populate_threads=threads)


def test_thread_counts_are_checked(shm_path: Path) -> None:
    for threads in (0, 65):
        with pytest.raises(ValueError, match="threads"):
            HostRegion.create(shm_path, 64, threads=threads)
    HostRegion.create(shm_path, 64).close()
    with pytest.raises(ValueError, match="threads"):
        HostRegion.open(shm_path, populate_threads=65)
