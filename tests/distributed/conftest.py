"""One fork server, one small corpus and one cache of undisturbed runs for all distributed tests."""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launcher import ROOT, Job, Outcome, Zygote
from tests.support.scenario import Scenario


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """The fork server."""
    server = Zygote()
    yield server
    server.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text: a part of the standard library's sources, as `.bin`/`.idx`."""
    prefix = tmp_path_factory.mktemp("corpus") / "text"
    command = [sys.executable, "scripts/prepare_data.py", "--python-stdlib", "--max-megabytes", "1"]
    subprocess.run([*command, "--output-prefix", str(prefix)], cwd=ROOT, check=True, capture_output=True)
    return prefix


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    """A directory for slots in /dev/shm, removed afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="moevement-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


class Lab:
    """Runs scenarios, and remembers the undisturbed run of each."""

    def __init__(self, zygote: Zygote, corpus: Path, directory: Path) -> None:
        self.zygote, self.corpus, self.directory = zygote, corpus, directory
        self._references: dict[str, Outcome] = {}

    def job(self, scenario: Scenario, directory: Path, extra: list[str] | None = None) -> Job:
        """A job of the scenario with further arguments."""
        arguments = [*scenario.arguments(self.corpus), *(extra or [])]
        return Job(self.zygote, directory, scenario.world_size, arguments, faults=list(scenario.faults))

    def reference(self, scenario: Scenario) -> Outcome:
        """The outcome of the scenario undisturbed, without sparse checkpointing; run once."""
        text = json.dumps([scenario.arguments(self.corpus), scenario.faults, scenario.world_size])
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if key not in self._references:
            job = self.job(scenario, self.directory / key)
            job.restarts = 0
            outcome = job.run()
            assert outcome.ok, outcome.output
            self._references[key] = outcome
        return self._references[key]


@pytest.fixture(scope="session")
def lab(zygote: Zygote, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The laboratory."""
    return Lab(zygote, corpus, tmp_path_factory.mktemp("references"))
