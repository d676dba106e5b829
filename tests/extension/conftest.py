"""Shared-memory files that are gone after the test, whatever it does."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def shm_path() -> Iterator[Path]:
    """A path in shared memory where no file is yet."""
    path = Path("/dev/shm") / f"moevement-test-{uuid.uuid4().hex}"
    yield path
    path.unlink(missing_ok=True)
