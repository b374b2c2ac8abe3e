"""Clients, processes and a log, in every order of things: appends, lost and doubled announcements, drops, resumes,
snapshots, trims and restored databases. The rings, cursors, merging, client rule and fold are the real ones; the log
is a list, the network a pocket of batches that the machine takes from as it likes.
"""

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from parley.client.channel import ChannelState, Taken
from parley.realtime import events as events_module
from parley.realtime.channels import Snapshot
from parley.realtime.cursor import Cursor
from parley.realtime.ring import Ring
from tests.client.author import Frame, steps
from tests.faults.model import ONE_CHANNEL, PROCESSES, Reader, World, run, use_lists

READERS = 3

_delta = st.tuples(st.just("delta"), st.integers(0, 3), st.sampled_from(["a", "é", "😀 ", "four", "e\u0301 and so on"]))
_bursts = st.lists(
    st.one_of(
        _delta, _delta, _delta, st.tuples(st.just("part"), st.integers(0, 3), st.sampled_from(["text", "reasoning"]))
    ),
    min_size=1,
    max_size=3,
)


class Machine(RuleBasedStateMachine):
    """Anything may happen at any time; what a client shows is always some state that there was, and in the end the last."""

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.readers = [Reader(self.world) for _ in range(READERS)]
        self.world.write([("ask",), ("part", 0, "text"), ("delta", 0, "Once ")])
        for number, reader in enumerate(self.readers):
            reader.connect(number % PROCESSES)
            reader.catch_up()

    @rule(
        batches=st.lists(_bursts, min_size=2, max_size=4),
        order=st.permutations(range(4)),
        lost=st.sets(st.integers(0, 3), max_size=1),
        max_bytes=st.sampled_from([1, 300, 32768]),
        frames=st.integers(0, 12),
    )
    def stream(
        self, batches: list[list[tuple[Any, ...]]], order: list[int], lost: set[int], max_bytes: int, frames: int
    ) -> None:
        """A reply in full flow: several ticks, told in some order and not all of them, read by whoever is there."""
        for batch in batches:
            self.world.write(batch)
        for bus, pocket, places in zip(self.world.buses, self.world.pockets, (order, order[::-1]), strict=True):
            told = [pocket[place] for place in places if place < len(pocket) and place not in lost]
            del pocket[:4]
            for events in told:
                bus.publish(ONE_CHANNEL.address, events)
        for reader in self.readers:
            reader.serve(max_bytes)
            for _ in range(min(frames, len(reader.wire))):
                reader.read()
                reader.check()

    @rule(todo=steps)
    def write(self, todo: list[tuple[Any, ...]]) -> None:
        self.world.write(todo[:6])

    @rule(process=st.integers(0, PROCESSES - 1), place=st.integers(0, 5), copies=st.integers(0, 2))
    def announce(self, process: int, place: int, copies: int) -> None:
        """Deliver a batch, out of its turn perhaps; more than once perhaps, or never."""
        pocket = self.world.pockets[process]
        if pocket:
            batch = pocket.pop(place % len(pocket))
            for _ in range(copies):
                self.world.buses[process].publish(ONE_CHANNEL.address, batch)

    @rule(process=st.integers(0, PROCESSES - 1), todo=st.lists(steps, max_size=1))
    def heal(self, process: int, todo: list[list[tuple[Any, ...]]]) -> None:
        """The look at the heads that each process takes once a second; something may be committed meanwhile."""
        self.world.meanwhile = [few[:3] for few in todo]
        run(self.world.buses[process].heal())
        self.world.meanwhile = []

    @rule(
        reader=st.integers(0, READERS - 1),
        process=st.integers(0, PROCESSES - 1),
        todo=st.lists(steps, max_size=3),
    )
    def connect(self, reader: int, process: int, todo: list[list[tuple[Any, ...]]]) -> None:
        """Come back, to any process; the old connection's words are lost."""
        self.readers[reader].disconnect()
        self.world.meanwhile = [few[:3] for few in todo]
        self.readers[reader].connect(process)
        self.world.meanwhile = []

    @rule(reader=st.integers(0, READERS - 1))
    def disconnect(self, reader: int) -> None:
        self.readers[reader].disconnect()

    @rule(reader=st.integers(0, READERS - 1), turns=st.integers(1, 4), max_bytes=st.sampled_from([1, 300, 32768]))
    def serve(self, reader: int, turns: int, max_bytes: int) -> None:
        for _ in range(turns):
            self.readers[reader].serve(max_bytes)

    @rule(reader=st.integers(0, READERS - 1), frames=st.integers(1, 8))
    def read(self, reader: int, frames: int) -> None:
        for _ in range(frames):
            if self.readers[reader].wire:
                self.readers[reader].read()
                self.readers[reader].check()

    @rule(reader=st.integers(0, READERS - 1), place=st.integers(0, 9))
    def lose(self, reader: int, place: int) -> None:
        """One event never comes, though the connection holds: the client has to notice."""
        wire = self.readers[reader].wire
        found = [number for number, frame in enumerate(wire) if frame["t"] == "ev"]
        if found:
            del wire[found[place % len(found)]]

    @rule(share=st.floats(0, 1))
    def trim(self, share: float) -> None:
        self.world.trim(int(self.world.author.head * share))

    @rule(back=st.integers(0, 12))
    def restore(self, back: int) -> None:
        """The database comes back older than it was, with another epoch; every process sees that at its next look."""
        self.world.restore(max(0, self.world.author.head - back))
        for bus in self.world.buses:
            run(bus.heal())

    @invariant()
    def everyone_shows_what_there_was(self) -> None:
        for reader in getattr(self, "readers", []):
            reader.check()

    def teardown(self) -> None:
        """Left alone, everybody comes to the same end."""
        for process, bus in enumerate(self.world.buses):
            for batch in self.world.pockets[process]:
                bus.publish(ONE_CHANNEL.address, batch)
            run(bus.heal())
        for number, reader in enumerate(self.readers):
            if reader.cursor is None:
                reader.connect(number % PROCESSES)
            for _ in range(500):
                run(self.world.buses[reader.process].heal())
                said = reader.serve(32768)
                while reader.wire:
                    reader.read()
                    reader.check()
                if not said:
                    if reader.state.last == self.world.author.head:
                        break
                    # The third rule: the heartbeat tells of more than has come.
                    reader.subscribe(reader.state.since)
            assert (reader.state.ep, reader.state.last) == (self.world.author.ep, self.world.author.head)
            assert reader.state.state == self.world.author.state


