"""Copies of what holds a table share it; pickling is refused in words; an average of models is told what it reads."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mempool.nn import MemoryLayer, PoolOptimizer

from .stand_in import local_table


def make_layer() -> MemoryLayer:
    torch.manual_seed(5)
    return MemoryLayer(12, table=local_table(), heads=1, topk=3, key_dim=6)


def test_a_shallow_copy_shares_everything_as_torchs_do() -> None:
    layer = make_layer()
    twin = copy.copy(layer)
    assert twin is not layer
    assert twin.half_keys is layer.half_keys
    assert twin.table is layer.table
    x = torch.randn(3, 12)
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_of_a_table_are_the_table(copied: Callable[[object], object]) -> None:
    table = local_table()
    assert copied(table) is table
    model = nn.Module()
    model.tables = [table]  # type: ignore[assignment]
    assert copied(model).tables[0] is table  # type: ignore[attr-defined]


@pytest.mark.parametrize("save", [pickle.dumps, lambda thing: torch.save(thing, io.BytesIO())])
def test_pickling_says_what_to_do(save: Callable[[object], object]) -> None:
    layer = make_layer()
    with pytest.raises(TypeError, match=r"Save layer.state_dict\(\)"):
        save(nn.Sequential(layer))
    with pytest.raises(TypeError, match=r"Save its state_dict\(\)"):
        save(PoolOptimizer(layer))
    for parameter in PoolOptimizer(layer.table).param_groups[0]["params"]:
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            save(parameter)
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copy.deepcopy(parameter)
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be copied"):
            copied(PoolOptimizer(layer))


@pytest.mark.parametrize("options", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}])
def test_an_average_of_models_says_once_that_it_reads_live_values(options: dict[str, object]) -> None:
    model = nn.Sequential(make_layer())
    average = AveragedModel(model, **options)
    average.update_parameters(model)
    x = torch.randn(3, 12)
    with torch.no_grad(), pytest.warns(UserWarning, match="reads the live values of table 'facts'"):
        average(x)
    average.update_parameters(model)
    with torch.no_grad():
        average(x)


def test_an_average_by_state_dict_says_so_too() -> None:
    model = nn.Sequential(make_layer())
    average = copy.deepcopy(model).eval()
    for ours, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        ours.lerp_(theirs, 0.1)
    with pytest.warns(UserWarning, match="values are not averaged"):
        average(torch.randn(3, 12))


def test_copies_that_are_trained_or_left_alone_are_told_nothing() -> None:
    layer = make_layer()
    x = torch.randn(3, 12)
    teacher = copy.deepcopy(layer).eval().requires_grad_(False)
    teacher(x)
    clone = copy.deepcopy(layer)
    clone.reset_parameters()
    clone(x).sum().backward()
    torch.optim.AdamW(clone.parameters()).step()
    clone.eval()(x)


def test_a_layer_is_copied_in_inference_mode() -> None:
    layer, x = make_layer(), torch.randn(3, 12)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
