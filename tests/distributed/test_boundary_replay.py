"""Stages replay alone from their neighbours' transcripts: gradients, losses and sends equal in every bit."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import Lab
from tests.support.scenario import Scenario

UNTIED = "--untie-embeddings-and-output-weights "
PP2 = Scenario(
    "pp2",
    UNTIED + "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2",
    dropout=0.1,
)
PP4 = Scenario("pp4", UNTIED + "--disable-bias-linear --pipeline-model-parallel-size 4", layers=4)


def replay(lab: Lab, scenario: Scenario, scope: list[int], folder: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """What the ranks found."""
    folder.mkdir(exist_ok=True)
    job = lab.job(scenario, tmp_path / "job")
    job.program, job.restarts, job.timeout_seconds = "tests.distributed.boundary_rank", 0, 120.0
    job.environment = {"BOUNDARY_LAB": json.dumps({"scope": scope, "folder": str(folder)})}
    outcome = job.run()
    assert outcome.ok, outcome.output
    return [json.loads((folder / f"found.rank{rank}.json").read_text()) for rank in range(scenario.world_size)]


@pytest.mark.parametrize(
    ("scenario", "scope"),
    [(PP2, [0]), (PP2, [1]), (PP4, [1]), (PP4, [1, 2])],
    ids=lambda value: value.name if isinstance(value, Scenario) else "stages" + "-".join(map(str, value)),
)
def test_stages_replay_alone(
    lab: Lab, scenario: Scenario, scope: list[int], shared_memory: Path, tmp_path: Path
) -> None:
    found = replay(lab, scenario, scope, shared_memory / "lab", tmp_path)
    for rank in found:
        assert not rank["different"]
        assert rank["compared"] > 40
        assert rank["iterations"] == [1, 2] and not rank["problem"] and rank["sent"]
    print([rank["refused"] for rank in found])
