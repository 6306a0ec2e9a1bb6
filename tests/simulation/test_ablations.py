"""Without each safeguard some seed shows a violation: so the simulation would notice its loss, and it is needed."""

import pytest
import torch

from tests.simulation.ablations import ABLATIONS, SEEN_AT, play_without


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("safeguard", sorted(SEEN_AT))
@pytest.mark.filterwarnings("ignore")  # of processes that were killed with calls under way
def test_a_safeguard_that_is_off_is_missed(safeguard: str) -> None:
    assert safeguard in ABLATIONS
    assert play_without((safeguard, SEEN_AT[safeguard])).violations
