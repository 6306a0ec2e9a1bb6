"""The stated goals, and how a report's figures stand to them. They are said, never enforced: machines differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mempool.bench.cases import OWN
from mempool.bench.cases.bags import FBGEMM, OWN_FLOAT32, TORCH_BAG
from mempool.bench.cases.commits import TORCH_SPARSE
from mempool.bench.cases.experts import TORCH_EXPERTS, TORCH_EXPERTS_SPARSE
from mempool.bench.cases.scoring import FAISS, TORCH_TOPK
from mempool.bench.measured import Measured

Find = Callable[[Sequence[Measured]], float | None]


@dataclass(frozen=True)
class Goal:
    """A stated goal.

    Attributes:
        what: In words.
        at_least: The figure to reach; or to stay under, if ``under``.
        find: The figure of a run; None if the run has no such case, or lacks the peer.
        under: Whether smaller is better.
    """

    what: str
    at_least: float
    find: Find
    under: bool = False


@dataclass(frozen=True)
class Standing:
    """A goal and the figure of a run."""

    what: str
    goal: float
    measured: float | None
    standing: str

    def document(self) -> dict[str, Any]:
        return asdict(self)


def standings(device_type: str, measured: Sequence[Measured]) -> list[Standing]:
    """How a run stands to the goals of its device: "ok", "below", "above" (its limit), or "not measured"."""
    goals = _GPU if device_type == "cuda" else _CPU
    return [stand(goal.what, goal.at_least, goal.find(measured), under=goal.under) for goal in goals]


def stand(what: str, wanted: float, figure: float | None, *, under: bool = False) -> Standing:
    """How a figure stands to what is wanted: at least that much; or at most, if ``under``."""
    if figure is None:
        return Standing(what, wanted, None, "not measured")
    reached = figure <= wanted if under else figure >= wanted
    return Standing(what, wanted, figure, "ok" if reached else ("above" if under else "below"))


def _ratio(family: str, what: str, peer: str) -> Find:
    def find(measured: Sequence[Measured]) -> float | None:
        for one in measured:
            if one.case.headline and (one.case.family, one.case.what) == (family, what):
                return one.ratio(peer)
        return None

    return find


def _headline(family: str, peer: str) -> Find:
    def find(measured: Sequence[Measured]) -> float | None:
        for one in measured:
            if one.case.headline and one.case.family == family:
                return one.ratio(peer)
        return None

    return find


def _share(family: str, what: str) -> Find:
    def find(measured: Sequence[Measured]) -> float | None:
        for one in measured:
            if one.case.headline and (one.case.family, one.case.what) == (family, what):
                return one.share_of_copy(OWN)
        return None

    return find


def _worst_zipf(measured: Sequence[Measured]) -> float | None:
    """How much longer Zipf ids take than uniform ones, where it is worst."""
    times = {
        (one.case.family, one.case.what, one.case.num_slots, one.case.value_dim, one.case.bag_size, one.case.ids): (
            one.times[OWN].median_ms
        )
        for one in measured
    }
    ratios = [
        spent / times[(*key[:-1], "uniform")]
        for key, spent in times.items()
        if key[-1] == "zipf" and (*key[:-1], "uniform") in times
    ]
    return max(ratios, default=None)


_BLOCKS = "float32 in 4 blocks of a shard"
_CPU = (
    Goal("forward, float32, beside FBGEMM's CPU build", 1.5, _ratio("forward", "float32", FBGEMM)),
    Goal("forward, float32, beside torch embedding_bag without pages", 1.0, _ratio("forward", "float32", TORCH_BAG)),
    Goal("the same, of a shard with 4 column blocks, beside FBGEMM", 1.5, _ratio("forward", _BLOCKS, FBGEMM)),
    Goal("the same, beside torch embedding_bag", 1.0, _ratio("forward", _BLOCKS, TORCH_BAG)),
    Goal("forward, bfloat16 rows beside float32 rows", 1.6, _ratio("forward", "bfloat16", OWN_FLOAT32)),
    Goal("weight gradient + Adagrad beside FBGEMM's backward", 5.0, _ratio("update", "adagrad", FBGEMM)),
    Goal("weight gradient + Adagrad beside torch's, sparse", 6.0, _ratio("update", "adagrad", TORCH_SPARSE)),
    Goal("experts beside torch's gather and einsum", 2.0, _ratio("experts", "gelu", TORCH_EXPERTS)),
    Goal(
        "experts' gradients + Adagrad beside torch's, sparse",
        5.0,
        _ratio("experts-update", "adagrad", TORCH_EXPERTS_SPARSE),
    ),
    Goal("product-key top-32 beside torch", 2.5, _headline("product-topk", TORCH_TOPK)),
    Goal("flat top-32 beside faiss", 1.0, _headline("flat-topk", FAISS)),
    Goal("flat top-32 beside torch", 1.5, _headline("flat-topk", TORCH_TOPK)),
)
_GPU = (
    Goal("forward, bfloat16, share of copy bandwidth", 0.85, _share("forward", "bfloat16")),
    Goal("forward, bfloat16, beside torch embedding_bag", 6.0, _ratio("forward", "bfloat16", TORCH_BAG)),
    Goal("weight gradient + row-wise Adagrad, share of copy bandwidth", 0.5, _share("update", "rowwise_adagrad")),
    Goal("Zipf ids beside uniform ids, the slowest case, times", 1.3, _worst_zipf, under=True),
)
