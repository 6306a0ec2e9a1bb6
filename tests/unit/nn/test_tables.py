"""A model's tables are found wherever its modules hold them."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mempool.client import Table
from mempool.errors import InvalidRequest
from mempool.nn import MemoryLayer, PoolOptimizer
from mempool.nn.tables import tables_of, values_of

from .stand_in import local_table


@dataclass
class Orders:
    table: Table
    others: dict[str, list[Table]] = field(default_factory=dict)


class Holder(nn.Module):
    def __init__(self, **held: Any) -> None:
        super().__init__()
        for name, part in held.items():
            setattr(self, name, part)


def names(model: nn.Module) -> list[str]:
    return [table.name for table in tables_of(model)]


def make(*table_names: str) -> list[Table]:
    return [local_table(name=name) for name in table_names]


def test_in_attributes_lists_dicts_and_dataclasses() -> None:
    a, b, c, d, e, f, g, h = make(*"abcdefgh")
    model = nn.Sequential(
        Holder(one=a, several=[b, (c, {"deep": [d]})]),
        Holder(orders=Orders(e, {"x": [f]}), space=SimpleNamespace(table=g), again=a),
        MemoryLayer(12, table=h, heads=1, topk=2, key_dim=4),
    )
    assert names(model) == list("abcdefgh")
    optimizer = PoolOptimizer(model)
    assert [group["table"] for group in optimizer.param_groups] == list("abcdefgh")
    a.gather(torch.tensor([[1]])).sum().backward()
    d.gather(torch.tensor([[1]])).sum().backward()
    optimizer.step()
    assert a.pending == d.pending == 0


def test_cycles_data_sets_and_hidden_modules_do_no_harm() -> None:
    (a,) = make("a")
    model = Holder(words=list(range(20_000)), text="x" * 100, hidden=[Holder(table=a)])
    model.loop = [model, [model]]  # type: ignore[assignment]
    model.loop.append(model.loop)  # type: ignore[union-attr, arg-type, operator]
    assert names(model) == ["a"]


def test_a_pool_that_a_model_holds_is_not_searched() -> None:
    a, b = make(*"ab")
    with pytest.raises(InvalidRequest, match="found no MemoryLayer in model Holder"):
        PoolOptimizer(Holder(pool=type("Pool", (), {"tables": [a]})()))
    assert names(Holder(pool=object(), table=b)) == ["b"]


def test_values_are_those_of_the_layers_of_a_table() -> None:
    a, b = make(*"ab")
    layers = [MemoryLayer(12, table=table, heads=1, topk=2, key_dim=4) for table in (a, b, a)]
    assert [id(values) for values in values_of(nn.Sequential(*layers), a)] == [
        id(layers[0].values),
        id(layers[2].values),
    ]
