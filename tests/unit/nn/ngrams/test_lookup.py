"""The n-gram lookup: fetched early and shared, frozen, zeroed, copied and saved as a table's layers are; bad input."""

import copy
import pickle
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mempool
from mempool.client import Pool
from mempool.errors import InvalidRequest
from mempool.nn import NgramLookup, NgramMemory, Ngrams, PoolOptimizer, canonical_ids
from mempool.nn.tables import values_of

from .test_formulas import DIM, HEAD_DIM, NGRAMS, VOCAB, batch, make


@pytest.fixture
def memory(pool: Pool) -> Iterator[NgramMemory]:
    yield make(pool, {})
    pool.drop_table("ngrams")


def result_of(memory: NgramMemory, tokens: Tensor, hidden: Tensor) -> list[Tensor]:
    """The answer and the gradients, the rows' as their norm."""
    memory.zero_grad()
    y = memory(hidden, tokens)
    y.sin().sum().backward()
    prepared = memory.lookup.table.prepare()
    assert prepared is not None
    return [y.detach(), memory.key.weight.grad.clone(), torch.tensor(prepared.squared_norm)]  # type: ignore[union-attr]


def lookups(memory: NgramMemory) -> int:
    return memory.lookup.table.counters.lookups


def test_what_was_prefetched_is_taken_bitwise_and_asked_for_once(memory: NgramMemory) -> None:
    batches = [batch(seed) for seed in range(3)]
    plain = [result_of(memory, tokens, hidden) for hidden, tokens in batches]
    memory.lookup.table.discard()
    before = lookups(memory)
    for _, tokens in batches:
        assert memory.prefetch(tokens)
    ahead = [result_of(memory, tokens, hidden) for hidden, tokens in batches]
    assert lookups(memory) == before + 3
    for mine, other in zip(ahead, plain, strict=True):
        assert all(torch.equal(first, second) for first, second in zip(mine, other, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_a_steps_batches_are_one_fetch_and_each_trains_as_it_would(memory: NgramMemory, packed: bool) -> None:
    batches = [batch(seed) for seed in range(3)]
    masks = [torch.arange(tokens.shape[1]) < 5 + number for number, (_, tokens) in enumerate(batches)]
    packing = [
        {"mask": mask.expand_as(tokens)} if packed else {} for mask, (_, tokens) in zip(masks, batches, strict=True)
    ]

    def trained(ahead: bool) -> list[Tensor]:
        memory.zero_grad()
        values = []
        if ahead:
            given = [{"tokens": tokens, **more} for (_, tokens), more in zip(batches, packing, strict=True)]
            assert memory.prefetch_all(given if packed else [tokens for _, tokens in batches])
            memory.lookup._early.started[0].asked._done.result(30.0)
        for (hidden, tokens), more in zip(batches, packing, strict=True):
            values.append(memory(hidden, tokens, **more))
            values[-1].sin().sum().backward()
        prepared = memory.lookup.table.prepare()
        assert prepared is not None
        assert memory.key.weight.grad is not None
        return [*(each.detach() for each in values), memory.key.weight.grad, torch.tensor(prepared.squared_norm)]

    plain = trained(False)
    memory.lookup.table.discard()
    before = lookups(memory)
    ahead = trained(True)
    assert lookups(memory) == before + 1
    assert all(torch.equal(mine, other) for mine, other in zip(ahead, plain, strict=True))
    assert memory.lookup.table.link.prefetched.num_bytes == 0


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([{"mask": torch.ones(1, 3)}], 'batches[0] has no "tokens"'),
        (
            [torch.zeros(1, 3, dtype=torch.int64), {"tokens": torch.zeros(1, 3, dtype=torch.int64), "input_ids": None}],
            "batches[1] has unknown input_ids",
        ),
        ([torch.zeros(1, 3, dtype=torch.int64), torch.full((1, 3), 11)], "batches[1]: tokens[0, 0] = 11 is outside"),
        (torch.zeros(2, 1, 3, dtype=torch.int64), "prefetch(tokens) is of one"),  # not each row a batch
        ({"tokens": torch.zeros(1, 3, dtype=torch.int64)}, "prefetch(tokens) is of one"),
    ],
)
def test_batches_that_make_no_sense_start_nothing(memory: NgramMemory, batches: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(said)):
        memory.prefetch_all(batches)
    assert memory.lookup._early.started == []
    assert memory.lookup.table.link.prefetched.num_bytes == 0


