"""Loading ahead: order, the bound of bytes, how many decoders there are, and decoders that are lost."""

import threading

import pytest

from loomvideo.pipelines.prepare.background import working_ahead
from loomvideo.pipelines.prepare.load_ahead import LoadAhead, decoders_for
from loomvideo.pipelines.prepare.loading import DecoderLostError, PlannedSample
from loomvideo.pipelines.prepare.outcomes import Outcome
from loomvideo.pipelines.prepare.turns import Turns
from loomvideo.pipelines.sources.samples import Sample

WAIT_S = 20


def planned(*numbers):
    return [PlannedSample(n, Sample(key=f"s{n}", task="t2v", dataset="d", target="t.mp4"), {}, None) for n in numbers]


class Gate:
    """Loads a sample when it is let through; knows what was begun."""

    def __init__(self):
        self._changed, self.begun, self._open = threading.Condition(), [], set()

    def load(self, plan):
        with self._changed:
            self.begun.append(plan.slot)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: plan.slot in self._open or "all" in self._open, WAIT_S)
        return f"loaded {plan.slot}"

    def let(self, *slots):
        with self._changed:
            self._open |= set(slots)
            self._changed.notify_all()

    def wait_for(self, begun):
        with self._changed:
            assert self._changed.wait_for(lambda: sorted(self.begun) == begun, WAIT_S), self.begun


class Elsewhere:
    """A decoder elsewhere in a test."""

    def __init__(self, load, log, wait=lambda: "node"):
        self.load, self._log, self.wait = load, log, wait
        self._log.append("started")

    def close(self):
        self._log.append("closed")


@pytest.fixture
def ahead():
    made = []

    def make(load, limit=100, start=None, most=0):
        made.append(LoadAhead(load, limit, lambda plan: 1, start, most))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_samples_come_in_order_and_not_more_than_the_bound_are_held(ahead):
    gate = Gate()
    loading = ahead(gate.load, limit=2, start=lambda: Elsewhere(gate.load, []), most=3)
    batch = loading.add(planned(0, 1, 2, 3))
    gate.wait_for([0, 1])
    gate.let(1)
    taken = iter(batch)
    gate.let(0)
    assert next(taken)[1] == "loaded 0"
    gate.wait_for([0, 1, 2])
    gate.let("all")
    assert [result for _, result, _ in taken] == ["loaded 1", "loaded 2", "loaded 3"]


def test_the_next_shard_is_loaded_while_the_first_is_encoded(ahead):
    gate = Gate()
    gate.let("all")
    loading = ahead(gate.load, limit=4)
    first, second = loading.add(planned(0, 1)), loading.add(planned(2, 3))
    gate.wait_for([0, 1, 2, 3])
    assert [plan.slot for plan, _, _ in (*first, *second)] == [0, 1, 2, 3]


def test_a_sample_larger_than_the_bound_is_let_in_alone(ahead):
    gate = Gate()
    gate.let("all")
    loading = LoadAhead(gate.load, 10, lambda plan: 50)
    assert [result for _, result, _ in loading.add(planned(0, 1))] == ["loaded 0", "loaded 1"]
    loading.close()


def test_what_is_dropped_makes_room(ahead):
    gate = Gate()
    loading = ahead(gate.load, limit=1)
    first = loading.add(planned(0, 1))
    gate.wait_for([0])
    first.drop()
    second = loading.add(planned(2))
    gate.let("all")
    assert [result for _, result, _ in second] == ["loaded 2"]
    assert gate.begun == [0, 2]


def test_an_error_of_loading_is_raised_where_the_sample_is_taken(ahead):
    def load(plan):
        raise LookupError(plan.slot)

    with pytest.raises(LookupError):
        list(ahead(load).add(planned(0)))


def test_how_many_decoders_keep_an_encoder_busy():
    assert decoders_for(load_s=8.0, encode_s=2.0) == 5
    assert decoders_for(load_s=0.1, encode_s=2.0) == 1
    assert decoders_for(load_s=1.0, encode_s=0.0) > 1000


