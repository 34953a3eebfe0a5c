"""T17: whoever is between asker and owner guesses from sizes which of two questions was asked, and how long its answer was."""

import secrets

from protocol import sealing
from protocol.sealing import Reply, Suite, ask, open_question
from tests.protocol.test_sealing import KEYS, SIGNED

QUESTIONS = ("is it benign?", "the report says adenocarcinoma of the lung, stage three; what comes next, and how long does it take?")
ANSWERS = ("yes", "that depends on many things, of which the most important is whether it has spread")
RUNS = 200


def sizes(secret: int) -> tuple[int, int]:
    """Return the lengths that the market sees of a question and of its answer."""
    asked = ask(SIGNED, QUESTIONS[secret], 64)
    answer = open_question(asked.sealed, SIGNED, KEYS[Suite.HYBRID]).seal(Reply(ANSWERS[secret], 20, True))
    return len(asked.sealed), len(answer)


def share_guessed() -> float:
    """Return how often it is right: it knows both texts, and says the longer one where it saw more than the shorter one needs."""
    least, right = sizes(0), 0
    for _ in range(RUNS):
        secret = secrets.randbelow(2)
        right += (sizes(secret) > least) == bool(secret)
    return right / RUNS


def test_sizes_tell_nothing():
    assert {sizes(secret) for secret in (0, 1) for _ in range(20)} == {sizes(0)}
    assert share_guessed() < 0.75  # a guess; one in 10^12 times more


def test_without_padding_they_tell_every_time(monkeypatch):
    """The control."""
    monkeypatch.setattr(sealing, "_padded", lambda content, least_bytes: len(content).to_bytes(4, "little") + content)
    monkeypatch.setattr(sealing, "_unpadded", lambda padded: padded[4:])
    assert share_guessed() == 1