def test_what_a_step_made_old_is_asked_for_again_and_told_once(memory: NgramMemory) -> None:
    hidden, tokens = batch()
    table = memory.lookup.table
    for told in (True, False):
        result_of(memory, tokens, hidden)
        memory.prefetch(tokens)
        table.commit()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows = memory.lookup(tokens).values
        assert [str(each.message)[-21:] for each in caught] == (["Prefetch after step()"] if told else [])
        slots = memory.lookup.slots(tokens)
        assert torch.equal(rows.detach(), table.rows(slots.flatten()).view(*tokens.shape, -1))


def test_tokens_may_lie_in_any_order(memory: NgramMemory) -> None:
    tokens = (torch.arange(24) % 10).view(4, 2, 3).transpose(0, 2)
    expected = memory.lookup(tokens.contiguous()).values
    assert torch.equal(memory.lookup(tokens).values, expected)
    assert memory.prefetch(tokens)
    assert torch.equal(memory.lookup(tokens).values, expected)
    with pytest.raises(InvalidRequest, match=re.escape("tokens[0, 0, 1] = 12 is outside")):
        memory.lookup(torch.where(tokens == 6, 12, tokens))


def test_layers_share_one_fetch(memory: NgramMemory) -> None:
    hidden, tokens = batch()
    second = NgramMemory(DIM, memory.lookup)
    before = lookups(memory)
    rows = memory.lookup(tokens)
    y = memory(hidden, rows) + second(hidden, rows)
    assert lookups(memory) == before + 1
    y.sum().backward()
    assert memory.lookup.table.pending == 1
    apart = memory(hidden, tokens) + second(hidden, tokens)
    assert torch.equal(y, apart)
    memory.lookup.table.discard()


def test_each_slot_travels_once_where_many_repeat(memory: NgramMemory) -> None:
    for tokens, repeat in ((torch.tensor([[1, 2, 1, 2, 1, 2, 1, 2]]), True), (torch.tensor([[1, 2]]), False)):
        asked = memory.lookup._asked(memory.lookup._batch(tokens, {})).bags.ids.tolist()
        slots = memory.lookup.slots(tokens).flatten().tolist()
        assert asked == (sorted(set(slots)) if repeat else slots)


def test_it_begins_with_what_the_rows_say_or_with_nothing(memory: NgramMemory) -> None:
    hidden, tokens = batch()
    begun = NgramMemory(DIM, memory.lookup, zero_init=True)
    assert torch.equal(begun(hidden, tokens), torch.zeros_like(hidden))
    plain = NgramMemory(DIM, memory.lookup)
    without = NgramMemory(DIM, memory.lookup, kernel_size=0)
    without.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(plain(hidden, tokens), without(hidden, tokens))


