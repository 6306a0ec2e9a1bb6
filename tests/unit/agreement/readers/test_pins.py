"""Pins: one version over all owners, whatever the order in which steps, readers and messages come."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.agreement.readers import pins
from mempool.agreement.readers.pins import Pins
from mempool.errors import AlreadyExists, InvalidRequest, Overloaded, VersionGone


@dataclass
class Owner:
    """A shard as far as pins go: its version, and which versions it keeps by the number of their moment."""

    pins: Pins = field(default_factory=lambda: Pins("facts", 0))
    version: int = 0
    writes: int = 0
    serials: int = 0

    def step(self) -> None:
        self.version += 1
        self.pins.stepped(self.version, (self.writes,))

    def arm(self, token: str, *, name: str = "", ends_s: float = 10.0) -> int:
        self.serials += 1
        moment = self.pins.arm(
            token, serial=self.serials, version=self.version, mark=(self.writes,), name=name, ends_s=ends_s
        )
        return moment.version

    def pin(self, token: str, *, name: str = "", ends_s: float = 10.0) -> None:
        self.arm(token, name=name, ends_s=ends_s)
        self.pins.settle(token, self.version, ends_s=ends_s)

    def attach(self, token: str, *, version: int = 0, name: str = "") -> int:
        self.serials += 1
        return self.pins.attach(token, serial=self.serials, version=version, name=name, ends_s=10.0).version

    @property
    def kept(self) -> list[int]:
        return [moment.version for moment in self.pins.moments]


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_pin_is_of_one_version_over_all_owners(data: st.DataObject) -> None:
    """Owners apply steps at their own pace; readers arm them in any order, and settle at the highest."""
    owners = [Owner() for _ in range(3)]
    decided = 0
    armed: dict[str, dict[int, int]] = {}
    settled: dict[str, dict[int, int]] = {}  # version by owner
    for number in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["step", "apply", "apply", "arm", "settle", "release"]))
        if action == "step":
            decided += 1
        elif action == "apply":
            behind = [owner for owner in owners if owner.version < decided]
            if behind:
                data.draw(st.sampled_from(behind)).step()
        elif action == "arm":
            token = data.draw(st.sampled_from([*(t for t in armed if len(armed[t]) < 3), str(number)]))
            seen = armed.setdefault(token, {})
            at = data.draw(st.sampled_from([at for at in range(3) if at not in seen]))
            seen[at] = owners[at].arm(token)
        elif action == "settle":
            whole = [token for token, seen in armed.items() if len(seen) == 3]
            for token in whole[:1]:
                version = max(armed[token].values())
                for at, owner in enumerate(owners):
                    if owner.version >= version and at not in settled.setdefault(token, {}):
                        settled[token][at] = owner.pins.settle(token, version, ends_s=10.0).version
        elif settled:
            token = data.draw(st.sampled_from(sorted(settled)))
            for owner in owners:
                owner.pins.release(token)
            del settled[token], armed[token]
    for token, seen in settled.items():
        assert set(seen.values()) == {max(armed[token].values())}
        for at in seen:
            assert owners[at].pins.moment(token).version in owners[at].kept
    for owner in owners:
        for pin in owner.pins:
            owner.pins.release(pin.token)
        assert owner.kept == []


def test_only_what_is_pinned_is_kept() -> None:
    owner = Owner(version=3)
    assert owner.arm("a") == 3
    owner.step()
    owner.step()
    assert owner.kept == [3, 4, 5], "until it is settled, any of them may be the one"
    owner.pins.settle("a", 4, ends_s=10.0)
    assert owner.kept == [4]
    owner.step()
    assert owner.kept == [4], "nobody follows the steps any more"
    owner.pin("b")
    owner.pin("c")
    assert owner.kept == [4, 6], "readers of one version share it"
    owner.pins.release("b")
    assert owner.kept == [4, 6]
    owner.pins.release("c")
    owner.pins.release("a")
    assert owner.kept == []


def test_what_is_written_between_two_pins_of_a_version_is_in_the_second() -> None:
    owner = Owner(version=3)
    owner.pin("a")
    owner.writes += 1
    owner.pin("b")
    assert owner.kept == [3, 3]
    assert owner.pins.moment("a").number < owner.pins.moment("b").number
    assert owner.attach("c", version=3) == 3
    assert owner.pins.moment("c") == owner.pins.moment("b"), "the newest of that version"


def test_messages_that_come_again_change_nothing() -> None:
    owner = Owner(version=3)
    assert owner.arm("a") == 3
    owner.step()
    assert owner.arm("a") == 3
    first = owner.pins.settle("a", 4, ends_s=10.0)
    assert owner.pins.settle("a", 4, ends_s=10.0) == first
    assert owner.arm("a") == 3
    assert owner.kept == [4]
    assert owner.pins.release("a")
    assert not owner.pins.release("a")


def test_who_settles_at_what_was_not_armed_is_refused() -> None:
    owner = Owner(version=3)
    owner.arm("a")
    with pytest.raises(InvalidRequest, match=r"version 2 .* it was taken at 3"):
        owner.pins.settle("a", 2, ends_s=10.0)
    with pytest.raises(InvalidRequest, match="not settled"):
        owner.pins.moment("a")
    owner.pins.settle("a", 3, ends_s=10.0)
    with pytest.raises(InvalidRequest, match="cannot be settled at version 4"):
        owner.pins.settle("a", 4, ends_s=10.0)
    with pytest.raises(VersionGone, match="not taken here"):
        owner.pins.settle("b", 3, ends_s=10.0)


def test_a_silent_readers_pin_ends_and_it_is_told() -> None:
    owner = Owner(version=3)
    owner.pin("a", ends_s=5.0)
    owner.pins.expire(4.0)
    owner.pins.renew("a", ends_s=9.0)
    owner.pins.expire(8.9)
    assert owner.pins.moment("a").version == 3
    owner.pins.expire(9.0)
    with pytest.raises(VersionGone, match="silent for longer than its lease"):
        owner.pins.moment("a")
    with pytest.raises(VersionGone, match="silent"):
        owner.pins.renew("a", ends_s=99.0)
    assert owner.kept == []


def test_a_snapshot_has_a_name_and_no_lease() -> None:
    owner = Owner(version=3)
    owner.arm("a", name="before", ends_s=5.0)
    with pytest.raises(VersionGone, match="snapshot 'before'"):
        owner.attach("b", name="before")  # it is not settled yet
    owner.pins.settle("a", 3, ends_s=5.0)
    owner.pins.renew("a", ends_s=5.0, keep=True)
    owner.pins.expire(1e9)
    owner.step()
    assert owner.attach("b", name="before") == 3
    with pytest.raises(AlreadyExists, match="drop it first"):
        owner.arm("c", name="before")
    assert owner.pins.release(name="before")
    assert owner.kept == [3], "who reads it reads on"
    with pytest.raises(VersionGone, match="it was released"):
        owner.attach("c", name="before")
    owner.pins.release("b")
    for token, settled in (("d", False), ("e", True)):
        owner.arm(token, name="late", ends_s=5.0)
        if settled:
            owner.pins.settle(token, owner.version, ends_s=5.0)
        owner.pins.expire(5.0)
        assert owner.kept == [], "a client that died in between leaves none behind"
        with pytest.raises(VersionGone, match="silent"):
            owner.arm(token, name="late", ends_s=99.0)  # a copy: nor does it hold the name


def test_everything_a_client_can_make_it_keep_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner()
    for number in range(pins.MAX_PINS):
        owner.pin(str(number))
    with pytest.raises(Overloaded, match="close some"):
        owner.arm("one more")
    owner.pins.end_all("the table was dropped")
    with pytest.raises(VersionGone, match="the table was dropped"):
        owner.pins.moment("0")
    monkeypatch.setattr(pins, "MAX_ARMED_MOMENTS", 5)
    owner.arm("never settled")
    for _ in range(7):
        owner.step()
    assert owner.kept == []
    with pytest.raises(VersionGone, match="not settled within 5 steps"):
        owner.pins.settle("never settled", 1, ends_s=1.0)


def test_the_oldest_pin_is_the_one_taken_first() -> None:
    owner = Owner()
    assert owner.pins.oldest is None
    owner.pin("b")
    owner.pin("a")
    assert owner.pins.oldest is not None
    assert owner.pins.oldest.token == "b"
    owner.pins.end("b", "there was no room")
    assert owner.pins.oldest.token == "a"


def test_keys_are_found_by_the_version_of_their_table_that_they_were_pinned_with() -> None:
    owner = Owner()
    for token, beside in (("first", 7), ("second", 8), ("third", 8), ("alone", None)):
        owner.step()
        owner.arm(token, name="kept" if token == "second" else "")
        owner.pins.settle(token, owner.version, ends_s=10.0, beside=beside)

    def attach(token: str, beside: int) -> int:
        return owner.pins.attach(token, serial=9, version=0, name="", ends_s=10.0, beside=beside).version

    assert attach("a", 7) == 1
    assert attach("b", 8) == 3  # the newest
    owner.pins.release("first")
    assert attach("c", 7) == 1  # by the one that was attached to it
    owner.pins.release("third")
    owner.pins.release("b")
    assert owner.attach("d", name="kept") == 2
    owner.pins.release(name="kept")
    assert attach("e", 8) == 2  # by a snapshot's reader
    with pytest.raises(VersionGone, match=r"the version that goes with version 9 of the table whose keys it has"):
        attach("f", 9)
