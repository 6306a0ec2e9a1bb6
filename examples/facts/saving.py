"""A race on a disk: both models, their optimizers and the pool's tables of one step, to stop and go on from.

The pool writes its tables (`mempool.nn.PoolState`), torch all else: `PLACE/pool` and `PLACE/race.pt`.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import torch

from facts.race import Race
from facts.train import Contestant
from mempool.nn import PoolState

_FILE = "race.pt"
_KEPT = 2


class SaveError(Exception):
    """What lies at a place is not what is to be gone on from; the message says why."""


class Stopped(Exception):
    """The race was saved and stopped on purpose."""


class RaceSaves:
    """Saves a race every so many steps, at its end, and where it is to stop. Give its `after` every step.

    Args:
        race: what is saved.
        place: a folder; with a pool of other hosts, one that all of them have.
        every: steps between two saves.
        stop_after: stop after so many steps of the race; None: at its end.
    """

    def __init__(self, race: Race, place: Path, *, every: int, stop_after: int | None = None) -> None:
        self._race = race
        self._place = place
        self._every = every
        self._stop_after = stop_after
        self._pool = PoolState(race.pool, place.absolute() / "pool", tables=[race.table], keep=_KEPT)

    def after(self, step: int) -> None:
        """So many steps are done.

        Raises:
            Stopped: it was to stop here; all is saved.
        """
        stops = step == self._stop_after
        if stops or step % self._every == 0 or step == self._race.num_steps:
            self.save(step)
        if stops:
            raise Stopped(f"stopped after step {step} of {self._race.num_steps}; --resume {self._place} goes on there")

    def save(self, step: int) -> None:
        """Write it down. Until the last of it is written, what was saved before counts."""
        state = {
            "race": _described(self._race),
            "step": step,
            "contestants": [_state_of(each) for each in (self._race.memory, self._race.dense)],
            "pool": self._pool.state_dict(),
        }
        self._place.mkdir(parents=True, exist_ok=True)
        new = self._place / f"{_FILE}.new"
        with new.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._place / _FILE)


def resume(race: Race, place: Path) -> int:
    """Puts a race back to where it was saved: models, optimizers, schedules and the pool's table.

    Returns:
        the steps that are done.

    Raises:
        SaveError: there is nothing, or it is of another race; nothing was changed.
        MempoolError: what the pool raises.
    """
    try:
        state = torch.load(place / _FILE)
    except FileNotFoundError:
        raise SaveError(f"{place / _FILE} is not there: nothing was saved at {place}.") from None
    saved, own = state["race"], _described(race)
    if saved != own:
        differing = ", ".join(
            f"{name} {saved.get(name)} there, {own[name]} here" for name in own if saved.get(name) != own[name]
        )
        raise SaveError(f"{place} has another race ({differing}): give the arguments that it was begun with.")
    PoolState(race.pool, place.absolute() / "pool", tables=[race.table]).load_state_dict(state["pool"])
    for contestant, its in zip((race.memory, race.dense), state["contestants"], strict=True):
        contestant.model.load_state_dict(its["model"])
        for part, part_state in zip(_parts(contestant), its["parts"], strict=True):
            part.load_state_dict(part_state)
    race.steps_done = state["step"]
    return race.steps_done


def _state_of(contestant: Contestant) -> dict[str, Any]:
    return {"model": contestant.model.state_dict(), "parts": [part.state_dict() for part in _parts(contestant)]}


def _parts(contestant: Contestant) -> list[Any]:
    return [*contestant.optimizers, *contestant.schedulers]


def _described(race: Race) -> dict[str, Any]:
    """What must be the same for the steps that are left to be those that were left."""
    told = "\n".join(f"{fact.relation}\t{fact.subject}\t{fact.answer}" for fact in race.book.facts)
    return {
        "facts": len(race.book.facts),
        "checksum of the facts": zlib.crc32(told.encode()),
        "seed": race.config.seed,
        "steps": race.num_steps,
    }
