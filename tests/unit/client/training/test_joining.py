"""What a launcher has made of a process."""

import socket

import pytest

from mempool.client.groups.joining import found

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("said", "group"),
    [
        ({"TORCHELASTIC_RUN_ID": "run-7"}, "run-7"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "10.0.0.7:29500"),
        ({}, "10.0.0.7:29500"),
        # Two hosts that start jobs of their own, as torchrun and accelerate do where nobody says a place.
        ({"MASTER_ADDR": "127.0.0.1"}, f"{socket.gethostname()}, 127.0.0.1:29500"),
        ({"MASTER_ADDR": "localhost"}, f"{socket.gethostname()}, localhost:29500"),
        ({"WORLD_SIZE": "1"}, None),
        ({"RANK": "2"}, None),
        ({"MEMPOOL_JOIN": "0"}, None),
        ({"MASTER_PORT": ""}, None),
    ],
)
def test_the_group_is_the_run_or_else_the_place_where_its_ranks_meet(said: dict[str, str], group: str | None) -> None:
    joining = found(TORCHRUN | said)
    assert (None if joining is None else (joining.group, joining.rank, joining.terms.world_size)) == (
        None if group is None else (group, 1, 2)
    )
