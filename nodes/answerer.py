"""What answers relayed questions inside the guard's worker: opens a question, lets the adapter answer, seals the answer.

It reads the adapter and the base model, and neither records nor ledger.  Its keys are made for one introduction each, lie in memory alone
and are dropped when that is over: whoever takes the machine afterwards cannot open what was recorded on the way.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nodes.learnwares import StoredLearnware
from nodes.policy import RelayRules
from protocol.certificates import proves
from protocol.errors import NotFound, UsageError, VeilmartError
from protocol.release import Release, open_envelope
from protocol.sealing import (
    MAX_REPLY_BYTES,
    Introduction,
    OpeningKey,
    Question,
    Refusal,
    Reply,
    announcement_bytes,
    introduction_of,
    open_question,
    sign_introduction,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from nodes.base_model import BaseModel
    from nodes.reuse.strategies import Assistant

log = logging.getLogger("veilmart.guard")

LIFE_S = 7200  # of an introduction; a line is renewed sooner
KEYS_KEPT = 3
SEEN_KEPT = 4096  # questions of one key, by digest; more are not answered under it


@dataclass(slots=True)
class _Opening:
    """One introduction with its key, and which questions came under it."""

    introduction: bytes
    key: OpeningKey
    release: Release
    expires: int
    seen: set[bytes] = field(default_factory=set)


class Rate:
    """So many an hour, all at once if need be."""

    def __init__(self, an_hour: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = float(an_hour), clock
        self._left, self._filled = self._most, clock()
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Return whether one more is within the rate, and count it if so."""
        with self._lock:
            now = self._clock()
            self._left = min(self._most, self._left + (now - self._filled) * self._most / 3600)
            self._filled = now
            if self._left < 1:
                return False
            self._left -= 1
            return True


class Answerer:
    """Answers for one owner.  adapter_of: where the adapter of a release lies."""

    def __init__(
        self,
        owner_key: Ed25519PrivateKey,
        model: BaseModel,
        rules: RelayRules,
        adapter_of: Callable[[Release], Path | None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._owner_key, self._model, self._rules, self._adapter_of, self._now = owner_key, model, rules, adapter_of, now
        self._openings: OrderedDict[bytes, _Opening] = OrderedDict()
        self._lock = threading.Lock()  # introductions are made while a question is answered
        self._rate = Rate(rules.questions_per_hour)
        self._assistants: dict[bytes, Assistant] = {}  # of the newest release that was asked

    def prove(self, market_key: bytes, public_key: bytes, asked: int) -> bytes:
        """Return the owner's proof that a TLS key, which the desk holds, speaks for it at a market."""
        return proves(self._owner_key)(market_key, public_key, asked)

    def introduce(self, envelope: bytes, market_key: bytes, challenge: bytes) -> tuple[bytes, bytes]:
        """Return a fresh introduction for a release of this owner, and the answer to a market's challenge."""
        release, owner = open_envelope(envelope), self._owner_key.public_key().public_bytes_raw()
        file = self._adapter_of(release)
        if release.owner != owner or file is None or not file.is_file():
            raise NotFound("relay: there is no adapter here for that release")
        key, rules, expires = OpeningKey.generate(), self._rules, int(self._now()) + LIFE_S
        introduction = sign_introduction(
            Introduction(
                owner, release.release_id, key.suite, key.public, expires, bool(rules.askers), rules.longest_question, rules.most_tokens
            ),
            self._owner_key,
        )
        with self._lock:
            self._openings[hashlib.sha256(introduction).digest()] = _Opening(introduction, key, release, expires)
            while len(self._openings) > KEYS_KEPT:
                self._openings.popitem(last=False)
        return introduction, self._owner_key.sign(announcement_bytes(market_key, challenge, introduction))

    def answer(self, sealed: bytes, patience_s: float) -> bytes:
        """Return the sealed answer, or nothing: for what does not open, came before, or took longer than its asker waits."""
        ends = time.monotonic() + patience_s
        try:
            opening = self._opening(introduction_of(sealed))
            if opening is None:
                return b""
            question = open_question(sealed, opening.introduction, opening.key)
            # A question that comes again would cost its answer again, and who forwards could make it come as often as it likes.
            if question.sealed_digest in opening.seen or len(opening.seen) >= SEEN_KEPT:
                return b""
            opening.seen.add(question.sealed_digest)
            reply = self._reply(question, opening.release, ends)
            return b"" if reply is None else question.seal(reply)
        except VeilmartError as error:
            log.warning("question not answered code=%s", error.code)
        except Exception as error:  # noqa: BLE001 - its text may hold the question; and the next one is to be answered
            log.error("question not answered error=%s", type(error).__name__)
        return b""

    def _opening(self, digest: bytes) -> _Opening | None:
        with self._lock:
            for known, opening in list(self._openings.items()):
                if opening.expires <= self._now():
                    del self._openings[known]
            return self._openings.get(digest)

    def _reply(self, question: Question, release: Release, ends: float) -> Reply | None:
        rules = self._rules
        if rules.askers and question.asker not in rules.askers:
            return Reply("", 0, False, Refusal.UNKNOWN_ASKER)
        if len(question.text.encode()) > rules.longest_question or question.tokens > rules.most_tokens:
            return Reply("", 0, False, Refusal.TOO_LONG)
        if not self._rate.take():  # last: what is refused for another reason uses nothing up, or strangers could silence the owner
            return Reply("", 0, False, Refusal.TOO_MANY)
        steps = self._assistant(release).stream([("user", question.text)], question.tokens)
        try:
            while time.monotonic() < ends:
                next(steps)
        except UsageError:  # question and answer do not fit the model's context
            return Reply("", 0, False, Refusal.TOO_LONG)
        except StopIteration as stop:
            whole = stop.value
            text = whole.text.encode()[:MAX_REPLY_BYTES].decode(errors="ignore")
            return Reply(text, whole.tokens, whole.finished and text == whole.text)
        return None

    def _assistant(self, release: Release) -> Assistant:
        from nodes.reuse.choice import specialist_of
        from nodes.reuse.strategies import Strategy, Wish, assemble

        if release.release_id not in self._assistants:
            stored = StoredLearnware(release, self._adapter_of(release), 0)
            self._assistants = {release.release_id: assemble(Wish(Strategy.SINGLE), self._model, [specialist_of(stored, self._model)])}
        return self._assistants[release.release_id]