def test_a_state_makes_the_same_hashes(memory: NgramMemory) -> None:
    _, tokens = batch()
    for multipliers in ("shared", "per_head"):
        options: dict[str, Any] = {"canonical": torch.arange(VOCAB) // 3, "multipliers": multipliers}
        first = NgramLookup(memory.lookup.table, NGRAMS, seed=1, pad_id=2, **options)
        options["canonical"] = torch.arange(VOCAB)
        second = NgramLookup(memory.lookup.table, NGRAMS, seed=2, **options)
        assert not torch.equal(first.slots(tokens), second.slots(tokens))
        second.load_state_dict(first.state_dict())
        assert torch.equal(first.slots(tokens), second.slots(tokens))
    assert not any("values" in name for name in memory.state_dict())
    moved = copy.deepcopy(memory).to(torch.bfloat16)
    assert torch.equal(moved.lookup.slots(tokens), memory.lookup.slots(tokens))
    assert moved(torch.zeros(*tokens.shape, DIM, dtype=torch.bfloat16), tokens).dtype == torch.bfloat16


def test_seeds_of_a_table_are_those_of_all_who_read_it(pool: Pool, memory: NgramMemory) -> None:
    _, tokens = batch()
    again = NgramLookup(pool.table("ngrams"), NGRAMS, vocab_size=VOCAB)
    assert torch.equal(again.slots(tokens), memory.lookup.slots(tokens))
    pinned = NgramLookup(pool.table("ngrams"), NGRAMS, vocab_size=50_257, seed=0)
    assert pinned.multipliers.flatten().tolist() == [162660167680289, 144527114535037, 152373775634991]


def test_a_state_of_other_ngrams_is_refused(pool: Pool, memory: NgramMemory) -> None:
    other = Ngrams(orders=(2, 3), heads=2, slots=(17, 30))
    table = pool.create_table(other.table_config("other", head_dim=HEAD_DIM, lr=1.0))
    state = NgramLookup(table, other, vocab_size=VOCAB).state_dict()
    pool.drop_table("other")
    before = memory.lookup.state_dict()["multipliers"].clone()
    with pytest.raises(RuntimeError, match="is of other n-grams"):
        memory.lookup.load_state_dict(state)
    del state["primes"]
    with pytest.raises(RuntimeError, match="primes"):
        memory.lookup.load_state_dict(state)
    state = memory.lookup.state_dict()
    with pytest.raises(RuntimeError, match="canonical"):
        memory.lookup.load_state_dict({**state, "canonical": torch.arange(VOCAB)})
    assert torch.equal(memory.lookup.state_dict()["multipliers"], before)


def test_it_is_frozen_zeroed_and_copied_as_a_table_is(memory: NgramMemory) -> None:
    hidden, tokens = batch()
    table = memory.lookup.table
    memory(hidden, tokens).sum().backward()
    assert table.pending == 1
    memory.zero_grad()
    assert table.link.drop_zeroed() == 1
    assert table.pending == 0
    memory.requires_grad_(False)
    frozen = memory(hidden.requires_grad_(), tokens)
    frozen.sum().backward()
    assert table.pending == 0
    clone = copy.deepcopy(memory)
    clone.requires_grad_(True)
    assert clone.lookup.table is table
    clone(hidden, tokens).sum().backward()
    assert table.pending == 1
    table.discard()
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(memory)


def test_it_is_read_at_a_version(memory: NgramMemory) -> None:
    hidden, tokens = batch()
    table = memory.lookup.table
    with table.at() as version, torch.no_grad():
        before = memory(hidden, tokens)
        with torch.enable_grad():
            memory(hidden, tokens).sum().backward()
        table.commit()
        assert not torch.equal(memory(hidden, tokens), before)
        with mempool.nn.reading(memory, version):
            assert torch.equal(memory(hidden, tokens), before)
        assert memory.lookup.table is table


def test_rows_learn_five_times_as_fast_by_default(pool: Pool, memory: NgramMemory) -> None:
    table = memory.lookup.table
    assert table.schema.optimizer.lr == pytest.approx(5 * 0.002)
    assert table.schema.optimizer.weight_decay == 0.0
    assert PoolOptimizer(memory).param_groups[0]["lr"] == pytest.approx(5 * 0.002)
    assert PoolOptimizer(memory, lr=0.1).param_groups[0]["lr"] == pytest.approx(0.5)
    assert PoolOptimizer([table], lr=0.1).param_groups[0]["lr"] == 0.1
    plain = pool.create_table(mempool.TableConfig(name="plain", num_slots=9, value_dim=4))
    both = nn.ModuleList([memory, mempool.nn.MemoryLayer(4, table=plain, topk=2)])
    assert {group["table"]: group["lr"] for group in PoolOptimizer(both, lr=0.1).param_groups} == {
        "ngrams": pytest.approx(0.5),
        "plain": 0.1,
    }
    pool.drop_table("plain")
    assert values_of(memory, table) == [memory.lookup.values]
    slower = NgramLookup(table, NGRAMS, vocab_size=VOCAB, lr_factor=1.0)
    with pytest.raises(InvalidRequest, match=r"lr_factor \[1.0, 5.0\]"):
        PoolOptimizer(nn.ModuleList([memory, slower]), lr=0.1)


def test_bad_tokens_are_told_and_nothing_is_sent(memory: NgramMemory) -> None:
    hidden, tokens = batch()
    before = lookups(memory)
    wrong = tokens.clone()
    wrong[1, 2] = VOCAB
    with pytest.raises(InvalidRequest, match=r"tokens\[1, 2\] = 11 is outside the vocabulary of 11 \(0 to 10\)"):
        memory(hidden, wrong)
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        memory.prefetch(wrong)
    with pytest.raises(InvalidRequest, match=r"tokens \[..., T\], got \[2, 8, 6\] and \[2, 9\]"):
        memory(hidden[:, 1:], tokens)
    with pytest.raises(InvalidRequest, match="and list"):
        memory(hidden, [1])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"tensor of integers, got torch\.float32"):
        memory(hidden, tokens.float())
    with pytest.raises(InvalidRequest, match="on meta"):
        memory(hidden, tokens.to("meta"))
    assert lookups(memory) == before
    rows = memory.lookup(tokens)
    with pytest.raises(InvalidRequest, match="mask was given with rows"):
        memory(hidden, rows, mask=torch.ones_like(tokens))


