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
TENSOR = Scenario(
    "tp2-pp2",
    UNTIED
    + "--disable-bias-linear --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
    + "--expert-tensor-parallel-size 1 --use-distributed-optimizer",
)
TIED = Scenario("pp4-tied", "--disable-bias-linear --pipeline-model-parallel-size 4", layers=4)
CHUNKS = "--disable-bias-linear --num-layers-per-virtual-pipeline-stage 1 "
PP2X2 = Scenario("pp2x2", UNTIED + CHUNKS + "--pipeline-model-parallel-size 2", 2, layers=4, samples=4, dropout=0.1)
PP4X2 = Scenario("pp4x2", UNTIED + CHUNKS + "--pipeline-model-parallel-size 4", layers=8)


def replay(lab: Lab, scenario: Scenario, scope: list[int], folder: Path, overlap: bool) -> list[dict[str, Any]]:
    """What the ranks found."""
    folder.mkdir(exist_ok=True)
    job = lab.job(scenario, folder / "job")
    job.program, job.restarts, job.timeout_seconds = "tests.distributed.boundary_rank", 0, 120.0
    job.environment = {"BOUNDARY_LAB": json.dumps({"scope": scope, "overlap": overlap, "folder": str(folder)})}
    outcome = job.run()
    assert outcome.ok, outcome.output
    return [json.loads((folder / f"found.rank{rank}.json").read_text()) for rank in range(scenario.world_size)]


CASES = {
    "first": (PP2, [0], False),
    "last": (PP2, [1], False),
    "middle": (PP4, [1], False),
    "adjacent": (PP4, [1, 2], False),
    "apart-with-shared-parameters": (TIED, [0, 3], False),
    "tensor-parallel": (TENSOR, [1], False),
    "chunks-first": (PP2X2, [0], False),
    "chunks-last": (PP2X2, [1], False),
    "chunks-overlapped": (PP2X2, [1], True),
    "chunks-around-the-end": (PP4X2, [3, 0], False),
    "chunks-middle-overlapped": (PP4X2, [2], True),
}


@pytest.mark.parametrize("case", CASES)
def test_stages_replay_alone(lab: Lab, case: str, shared_memory: Path) -> None:
    scenario, scope, overlap = CASES[case]
    found = replay(lab, scenario, scope, shared_memory / "lab", overlap)
    for rank in found:
        assert not rank["different"]
        assert rank["compared"] > 40
        assert rank["iterations"] == [1, 2] and not rank["troubles"] and rank["sent"]
    replayed = [rank for rank in found if any(rank["refused"].values())]
    assert len(replayed) == len(found) * len(scope) // (4 if scenario in (PP4, TIED, PP4X2) else 2)
    for rank in replayed:
        refused = rank["refused"]
        assert (
            "belongs" in refused["shifted"] and "RecoveryError: iteration 1: transcript of rank" in refused["shifted"]
        )
        assert "transcript of rank" in refused["dropped"] and " records of " in refused["dropped"]
        for change in ("exchanged", "flipped"):
            # The first stage sends nothing that depends on the gradients which it receives.
            assert "differs from what rank" in refused[change] or "gradients differ" in refused[change]
    assert case == "first" or any("differs from what" in rank["refused"]["flipped"] for rank in replayed)
