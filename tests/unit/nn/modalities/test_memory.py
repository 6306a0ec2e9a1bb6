"""MultiModalMemory on tables that are local tensors: what it refuses, its states and copies, the compiler's graph."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mempool.client import Table
from mempool.errors import InvalidRequest
from mempool.nn import MultiModalMemory, PoolOptimizer
from mempool.nn.modalities.ranges import visible_ranges
from tests.agreement.multimodal import LocalMemory
from tests.agreement.reference import relative_error
from tests.unit.nn.stand_in import local_table, session_of

WIDTHS = {"image": 5, "sound": 7, "text": 6}


def make_memory(table: Table | dict[str, Table] | None = None, **options: Any) -> MultiModalMemory:
    torch.manual_seed(5)
    of_memory = {"heads": 2, "topk": 4, "key_dim": 6} | options
    return MultiModalMemory(WIDTHS, table=local_table() if table is None else table, **of_memory)


def inputs(*shape: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(*shape, width, generator=generator) for name, width in WIDTHS.items()}


def test_any_leading_shape_and_none_at_all() -> None:
    memory = make_memory(fuse="gate", out_dim=3)
    batch = inputs(2, 3)
    y = memory(batch)
    assert y.shape == (2, 3, 3)
    for place in ((0, 1), (1, 2)):
        torch.testing.assert_close(memory({name: x[place] for name, x in batch.items()}), y[place])
    assert memory({name: x[:0] for name, x in batch.items()}).shape == (0, 3, 3)
    assert MultiModalMemory({"one": 4}, table=local_table(), topk=4)({"one": torch.randn(2, 4)}).shape == (2, 7)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_queries_are_normalised_by_modality(norm: str) -> None:
    plain, memory = make_memory(), make_memory(query_norm=norm)
    x = inputs(20)["sound"]
    linear, part = plain.queries["sound"], memory.queries["sound"]
    part.linear.load_state_dict(linear.state_dict())
    raw = linear(x)
    if norm == "batch":
        expected = (raw - raw.mean(0)) / (raw.var(0, correction=0) + 1e-5).sqrt()
    else:
        heads = raw.unflatten(-1, (2, 6))
        expected = ((heads - heads.mean(-1, True)) / (heads.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()).flatten(
            1
        )
    torch.testing.assert_close(
        memory.views["sound"].scoring_queries(part(x)).flatten(1), expected, rtol=1e-4, atol=1e-5
    )
    before = copy.deepcopy(memory.queries["image"].state_dict())
    memory.lookup(x, modality="sound", from_="image").sum().backward()
    assert part.norm.weight.grad is not None
    assert part.norm.weight.grad.any()
    assert all(torch.equal(now, before[name]) for name, now in memory.queries["image"].state_dict().items())


@pytest.mark.parametrize("fuse", ["sum", "gate"])
def test_some_modalities_are_fused_as_if_there_were_no_others(fuse: str) -> None:
    memory = make_memory(fuse=fuse, partial=True)
    batch = inputs(3)
    some = {name: batch[name] for name in ("text", "image")}
    local = LocalMemory(memory, dict.fromkeys(WIDTHS, session_of(memory.views["text"].table).values))
    assert relative_error(memory(some), local({name: x.double() for name, x in some.items()})) < 3e-6
    assert torch.equal(memory({"image": batch["image"]}), memory.lookup(batch["image"], modality="image"))
    with pytest.raises(InvalidRequest, match=r"no input of modality 'image'.*at least one"):
        memory({})


def test_all_is_given_in_any_order() -> None:
    memory, batch = make_memory(fuse="concat"), inputs(3)
    assert torch.equal(memory(dict(reversed(batch.items()))), memory(batch))


def test_offsets_change_what_is_found_and_are_trained() -> None:
    memory = make_memory()
    x = inputs(40)["image"]
    _, before = memory.lookup(x, modality="image", return_lookup=True)
    _, others = memory.lookup(x, modality="image", from_="text", return_lookup=True)
    assert torch.equal(before.ids, others.ids), "at first all see the same"
    with torch.no_grad():
        memory.views["image"].search.offsets[:, 0, 3] = 50.0
    _, after = memory.lookup(x, modality="image", return_lookup=True)
    assert (after.ids // 9 == 3).all()
    assert not (before.ids // 9 == 3).all()
    assert torch.equal(memory.lookup(x, modality="image", from_="text", return_lookup=True)[1].ids, before.ids)
    memory.reset_parameters()
    assert not memory.views["image"].search.offsets.any()
    assert make_memory(offsets=False).views["image"].search.offsets is None


def test_a_state_goes_back_and_a_copy_has_keys_of_its_own() -> None:
    memory, other = make_memory(reserved={"image": range(9)}), make_memory(reserved={"image": range(9)})
    batch = inputs(3)
    state = memory.state_dict()
    assert not [name for name in state if name.endswith("values")]
    assert [name for name in state if "half_keys" in name] == ["keys.half_keys"], "once, of all"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(other(batch), memory(batch))
    other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    assert torch.equal(other(batch), memory(batch))
    clone = copy.deepcopy(memory)
    assert torch.equal(clone(batch), memory(batch))
    clone.keys.half_keys.data.mul_(-1.0)
    assert not torch.equal(clone(batch), memory(batch)), "its views have the copy's keys"
    assert torch.equal(other(batch), memory(batch)), "and the first one's are what they were"
    with pytest.raises(TypeError, match=r"Save layer.state_dict\(\)"):
        pickle.dumps(memory)


def test_training_reaches_all_that_is_seen_and_frozen_tables_stay() -> None:
    table = local_table()
    memory = make_memory(table, reserved={"image": range(18), "text": range(18, 27)})
    before = session_of(table).values.clone()
    dense, optimizer = torch.optim.SGD(memory.parameters(), lr=0.1), PoolOptimizer(memory)
    losses = []
    for _ in range(15):
        loss = (memory(inputs(8)) - 1.0).square().mean()
        loss.backward()
        dense.step(), optimizer.step()
        dense.zero_grad(), optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert not torch.equal(session_of(table).values, before)
    table.requires_grad_(False)
    memory(inputs(2)).sum().backward()
    assert table.pending == 0


def test_autocast_a_bfloat16_memory_and_the_meta_device() -> None:
    memory, batch = make_memory(fuse="gate", qk_norm=True), inputs(3)
    expected = memory(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(memory(batch), expected) < 0.1
    half = memory.to(torch.bfloat16)
    y = half({name: x.bfloat16() for name, x in batch.items()})
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 0.1
    with pytest.raises(InvalidRequest, match="meta device"):
        make_memory(device="meta")({name: x.to("meta") for name, x in batch.items()})


def test_the_graph_of_torch_compile_is_whole() -> None:
    torch.manual_seed(5)
    memory = MultiModalMemory(
        {"a": 3, "b": 4}, table=local_table(), reserved={"a": range(9)}, heads=1, topk=3, key_dim=4
    )
    batch = {"a": torch.randn(2, 3), "b": torch.randn(2, 4)}
    expected = memory(batch)
    expected.sum().backward()
    grads = {name: each.grad for name, each in memory.named_parameters() if each.grad is not None}
    memory.zero_grad()
    found = torch.compile(memory, backend="aot_eager", fullgraph=True)(batch)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    for name, parameter in memory.named_parameters():
        torch.testing.assert_close(parameter.grad, grads.get(name), msg=name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"x": torch.zeros(2, 5), "modality": "video"}, "modality = 'video': this memory has image, sound, text"),
        ({"x": torch.zeros(2, 5), "modality": "image", "from_": "taste"}, "from_ = 'taste': this memory has image"),
        ({"x": torch.zeros(2, 6), "modality": "image"}, r"modality 'image' takes \[..., 5\], got \[2, 6\]"),
        ({"x": torch.tensor(1.0), "modality": "image"}, r"takes \[..., 5\], got \[\]"),
    ],
)
def test_senseless_lookups_are_refused(call: dict[str, Any], message: str) -> None:
    memory = make_memory()
    with pytest.raises(InvalidRequest, match=message):
        memory.lookup(**call)
    assert session_of(memory.views["image"].table).remembered == [], "nothing was asked"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "no input of modality 'text': give all of image, sound, text; .* partial=True"),
        ({"video": torch.zeros(3, 5)}, "modality = 'video'"),
        ({"sound": torch.zeros(3, 5)}, r"modality 'sound' takes \[..., 7\], got \[3, 5\]"),
        ({"sound": torch.zeros(1, 7)}, r"leading shapes differ: \{'image': \[3\], 'sound': \[1\], 'text': \[3\]\}"),
    ],
)
def test_senseless_inputs_are_refused(change: dict[str, Any], message: str) -> None:
    memory = make_memory()
    batch = {name: x for name, x in {**inputs(3), **change}.items() if x is not None}
    with pytest.raises(InvalidRequest, match=message):
        memory(batch)
    assert session_of(memory.views["image"].table).remembered == [], "nothing was asked"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reserved": {"video": range(3)}}, "reserved for modality 'video', and there are image, sound, text"),
        ({"reserved": {"image": 3}}, r"of 'image' are 3: give a range\(first, end\)"),
        ({"reserved": {"image": range(0, 9, 2)}}, "give a range"),
        ({"reserved": {"image": range(4, 4)}}, "give at least one, of 0 to 80"),
        ({"reserved": {"image": range(80, 82)}}, r"range\(80, 82\): give at least one, of 0 to 80"),
        ({"reserved": {"image": range(-1, 2)}}, "of 0 to 80"),
        (
            {"reserved": {"text": range(5, 20), "image": range(19, 30)}},
            "overlap: 'text' has 5 to 19 and 'image' 19 to 29",
        ),
        (
            {"reserved": {"text": range(40), "image": range(40, 81)}},
            "all 81 slots are reserved, and none for modality 'sound'",
        ),
        ({"reserved": {"image": range(79)}}, "topk = 4, and modality 'sound' sees 2 slots"),
        ({"topk": 82}, "topk must be from 1 to the table's 81 slots, got 82"),
        ({"reserved": [range(9)]}, "give a dict of modality to slots, as"),
        ({"query_norm": "mean"}, "query_norm must be"),
        ({"fuse": "mean"}, 'fuse must be "sum", "concat" or "gate", got \'mean\''),
        ({"fuse": "concat", "partial": True}, "has a place for each modality"),
        ({"gate": nn.Linear(5, 7)}, "modules in gates may be replaced"),
        ({"out": "none", "out_dim": 9}, "needs value_dim = out_dim"),
        ({"key_dim": 7}, "key_dim must be even"),
        ({"ways": 1}, "ways must be at least 2"),
        ({"key_init_std": -1.0}, "key_init_std"),
        ({"query_dropout": 1.5}, "query_dropout = 1.5"),
        ({"table": "facts"}, r"is no table of a pool: give pool.table\('facts'\)"),
    ],
)
def test_senseless_memories_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make_memory(**options)


def test_senseless_tables_are_refused() -> None:
    one, other, narrow = local_table(), local_table(), local_table(value_dim=6)
    with pytest.raises(InvalidRequest, match=r"tables are of image, and modalities are image, sound, text: .* 'sound'"):
        make_memory({"image": one})
    with pytest.raises(InvalidRequest, match="give both of 'video', or neither"):
        make_memory({"image": one, "sound": other, "text": one, "video": one})
    with pytest.raises(InvalidRequest, match="'text': 6"):
        make_memory({"image": one, "sound": other, "text": narrow})
    with pytest.raises(InvalidRequest, match="reserved is of one table"):
        make_memory({"image": one, "sound": other, "text": one}, reserved={"image": range(3)})


@pytest.mark.parametrize("names", [{}, ["image"], {"a.b": 3}, {"": 3}, {"keys": 3}, {3: 3}])
def test_names_that_torch_cannot_have_are_refused(names: Any) -> None:
    with pytest.raises(InvalidRequest, match="modalit"):
        MultiModalMemory(names, table=local_table(), topk=4)
    with pytest.raises(InvalidRequest, match="the width of modality 'image' must be at least 1, got 0"):
        MultiModalMemory({"image": 0}, table=local_table(), topk=4)


def test_what_a_modality_sees_is_its_own_and_what_nobody_reserved() -> None:
    reserved = {"b": range(10, 20), "a": range(0, 5), "d": range(20, 25)}
    assert visible_ranges("abcd", 30, reserved) == {
        "a": ((0, 10), (25, 30)),
        "b": ((5, 20), (25, 30)),
        "c": ((5, 10), (25, 30)),
        "d": ((5, 10), (20, 30)),
    }
    assert visible_ranges("ab", 30, None) == {"a": ((0, 30),), "b": ((0, 30),)}
