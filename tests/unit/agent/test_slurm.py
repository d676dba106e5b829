import pytest

from megatron.moevement.agent.slurm import NotUnderSlurm, Place, first_host, place

STEP = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NODELIST": "n[03-05],gpu9",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
}


def test_ranks_go_by_node_and_the_last_ones_are_spares() -> None:
    ranks = [place({**STEP, "SLURM_NODEID": str(node)}, spares=2).node_rank for node in range(4)]
    assert ranks == [0, 1, None, None]
    assert place(STEP, spares=0) == Place(4, 1, ("n03", 20345), gpus=0)
    assert place({**STEP, "SLURM_GPUS_ON_NODE": "8"}, spares=1).gpus == 8


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-3]", "n1"),
        ("n[007,9-11]x,other", "n007x"),
        ("rack[1-2]n[07-12,20],login", "rack1n07"),
        ("a-b[4,6]", "a-b4"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("change", "spares", "message"),
    [
        ({"SLURM_LOCALID": "1"}, 0, "this node has several tasks; start the agents with srun --ntasks-per-node=1"),
        ({}, 4, "the step has 4 nodes and 4 of them would be spares; give --spares less"),
    ],
)
def test_other_steps_are_refused(change: dict[str, str], spares: int, message: str) -> None:
    with pytest.raises(NotUnderSlurm, match=message):
        place({**STEP, **change}, spares)


@pytest.mark.parametrize("name", STEP)
def test_every_variable_is_needed(name: str) -> None:
    with pytest.raises(NotUnderSlurm, match=f"{name} is not set; start the agents with srun"):
        place({key: value for key, value in STEP.items() if key != name}, 0)