def test_a_table_of_other_slots_and_wrong_options_are_refused(memory: NgramMemory) -> None:
    table = memory.lookup.table
    told: list[tuple[Any, str]] = [
        (lambda: NgramLookup(table, Ngrams(), vocab_size=5), "has 82 slots, and these n-grams need exactly 1_601_826"),
        (lambda: NgramLookup(table, (2, 3), vocab_size=5), "give mempool.nn.Ngrams"),  # type: ignore[arg-type]
        (lambda: NgramLookup("ngrams", NGRAMS, vocab_size=5), "is no table"),  # type: ignore[arg-type]
        (lambda: NgramLookup(table, NGRAMS), "vocab_size is needed"),
        (
            lambda: NgramLookup(table, NGRAMS, vocab_size=5, canonical=torch.arange(4)),
            "has 4 ids for a vocabulary of 5",
        ),
        (lambda: NgramLookup(table, NGRAMS, canonical=torch.tensor([0, -1])), "has a negative id"),
        (lambda: NgramLookup(table, NGRAMS, canonical=torch.tensor([0.5])), "of integers"),
        (lambda: NgramLookup(table, NGRAMS, vocab_size=5, pad_id=5), "pad_id = 5 is outside"),
        (lambda: NgramLookup(table, NGRAMS, vocab_size=5, seed=-1), "seed must be at least 0"),
        (lambda: NgramLookup(table, NGRAMS, vocab_size=5, multipliers="own"), "shared"),  # type: ignore[arg-type]
        (lambda: NgramLookup(table, NGRAMS, vocab_size=5, lr_factor=0.0), "lr_factor = 0.0"),
        (lambda: NgramMemory(DIM, table), "lookup is of type Table"),  # type: ignore[arg-type]
        (lambda: NgramMemory(DIM, memory.lookup, gate="none"), "signed_sqrt"),  # type: ignore[arg-type]
        (lambda: NgramMemory(DIM, memory.lookup, kernel_size=-1), "kernel_size must be at least 0"),
        (lambda: NgramMemory(DIM, memory.lookup, dilation=0), "dilation must be at least 1"),
        (lambda: Ngrams(orders=(3, 2)), "ascending"),
        (lambda: Ngrams(orders=()), "ascending"),
        (lambda: Ngrams(heads=0), "heads must be at least 1"),
        (lambda: Ngrams(slots=(5, 5, 5)), "one for each of the 2 orders"),
        (lambda: Ngrams(slots=2**60), "at most"),
        (lambda: canonical_ids([]), "no tokens"),
        (lambda: canonical_ids(["a", 5]), r"tokens\[1\] = 5 is no text"),  # type: ignore[list-item]
    ]
    for act, text in told:
        with pytest.raises(InvalidRequest, match=text):
            act()


def test_primes_are_the_next_ones_and_no_two_alike() -> None:
    assert Ngrams(orders=(1, 2, 4), heads=3, slots=(1, 4, 90)).primes == ((2, 3, 5), (7, 11, 13), (97, 101, 103))
    sieve = torch.ones(3000, dtype=torch.bool)
    for number in range(2, 55):
        sieve[2 * number :: number] = False
    expected = [number for number in range(2, 3000) if sieve[number]]
    assert list(Ngrams(orders=(2,), heads=len(expected), slots=1).primes[0]) == expected
    assert Ngrams(orders=(2,), heads=1, slots=2**40).primes == ((2**40 + 15,),)


def test_tokens_that_read_alike_are_one() -> None:
    tokens = [
        "The",
        "the",
        "ＴＨＥ",
        " the",
        "é",
        "E\u0301",
        "e",
        "\ufffd",
        "\ufffd",
        None,
        None,
        "",
        "",
        " ",
        "  ",
        "ﬁ",
        "fi",
    ]
    assert canonical_ids(tokens).tolist() == [0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12]
    plain = canonical_ids(tokens, accents=False, spaces=False).tolist()
    assert plain == [0, 0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 9]