def test_decoders_grow_to_what_is_measured_and_shrink_when_most_are_idle(ahead):
    log = []
    loading = ahead(lambda plan: "own", start=lambda: Elsewhere(lambda plan: "elsewhere", log), most=6)
    list(loading.add(planned(0)))
    loading.encoded(1000.0, 1.0)
    assert loading.num_decoders == 5, "the first sample says nothing: it loads the encoders' kernels"
    loading.encoded(1000.0, 1.0)
    assert loading.num_decoders == 7
    for _ in range(200):
        loading.encoded(1.0, 1.0)
    assert loading.num_decoders == 2
    loading.close()
    assert log.count("started") == log.count("closed") == 6


def test_a_decoder_that_is_lost_costs_no_sample(ahead):
    died = threading.Event()

    def die(plan):
        died.set()
        raise DecoderLostError("its node is gone")

    gate = Gate()
    loading = ahead(gate.load, start=lambda: Elsewhere(die, []), most=1)
    batch = loading.add(planned(*range(6)))
    assert died.wait(WAIT_S)
    gate.let("all")
    assert len(list(batch)) == 6
    loading.encoded(1.0, 0.1)
    loading.encoded(1.0, 0.1)
    assert loading.num_decoders == 2, "another takes its place"


def test_a_sample_that_kills_two_decoders_is_lost_and_the_rest_is_not(ahead):
    gate = Gate()

    def load(plan):
        if plan.slot == 1:
            raise DecoderLostError("killed by signal 9")
        return "elsewhere"

    # The decoder of this process has its hands full before the others are there.
    loading = ahead(gate.load, start=lambda: Elsewhere(load, [], lambda: gate.wait_for([0])), most=4)
    batch = loading.add(planned(0))
    gate.wait_for([0])
    rest = loading.add(planned(1, 2))
    (_, outcome, _), (_, other, _) = rest
    assert isinstance(outcome, Outcome)
    assert (outcome.reason, outcome.retriable) == ("decoder_crash", True)
    assert "2 decoder processes died on it, last: killed by signal 9" in outcome.message
    assert other == "elsewhere"
    gate.let("all")
    assert len(list(batch)) == 1


def test_decoders_that_cannot_start_are_not_started_for_ever(ahead, caplog):
    def wait():
        raise DecoderLostError("no codec here")

    log = []
    loading = ahead(lambda plan: "own", start=lambda: Elsewhere(None, log, wait), most=9)
    assert len(list(loading.add(planned(*range(20))))) == 20
    for thread in loading._threads[1:]:
        thread.join()
    for _ in range(9):
        loading.encoded(10.0, 0.1)
    assert log.count("started") == log.count("closed") == 4
    assert "no more decoders are started, 3 ended in a row, the last: no codec here" in caplog.text


def test_turns_come_in_the_order_in_which_they_were_taken():
    turns, order = Turns(), []
    first, second = turns.take(), turns.take(lambda: "queued")
    assert second.queued == "queued"

    def work():
        with second:
            second.begin()
            order.append("second")

    thread = threading.Thread(target=work)
    thread.start()
    with first:
        first.begin()
        order.append("first")
        first.end()
        # The first shard is still written while the second is encoded.
        thread.join(WAIT_S)
    assert order == ["first", "second"]
    turns.wait_until_over()


def test_a_turn_that_is_never_begun_holds_nobody_up():
    turns = Turns()
    first, second, third = turns.take(), turns.take(), turns.take()
    with second:
        pass
    with first:
        first.begin()
    with third:
        third.begin()


def test_working_ahead_hands_errors_on_and_closes_what_it_reads():
    closed = []

    def items():
        try:
            yield 1
            yield 2
            raise LookupError
        finally:
            closed.append(True)

    with working_ahead(items(), 1) as read:
        assert next(read) == 1
        assert next(read) == 2
        with pytest.raises(LookupError):
            next(read)
    with working_ahead(items(), 1) as read:
        assert next(read) == 1
    assert closed == [True, True]
