"""Pins by the protocol alone: taking them, and all that a reader sees by one."""

from typing import Any

import torch
from torch import Tensor

from mempool.types import GatherRequest, PinRequest, ReadRowsRequest, ScoreRequest
from mempool.types.reading.pins import PinAction

from .bags import make_bags
from .driver import Driver

SLOTS = torch.arange(50)


def pin(driver: Driver, shard: int, do: PinAction, token: str = "reader", **what: Any) -> int:
    """What becomes of a pin at one shard."""
    version = what.get("version", 0)
    envelope = driver.envelope(shard, table_version=version if do == "settle" else 0)
    request = PinRequest(envelope=envelope, do=do, pin=token, **{"lease_s": 60.0, **what})
    return driver.call(driver.host(shard).pin(request)).version


def pin_all(driver: Driver, token: str = "reader") -> int:
    """Pin the newest version at all owners."""
    version = max(pin(driver, shard, "arm", token) for shard in driver.owners)
    assert {pin(driver, shard, "settle", token, version=version) for shard in driver.owners} == {version}
    return version


def seen(driver: Driver, token: str = "") -> dict[str, Tensor]:
    """All that a reader can see, at a pin or ("") of the newest version, shard by shard."""
    found = {}
    schema = driver.schema
    for shard in driver.owners:
        envelope = driver.envelope(shard)
        for number, bags in enumerate((make_bags(1), make_bags(2))):
            for dtype in ("float32", "float8_e4m3fn"):
                gather = GatherRequest(
                    envelope=envelope,
                    lookup_id=1,
                    ids=bags.ids % schema.num_slots,
                    weights=bags.weights,
                    offsets=bags.offsets,
                    remember=False,
                    reply_dtype=dtype,  # type: ignore[arg-type]
                    pin=token,
                )
                found[f"{shard} sums {number} {dtype}"] = driver.call(driver.host(shard).gather(gather)).values
        arrays = {"values": SLOTS[: schema.num_slots]}
        if schema.keys is not None:
            arrays["keys"] = torch.arange(3) if schema.num_key_pages else SLOTS
            queries = torch.randn(4, 3 if schema.num_key_pages else 1, schema.keys.key_dim, generator=seeded(3))
            score = ScoreRequest(envelope=envelope, queries=queries, topk=5, pin=token)
            reply = driver.call(driver.host(shard).score(score))
            found |= {f"{shard} scores": reply.scores, f"{shard} ids": reply.ids}
        if schema.dtype == "int8":
            arrays["values.scales"] = SLOTS
        for array, ids in arrays.items():
            read = ReadRowsRequest(envelope=envelope, array=array, ids=ids, pin=token)
            found[f"{shard} {array}"] = driver.call(driver.host(shard).read_rows(read)).rows
    return {name: tensor.clone() for name, tensor in found.items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
