import torch

from mempool.shard.steps.contexts import Contexts, context_bytes
from mempool.types.bags import Bags


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _bags(pairs: int) -> Bags:
    return Bags(torch.zeros(pairs, dtype=torch.int64), None, torch.tensor([0, pairs]))


def _contexts(budget_bytes: int = 10**6, lease_s: float = 10.0, clock: Clock | None = None) -> Contexts:
    return Contexts(room=lambda: budget_bytes, lease_s=lease_s, clock=clock or Clock())


def _known(contexts: Contexts, *lookup_ids: int) -> list[int]:
    return [key for key in lookup_ids if contexts.recall(key, table_id=1, epoch=1) is not None]


def test_the_oldest_are_forgotten_first() -> None:
    contexts = _contexts(budget_bytes=3 * context_bytes(_bags(10)) + 79)
    for lookup_id in (5, 3, 9, 1):
        contexts.remember(lookup_id, table_id=1, epoch=1, bags=_bags(10))
    assert _known(contexts, 5, 3, 9, 1) == [3, 9, 1]
    assert contexts.num_bytes == 3 * context_bytes(_bags(10))
    contexts.remember(7, table_id=1, epoch=1, bags=_bags(20))
    assert _known(contexts, 3, 9, 1, 7) == [1, 7]


def test_one_larger_than_the_budget_pushes_nothing_out() -> None:
    contexts = _contexts(budget_bytes=context_bytes(_bags(5)))
    contexts.remember(1, table_id=1, epoch=1, bags=_bags(5))
    contexts.remember(2, table_id=1, epoch=1, bags=_bags(50))
    assert _known(contexts, 1, 2) == [1]


def test_a_lease_ends() -> None:
    clock = Clock()
    contexts = _contexts(lease_s=10.0, clock=clock)
    contexts.remember(1, table_id=1, epoch=1, bags=_bags(1))
    clock.now_s = 6.0
    contexts.remember(2, table_id=1, epoch=1, bags=_bags(1))
    clock.now_s = 9.9
    assert _known(contexts, 1, 2) == [1, 2]
    clock.now_s = 10.0
    assert _known(contexts, 1, 2) == [2]
    assert contexts.num_bytes == context_bytes(_bags(1))
    clock.now_s = 16.0
    contexts.remember(3, table_id=1, epoch=1, bags=_bags(1))
    assert len(contexts) == 1


def test_a_repeat_replaces_and_renews() -> None:
    clock = Clock()
    contexts = _contexts(clock=clock)
    contexts.remember(1, table_id=1, epoch=1, bags=_bags(1))
    contexts.remember(2, table_id=1, epoch=1, bags=_bags(1))
    clock.now_s = 9.0
    contexts.remember(1, table_id=1, epoch=1, bags=_bags(3))
    clock.now_s = 12.0
    assert _known(contexts, 1, 2) == [1]
    assert contexts.num_bytes == context_bytes(_bags(1)) + 16


def test_tables_and_epochs_are_kept_apart() -> None:
    contexts = _contexts()
    contexts.remember(1, table_id=1, epoch=1, bags=_bags(1))
    contexts.remember(2, table_id=2, epoch=1, bags=_bags(2))
    assert contexts.recall(1, table_id=2, epoch=1) is None
    assert contexts.recall(1, table_id=1, epoch=2) is None
    contexts.drop_table(2)
    assert contexts.num_bytes == context_bytes(_bags(1))
    contexts.release([1, 1, 77])
    assert (len(contexts), contexts.num_bytes) == (0, 0)


def test_lookups_one_after_the_other_are_recalled_as_one() -> None:
    contexts = _contexts()
    first = Bags(torch.tensor([4, 5, 6]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 3]))
    second = Bags(torch.tensor([7]), torch.tensor([4.0]), torch.tensor([0, 0, 1]))
    contexts.remember(10, table_id=1, epoch=1, bags=first)
    contexts.remember(11, table_id=1, epoch=1, bags=second)
    both = contexts.recall(10, 2, table_id=1, epoch=1)
    assert both is not None
    assert both.weights is not None
    assert (both.ids.tolist(), both.weights.tolist()) == ([4, 5, 6, 7], [1.0, 2.0, 3.0, 4.0])
    assert both.offsets.tolist() == [0, 1, 3, 3, 4]
    assert contexts.recall(10, 3, table_id=1, epoch=1) is None
    assert contexts.recall(10, 0, table_id=1, epoch=1) is first  # as a client says that knows of no others


def test_lookups_that_do_not_fit_together_are_asked_for_again() -> None:
    contexts = _contexts()
    contexts.remember(1, table_id=1, epoch=1, bags=_bags(2))
    contexts.remember(
        2, table_id=1, epoch=1, bags=Bags(torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.tensor([0, 1]))
    )
    assert contexts.recall(1, 2, table_id=1, epoch=1) is None
