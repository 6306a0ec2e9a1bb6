"""What finding slots costs, by the kind of keys: product keys of 2 and 3 ways, hierarchical keys, Tucker scores.

``python -m tests.benchmarks.keys --slots 20 24`` scores a batch of tokens against so many slots (powers of two), all
kinds by turns in one process, so that they see the same noise: forward, and with ``--backward`` also to queries and
keys. Where a search is greedy its recall against the exact top-k is printed, of keys as they are drawn (of trained ones
ask ``MemoryLayer.recall``). It ends with 1 where 3 ways take more than half the time of 2 at 2^24 slots.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mempool.nn.keys.hierarchical import HierarchicalKeys
from mempool.nn.keys.tucker import TuckerKeys
from mempool.nn.scoring import product_topk
from mempool.nn.sizes import codebook_size

HEADS, TOPK = 4, 32
SAMPLED = 16
"""Tokens whose recall is measured."""
BAR = 0.5

Find = Callable[[Tensor], tuple[Tensor, Tensor]]


class Kind:
    """One kind of keys over some slots.

    Attributes:
        find: From queries [B, HEADS, key_dim] to scores and ids.
        keys: What has a gradient.
        search: What knows its exact top-k, where the search is greedy.
        key_dim: Width of a query.
    """

    def __init__(self, name: str, slots: int, key_dim: int, probes: int | None) -> None:
        self.search: HierarchicalKeys | TuckerKeys | None = None
        self.key_dim = key_dim
        std = key_dim**-0.5
        if name in ("2 ways", "3 ways"):
            ways = int(name[0])
            self.key_dim = -(-key_dim // ways) * ways
            size = codebook_size("", slots, ways)
            keys = nn.Parameter(torch.randn(HEADS, ways, size, self.key_dim // ways) * std)
            self.keys: list[nn.Parameter] = [keys]
            self.find: Find = lambda queries: product_topk(queries, keys, topk=TOPK, stride=size, num_slots=slots)
            return
        if name == "hierarchical":
            search: HierarchicalKeys | TuckerKeys = HierarchicalKeys(
                slots, key_dim, groups=None, probes=probes, topk=TOPK, qk_norm=False, made={}
            )
        else:
            shape = (HEADS, 2, codebook_size("", slots, 2), key_dim // 2)
            search = TuckerKeys(slots, shape, rank=2, probes=None, topk=TOPK, qk_norm=False, made={})
        search.draw(std)
        if isinstance(search, TuckerKeys):
            with torch.no_grad():  # a core that is trained is of no rank 1
                search.core += 0.3 * torch.randn_like(search.core)
        self.search, self.keys = search, list(search.parameters())
        self.find = lambda queries: search(queries, TOPK)

    def recall(self, queries: Tensor) -> float:
        """Of the first tokens."""
        if self.search is None:
            return 1.0
        some = queries[:SAMPLED]
        with torch.no_grad():
            found, true = self.search(some, TOPK)[1], self.search.exact(some, TOPK)
        return float((found[..., :, None] == true[..., None, :]).any(-1).double().mean())


def timed(kind: Kind, queries: Tensor, *, backward: bool) -> float:
    """Seconds of one call."""
    leaf = queries.detach().requires_grad_(backward)
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        scores, _ = kind.find(leaf)
        if backward:
            torch.autograd.grad(scores.sum(), [leaf, *kind.keys])
    return time.perf_counter() - start


def measured(exponent: int, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a forward, by kind; prints a line each."""
    kinds, queries = {}, {}
    for name in args.kinds:
        torch.manual_seed(1)
        kinds[name] = Kind(name, 2**exponent, args.key_dim, args.probes)
        queries[name] = torch.randn(args.tokens, HEADS, kinds[name].key_dim)
    modes = (False, True) if args.backward else (False,)
    times: dict[tuple[str, bool], list[float]] = {(name, mode): [] for mode in modes for name in kinds}
    for round_ in range(args.rounds + 1):
        for name, mode in times:
            took = timed(kinds[name], queries[name], backward=mode)
            if round_:  # the first one compiles
                times[name, mode].append(took)
    for name, kind in kinds.items():
        both = ", ".join(f"{1e3 * statistics.median(times[name, mode]):9.1f} ms" for mode in modes)
        size = sum(each.numel() for each in kind.keys) / 1e6
        recall = f"recall {kind.recall(queries[name]):.3f}" if kind.search is not None else "exact"
        print(f"2^{exponent}  {name:13} {both}  {size:8.2f} M key parameters, {recall}", flush=True)
    return {name: statistics.median(times[name, False]) for name in kinds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[20], help="exponents of two")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--key-dim", type=int, default=64, help="hierarchical keys take 4 * slots * key_dim bytes")
    parser.add_argument("--probes", type=int, default=None, help="groups of a query; the layer's default if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backward", action="store_true", help="also with gradients, as large as the keys")
    parser.add_argument("--kinds", nargs="+", default=["2 ways", "3 ways", "hierarchical", "tucker"])
    args = parser.parse_args()
    print(
        f"{args.tokens} tokens x {HEADS} heads x top-{TOPK}, key_dim {args.key_dim}, {torch.get_num_threads()} threads"
    )
    print("slots, kind, median time of a forward" + (", of forward and backward" if args.backward else ""))
    missed = False
    for exponent in args.slots:
        found = measured(exponent, args)
        if {"2 ways", "3 ways"} <= found.keys():
            share = found["3 ways"] / found["2 ways"]
            print(f"2^{exponent}  3 ways take {share:.2f} of the time of 2", flush=True)
            missed |= exponent == 24 and share > BAR
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