@pytest.fixture(autouse=True)
def lists_for_a_database(monkeypatch: pytest.MonkeyPatch) -> None:
    use_lists(monkeypatch)


class TestModel(Machine.TestCase):  # type: ignore[misc, valid-type]  # made by Hypothesis
    """A failure prints how to run it again."""

    settings = settings(
        max_examples=100, stateful_step_count=40, deadline=None, print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )  # fmt: skip


def _without_order(ring: Ring) -> None:
    """Take what is there, whether or not something is missing before it."""
    for seq in sorted(seq for seq in ring._early if seq > ring.head):
        ring._early[ring.head + 1] = ring._early.pop(seq) if seq != ring.head + 1 else ring._early[seq]
        ring._events.append(ring._early.pop(ring.head + 1))
        ring.head = seq
    ring._early.clear()
    for subscriber in ring.subscribers:
        subscriber.wake()


def _one_further(cursor: Cursor, snapshot: Snapshot) -> None:
    cursor.seq = cursor.live_after = snapshot.head.seq + 1


def _always(*_: object) -> bool:
    return True


def _no_gap(state: ChannelState, frame: Frame) -> Taken:
    first: int = frame["from"] if "from" in frame else frame["seq"]
    return _ev(state, {**frame, "from": min(first, (state.last or 0) + 1)})


_ev = ChannelState.ev

WRONG: list[tuple[str, object, str, object]] = [
    ("a ring that leaves gaps out", Ring, "_drain", _without_order),
    ("a cursor that leaves out what follows a snapshot", Cursor, "_start_from", _one_further),
    ("deltas merged over other parts", events_module, "_continues", _always),
    ("a client that overlooks gaps", ChannelState, "ev", _no_gap),
]


@pytest.mark.parametrize(("where", "name", "wrong"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_the_machine_finds(where: object, name: str, wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, name, wrong)
    quick = settings(
        max_examples=4000, stateful_step_count=40, deadline=None, database=None, phases=[Phase.generate],
        print_blob=False, report_multiple_bugs=False, derandomize=False, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    # Whatever it meets first: a wrong state, or code that trips over one.
    with pytest.raises(Exception, match=r"."):
        run_state_machine_as_test(Machine, settings=quick)
