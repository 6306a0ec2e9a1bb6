"""Pages for a snapshot, as they were when it began, while rows are written and pages come and go."""

import random

import numpy as np
import pytest
import torch

from mempool.shard.pages import arena as arena_module
from mempool.shard.pages.arena import Arena
from mempool.shard.pages.capture import ArenaCut
from mempool.shard.pages.named_arrays import named_arrays
from mempool.types import FlatKeySpec, OptimizerSpec
from tests.contract.driver import make_schema

SLOTS = 8


def _arena(dtype: str) -> Arena:
    optimizer = OptimizerSpec(algorithm="rowwise_adagrad", lr=0.1)
    keys = FlatKeySpec(key_dim=6) if dtype == "float32" else None
    schema = make_schema(num_slots=16 * SLOTS, optimizer=optimizer, keys=keys, dtype=dtype)
    return Arena(schema=schema, blocks=(0, 2), arrays=named_arrays(schema), device=torch.device("cpu"))


def _write(arena: Arena, rows: torch.Tensor, dice: random.Random) -> None:
    with arena.writing(rows):
        for stored in arena.stores.values():
            size = (len(rows), stored.shape[1] * stored.element_size())
            generator = torch.Generator().manual_seed(dice.randrange(2**31))
            stored.view(torch.uint8)[rows] = torch.randint(256, size, generator=generator, dtype=torch.uint8)


def _bytes(arena: Arena, place: int) -> dict[str, bytes]:
    return {
        name: pages[place].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, pages in arena.raw.items()
    }


def _taken(cut: ArenaCut, num_bytes: int) -> dict[bytes, dict[str, bytes]]:
    return {key: {name: array.numpy().tobytes() for name, array in arrays} for key, arrays in cut.take(num_bytes)}


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("seed", range(8))
def test_pages_are_written_as_they_were_whatever_happens_meanwhile(
    monkeypatch: pytest.MonkeyPatch, dtype: str, seed: int
) -> None:
    monkeypatch.setattr(arena_module, "_SHRINK_BYTES", 1)
    dice, arena = random.Random(seed), _arena(dtype)
    arena.publish(np.arange(12), taken := arena.take(12))
    _write(arena, torch.arange(12 * SLOTS), dice)
    wanted = {int(place): b"page %d" % place for place in taken if dice.random() < 0.8}
    expected = {key: _bytes(arena, place) for place, key in wanted.items()}
    here, found = set(range(12)), {}
    cut = ArenaCut(arena, dict(wanted), page_slots=SLOTS)
    for _ in range(60):
        match dice.randrange(6):
            case 0:
                found |= _taken(cut, dice.choice((1, 2 * arena.page_bytes)))
            case 1 if len(here) > 1:
                gone = dice.sample(sorted(here), dice.randint(1, len(here) - 1))
                here -= set(gone)
                arena.give_back(arena.withdraw(np.array(gone)))
                arena.shrink()
            case 2 if len(here) < 16:
                come = dice.sample(sorted(set(range(16)) - here), 1)
                here |= set(come)
                arena.publish(np.array(come), places := arena.take(1))
                _write(arena, torch.arange(int(places[0]) * SLOTS, int(places[0] + 1) * SLOTS), dice)
            case _:
                lies = dice.choice(arena.page_of[sorted(here)].tolist())
                _write(arena, torch.tensor([lies * SLOTS + dice.randrange(SLOTS) for _ in range(3)]), dice)
    while some := _taken(cut, 1):
        found |= some
    assert found == expected
    assert arena.cut is None
    assert cut.used_bytes == 0


def test_a_write_to_a_row_copies_that_row() -> None:
    """Not its page: a step's rows are spread over all pages, and the first one would copy them all."""
    arena = _arena("float32")
    arena.publish(np.arange(12), arena.take(12))
    _write(arena, torch.arange(12 * SLOTS), random.Random(1))
    cut = ArenaCut(arena, {place: b"%d" % place for place in range(12)}, page_slots=SLOTS)
    row_bytes = arena.page_bytes // SLOTS
    _write(arena, torch.tensor([3, 3, 40]), random.Random(2))
    assert cut.used_bytes == 2 * row_bytes
    _write(arena, torch.tensor([3, 40, 41]), random.Random(3))
    assert cut.used_bytes == 3 * row_bytes
    cut.take(1)  # the first page, of rows 0 to 7
    assert cut.used_bytes == 2 * row_bytes


def test_a_table_that_is_dropped_meanwhile_is_whole_until_the_snapshot_has_it() -> None:
    """What its fork has copied is needed by no fork, and the snapshot has still to read it."""
    dice, arena = random.Random(1), _arena("float32")
    arena.publish(np.arange(12), taken := arena.take(12))
    _write(arena, torch.arange(12 * SLOTS), dice)
    while arena.share(2**20):
        pass
    schema = make_schema(num_slots=16 * SLOTS, optimizer=OptimizerSpec(algorithm="rowwise_adagrad", lr=0.1))
    fork = Arena(schema=schema, blocks=(0, 2), arrays=arena.arrays, device=torch.device("cpu"), of=arena)
    expected = {b"page %d" % place: _bytes(arena, int(place)) for place in taken}
    cut = ArenaCut(arena, {int(place): b"page %d" % place for place in taken}, page_slots=SLOTS)
    _write(arena, torch.tensor([3]), dice)
    arena.close()
    assert _taken(cut, 2**30) == expected
    assert cut.take(1) == []
    (memory, *_) = arena._memory.values()
    assert memory._lent is not None
    assert not memory._lent.kept, "what no fork needs is given back then"
    fork.close()
