"""T22: whoever may order tries to spend an owner's budget, with ever new numbers and whenever the data changed."""

import pytest

from nodes.base_model import BaseModel
from nodes.guard import Guard, Order
from nodes.ledger import Budget
from nodes.policy import Policy
from protocol.errors import VeilmartError
from protocol.privacy import Guarantee
from tests.nodes.owners import make_guard, write_records

ORDERS = [Order(Guarantee(epsilon, 1e-6)) for epsilon in (0.2, 0.21, 0.22, 0.3, 8.0)]
POLICY = Policy(budget=Budget(2.0, 1e-6))


def ordered(guard: Guard, data) -> int:
    """Return how many releases five orders cause, the data growing by a record before each."""
    for count, order in enumerate(ORDERS, start=41):
        write_records(data, count)
        guard.request(order)
        guard.work()
    return len(guard._ledger.entries())


class Obedient(Guard):
    """A broken guard: it does for strangers what it does for its owner."""

    def work(self) -> None:
        while self._queue:
            try:
                self.release(self._queue.popleft())
            except VeilmartError as error:
                self.failures.append(error)


@pytest.fixture
def guard(tmp_path, tiny_model_directory):
    return make_guard(tmp_path / "home", tmp_path / "notes.jsonl", BaseModel.open(tiny_model_directory), policy=POLICY)


def test_strangers_cause_one_release_and_spend_nothing_after_it(guard, tmp_path):
    assert ordered(guard, tmp_path / "notes.jsonl") == 1
    assert guard.price(ORDERS[0].guarantee).spent == pytest.approx(0.2)


def test_a_guard_that_obeys_everybody_spends_with_every_order(guard, tmp_path):
    """The control; only the budget stops it, at the last order."""
    guard.__class__ = Obedient
    assert ordered(guard, tmp_path / "notes.jsonl") == len(ORDERS) - 1
