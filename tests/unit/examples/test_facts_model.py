import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import mempool
from facts.data import FactBook
from facts.flops import dense_flops, memory_flops, shared_flops, twin_hidden
from facts.model import DenseBlock, FactModel, ModelSize, memory_block, share_start, spelling_loss
from facts.text import AnswerSpelling, WordBook

SIZE = ModelSize(dim=32, pools=2, score_dim=8, heads=2, topk=4, key_dim=16)


def counted_flops(module: torch.nn.Module, given_tensor: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(given_tensor)
    return counter.get_total_flops()


@pytest.mark.parametrize("size", [SIZE, ModelSize()])
def test_matmul_flops_of_the_memory_layer_are_those_torch_counts(size: ModelSize, table: mempool.Table) -> None:
    layer = memory_block(table, size=size)
    formula = memory_flops(size, codebook_size=32, value_dim=64)
    scoring = 2 * size.heads * 32 * size.key_dim  # by a kernel of the pool's own, which torch does not see
    assert counted_flops(layer, torch.randn(3, size.dim)) == 3 * (formula.matmul - scoring)


@pytest.mark.parametrize("size", [SIZE, ModelSize()])
def test_matmul_flops_of_the_dense_twin_are_those_torch_counts(size: ModelSize) -> None:
    block = DenseBlock(size.dim, hidden=40)
    assert counted_flops(block, torch.randn(3, size.dim)) == 3 * dense_flops(size, hidden=40).matmul


def test_matmul_flops_of_what_both_share_are_those_torch_counts(small_book: FactBook) -> None:
    word_book = WordBook.from_facts(small_book)
    spelling = AnswerSpelling(fact.answer for fact in small_book.facts)
    model = FactModel(word_book, spelling, block=torch.nn.Identity(), size=SIZE)
    words_BW = word_book.encode(["what shade is alraton", "which size has bemiton"])
    num_outputs = spelling.num_positions * spelling.num_codes
    formula = shared_flops(SIZE, num_words=words_BW.shape[1], num_outputs=num_outputs)
    assert counted_flops(model, words_BW) == 2 * formula.matmul


@given(
    dim=st.integers(1, 300),
    heads=st.integers(1, 8),
    topk=st.integers(1, 32),
    codebook_size=st.integers(32, 600),
    value_dim=st.integers(1, 300),
)
def test_the_twin_costs_at_least_the_memory_layer_and_hardly_more(
    dim: int, heads: int, topk: int, codebook_size: int, value_dim: int
) -> None:
    size = ModelSize(dim=dim, heads=heads, topk=topk, key_dim=16)
    memory = memory_flops(size, codebook_size=codebook_size, value_dim=value_dim)
    target, hidden = memory.total, twin_hidden(size, memory)
    assert dense_flops(size, hidden=hidden - 8).total < target <= dense_flops(size, hidden=hidden).total


def test_padding_changes_no_answer(small_book: FactBook) -> None:
    word_book = WordBook.from_facts(small_book)
    spelling = AnswerSpelling(fact.answer for fact in small_book.facts)
    model = FactModel(word_book, spelling, block=DenseBlock(SIZE.dim, hidden=8), size=SIZE).eval()
    words_BW = word_book.encode(["what shade is alraton"])
    padded_BW = torch.nn.functional.pad(words_BW, (0, 5))
    torch.testing.assert_close(model(padded_BW), model(words_BW))


def test_twins_start_alike_outside_their_blocks(small_book: FactBook, table: mempool.Table) -> None:
    word_book = WordBook.from_facts(small_book)
    spelling = AnswerSpelling(fact.answer for fact in small_book.facts)
    memory = FactModel(word_book, spelling, block=memory_block(table, size=SIZE), size=SIZE)
    dense = FactModel(word_book, spelling, block=DenseBlock(SIZE.dim, hidden=8), size=SIZE)
    share_start(memory, dense)
    shared = [name for name in dense.state_dict() if not name.startswith("block.")]
    assert len(shared) == 13
    assert all(torch.equal(memory.state_dict()[name], dense.state_dict()[name]) for name in shared)


def test_loss_is_the_summed_cross_entropy_up_to_the_first_end() -> None:
    logits = torch.randn(3, 4, 5)
    codes = torch.tensor([[1, 2, 0, 0], [3, 4, 1, 0], [2, 0, 0, 0]])
    log_probabilities = logits.double().log_softmax(dim=-1)
    expected = 0.0
    for row, length in enumerate((3, 4, 2)):
        for position in range(length):
            expected -= float(log_probabilities[row, position, codes[row, position]]) / 3
    assert float(spelling_loss(logits, codes)) == pytest.approx(expected, rel=1e-5)
