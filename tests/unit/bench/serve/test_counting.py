"""System calls and copies of a look-up: what strace says is read rightly, and every place that copies is found."""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

import mempool.client.bags
from mempool.bench.serve.client import Spell, spend
from mempool.bench.serve.contenders import pools
from mempool.bench.serve.counting import calls, command, copies
from mempool.bench.serve.counting.calls import Calls, StraceError
from mempool.bench.serve.shapes import Shape, TableSize

_TRACE = """\
1 sendmsg(5, {msg_name=NULL, msg_iov=[{iov_base=""..., iov_len=40}], msg_iovlen=1}, MSG_NOSIGNAL) = 40
2 recvmsg(5,  <unfinished ...>
1 futex(0x1, FUTEX_WAIT_PRIVATE, 0, NULL) = -1 EAGAIN (Resource temporarily unavailable)
2 <... recvmsg resumed>{msg_name=NULL}, 0) = 41
3 restart_syscall(<... resuming interrupted read ...> <detached ...>
4 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, 3, 0) = 0x7f0000
5 --- SIGINT {si_signo=SIGINT} ---
6 +++ exited with 0 +++
6 exit_group(0) = ?
"""


def test_what_strace_writes_is_read() -> None:
    found = Calls()
    for line in _TRACE.splitlines():
        calls._count(line, found)
    assert found.counts == Counter(["sendmsg", "futex", "recvmsg", "mmap", "exit_group"])
    assert (found.given, found.taken) == (40, 41)


def test_what_fewer_look_ups_have_too_is_no_look_ups() -> None:
    few, many = Calls(Counter(read=30, mmap=5), 100, 10), Calls(Counter(read=50, mmap=4), 300, 30)
    side = command._side(Spell("x", [2, 2], 0.0, 1.0), "client", few, many, 10)
    assert (side.calls, side.by_name, side.taken_bytes, side.given_bytes) == (2.0, {"read": 2.0}, 20.0, 2.0)


def test_without_strace_only_copies_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(command, "copied_bytes", lambda _: {pools.NEAR: {"2x2": [["ids", "client", 32.0]]}})
    command.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["system_calls"] == []
    assert found["skipped"] == ["system calls: strace is not installed (apt-get install strace)"]
    (one,) = found["copies"]
    assert (one["tensor_bytes"], one["copied_bytes"]) == (2 * 2 * 8 + 2 * 1024, 32.0)
    command.main([])
    assert "not as planned: system calls: strace is not installed" in capsys.readouterr().out
    with pytest.raises(StraceError, match="not installed"), calls.traced(1):
        pass


def test_system_calls_are_counted_of_both_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, int]] = []

    class Client:
        pid = 7

        def say(self, spell: dict[str, Any]) -> None:
            self.calls = spell["calls"]

        def hear(self, _: float) -> dict[str, Any]:
            return {"latencies_ms": [1.0] * self.calls}

    client = Client()

    @contextmanager
    def traced(pid: int) -> Iterator[Calls]:
        found = Calls()
        yield found
        ran.append((pid, client.calls))
        found.counts["sendto"] = 5 + client.calls * pid

    monkeypatch.setattr(calls, "traced", traced)
    sides = command._sides(client, Spell("x", [2, 2], 0.0, 1.0), {"client": 7, "server": 8}, 4)  # type: ignore[arg-type]
    assert sorted(ran) == [(7, 10), (7, 14), (8, 10), (8, 14)]
    assert [(side.side, side.calls) for side in sides] == [("client", 7.0), ("server", 8.0)]


def test_a_spell_of_so_many_calls() -> None:
    ran: list[object] = []
    answer = spend(Spell("x", [1, 1], 0.0, 1e9, calls=3), ran.append, [object()])  # type: ignore[list-item]
    assert len(ran) == len(answer["latencies_ms"]) == 3


def test_copies_of_a_look_up_each_way() -> None:
    large, small = Shape(64, 128), Shape(2, 2)
    found = command.copied_bytes(TableSize(64, 8), (large, small))
    assert set(found) == {pools.EMBEDDED, *pools.REMOTE}
    pairs = 64 * 128

    def copied(way: str, what: str) -> float:
        return float(sum(num_bytes for site, _, num_bytes in found[way][large.name] if site == what))

    for way in found:
        assert copied(way, "ids and weights into memory of the call's own") in (pairs * 4, pairs * 8), "ids alone"
        there = pairs * 4 if way == pools.GRPC else 0  # others are read as arrays where they lie
        assert copied(way, "ids and offsets checked and narrowed") == there
    assert copied(pools.GRPC, "ids as uint32, for gRPC") == pairs * 4
    assert copied(pools.GRPC, "tensors into a frame") > pairs * 8
    assert copied(pools.NEAR, "body into shared memory") > pairs * 8
    assert not copied(pools.GRPC, "body into shared memory")
    lines = {what for what, _, _ in found[pools.TCP][large.name]}
    assert not lines & {"body into shared memory", "tensors into a frame"}
    few = {what for what, _, _ in found[pools.NEAR][small.name]}
    assert {"small body into its message", "small body out of the line's buffer"} <= few


def test_every_place_that_copies_is_wrapped_and_let_go() -> None:
    plain = mempool.client.bags.own_copy
    elsewhere = ModuleType("mempool.elsewhere")
    elsewhere.own_copy = plain  # type: ignore[attr-defined]
    sys.modules["mempool.elsewhere"] = elsewhere
    try:
        with copies.counted():
            assert mempool.client.bags.own_copy is not plain
            assert elsewhere.own_copy is mempool.client.bags.own_copy
        assert mempool.client.bags.own_copy is elsewhere.own_copy is plain
    finally:
        del sys.modules["mempool.elsewhere"]
