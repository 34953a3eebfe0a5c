"""An owner whose guard answers through a market: the real answerer over the tiny model, with a thread where the worker process would be."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nodes.answerer import Answerer
from nodes.base_model import BaseModel
from nodes.finetune import Recipe
from nodes.guard import Guard, Order
from nodes.market_client import MarketClient
from nodes.policy import RelayRules
from nodes.relay import RelayLine
from protocol.admission import AdmissionPolicy
from protocol.privacy import Guarantee
from tests.nodes.guard_processes import wait_for
from tests.nodes.owners import make_guard, write_records

EVERYTHING = AdmissionPolicy(largest_epsilon=8.0, smallest_count=None)
RULES = RelayRules(questions_per_hour=1000, longest_question=100, most_tokens=32)


@dataclass
class ThreadWorker:
    """The worker's calls, answered in this process; remembers what was sealed."""

    answerer: Answerer
    seen: list[bytes] = field(default_factory=list)
    _answers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def introduce(self, envelope: bytes, market_key: bytes, challenge: bytes) -> Future:
        made: Future = Future()
        made.set_result([*self.answerer.introduce(envelope, market_key, challenge)])
        return made

    def prove(self, market_key: bytes, public_key: bytes, asked: int) -> bytes:
        return self.answerer.prove(market_key, public_key, asked)

    def answer(self, sealed: bytes, patience_s: float) -> Future:
        self.seen.append(sealed)
        return self._answers.submit(lambda: [self.answerer.answer(sealed, patience_s)])


def owner_with_adapter(home: Path, model: BaseModel) -> tuple[Guard, bytes]:
    """Return a guard and its release with an adapter."""
    guard = make_guard(home / "node", write_records(home / "wool.jsonl"), model, recipe=Recipe(max_steps=4))
    return guard, guard.release(Order(Guarantee(1.0, 1e-6)))


def publish(envelope: bytes, address: str, ca: Path, home: Path) -> None:
    with MarketClient(address, ca, home) as client:
        client.publish(envelope)


@contextmanager
def relayed(envelope: bytes, worker: ThreadWorker, address: str, ca: Path, home: Path, rules: RelayRules = RULES, membership=None):
    """Keep a line to the market while the block runs, and wait until it is there."""
    from protocol.errors import GuardUnreachable
    from protocol.release import open_envelope

    def connected() -> bool:
        with MarketClient(address, ca, home) as client:
            try:
                return bool(client.introduction(open_envelope(envelope).release_id))
            except GuardUnreachable:
                return False

    with RelayLine(address, ca, home, lambda: envelope, worker, rules, membership=membership) as line:
        wait_for(connected)
        yield line
