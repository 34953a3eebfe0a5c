"""Sealed questions and answers: only the owner's guard reads a question, only its asker the answer, and whoever is between sees sizes."""

import hashlib
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.errors import FormatError, InvalidSignature, UsageError, VeilmartError
from protocol.sealing import (
    MAX_SEALED_BYTES,
    SEALED_QUESTION,
    SIZES,
    Introduction,
    OpeningKey,
    Refusal,
    Reply,
    Suite,
    announcement_bytes,
    ask,
    open_introduction,
    open_question,
    require_introduction,
    seal,
    sign_introduction,
    verify_announcement,
)

OWNER, ASKER, RELEASE = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate(), bytes(range(32))
PUBLIC, NOW = OWNER.public_key().public_bytes_raw(), 1_800_000_000
KEYS = {suite: OpeningKey.generate(suite) for suite in Suite}


def introduction(suite: Suite = Suite.HYBRID, **how) -> Introduction:
    usual = {"expires": NOW + 3600, "known_askers": False, "longest_question": 4000, "most_tokens": 256}
    return Introduction(PUBLIC, RELEASE, suite, KEYS[suite].public, **(usual | how))


SIGNED = sign_introduction(introduction(), OWNER)


@pytest.mark.parametrize("suite", Suite)
def test_a_question_and_its_answer_arrive(suite):
    signed = sign_introduction(introduction(suite), OWNER)
    asked = ask(signed, "pt c/o chest pain", 32)
    assert len(asked.sealed) == 32 + SIZES[0] + suite.overhead_bytes
    question = open_question(asked.sealed, signed, KEYS[suite])
    assert (question.text, question.tokens, question.asker) == ("pt c/o chest pain", 32, b"")
    reply = Reply("rest", 3, True)
    assert asked.open(question.seal(reply)) == reply


def test_an_asker_who_signs_is_known_to_the_guard_and_to_nobody_else():
    asked = ask(SIGNED, "who am I", 8, ASKER)
    public = ASKER.public_key().public_bytes_raw()
    assert open_question(asked.sealed, SIGNED, KEYS[Suite.HYBRID]).asker == public
    assert public not in asked.sealed


def test_a_signature_does_not_move_to_another_introduction():
    other = sign_introduction(introduction(expires=NOW + 7200), OWNER)
    asked = ask(SIGNED, "once", 8, ASKER)
    digest = hashlib.sha256(other).digest()
    content = KEYS[Suite.HYBRID].open(asked.sealed[32:], SEALED_QUESTION + asked.sealed[:32])
    moved = digest + seal(Suite.HYBRID, KEYS[Suite.HYBRID].public, content, SEALED_QUESTION + digest)
    with pytest.raises(InvalidSignature, match="asker"):
        open_question(moved, other, KEYS[Suite.HYBRID])


def test_every_bit_of_a_sealed_question_and_of_a_sealed_answer_counts():
    asked = ask(SIGNED, "short", 8)
    answer = open_question(asked.sealed, SIGNED, KEYS[Suite.HYBRID]).seal(Reply("yes", 1, True))
    for position in range(0, len(asked.sealed), 61):
        with pytest.raises(VeilmartError):
            open_question(flipped(asked.sealed, position), SIGNED, KEYS[Suite.HYBRID])
    for position in range(0, len(answer), 61):
        with pytest.raises(VeilmartError):
            asked.open(flipped(answer, position))


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def test_an_answer_to_another_question_is_refused():
    first, second = ask(SIGNED, "first", 8), ask(SIGNED, "second", 8)
    answer = open_question(second.sealed, SIGNED, KEYS[Suite.HYBRID]).seal(Reply("to the second", 3, True))
    with pytest.raises(InvalidSignature):
        first.open(answer)


def test_whoever_knows_the_key_of_the_answer_but_not_the_question_cannot_answer():
    asked = ask(SIGNED, "first", 8)
    question = open_question(asked.sealed, SIGNED, KEYS[Suite.HYBRID])
    with pytest.raises(InvalidSignature):
        asked.open(replace(question, _secret=bytes(32)).seal(Reply("forged", 1, True)))


WAYS_TO_CHEAT = {
    "another owner's signature": lambda: sign_introduction(introduction(), ASKER),
    "another owner's introduction": lambda: sign_introduction(replace(introduction(), owner=ASKER.public_key().public_bytes_raw()), ASKER),
    "another key under the signature": lambda: SIGNED.replace(KEYS[Suite.HYBRID].public, OpeningKey.generate().public),
    "another release": lambda: sign_introduction(replace(introduction(), release_id=bytes(32)), OWNER),
    "one that is over": lambda: sign_introduction(introduction(expires=NOW), OWNER),
    "one that is cut off": lambda: SIGNED[:-1],
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("forge", WAYS_TO_CHEAT.values(), ids=WAYS_TO_CHEAT)
def test_a_market_that_exchanges_the_key_is_caught(forge):
    require_introduction(SIGNED, PUBLIC, RELEASE, NOW)
    with pytest.raises((InvalidSignature, FormatError)):
        require_introduction(forge(), PUBLIC, RELEASE, NOW)


@pytest.mark.parametrize(("least", "longest_question"), [(1, 4000), (0, 20_000)])
def test_the_market_sees_a_size_of_three_and_no_length(least, longest_question):
    signed = sign_introduction(introduction(longest_question=longest_question), OWNER)
    sizes = {len(ask(signed, "x" * length, 8).sealed) for length in range(1, longest_question, 97)}
    assert len(sizes) <= len(SIZES) - least
    question = open_question(ask(signed, "x", 64).sealed, signed, KEYS[Suite.HYBRID])
    assert len({len(question.seal(Reply("y" * length, 64, True))) for length in (0, 1, 100, 1000, 3000)}) == 1


def test_the_size_of_an_answer_follows_from_the_tokens_that_were_asked_for():
    question = open_question(ask(SIGNED, "x", 256).sealed, SIGNED, KEYS[Suite.HYBRID])
    few, many = replace(question, tokens=64), replace(question, tokens=2000)
    assert len(few.seal(Reply("", 0, True))) < len(many.seal(Reply("", 0, True))) <= MAX_SEALED_BYTES
    assert len(question.seal(Reply("", 0, False, Refusal.TOO_LONG))) == len(question.seal(Reply("an answer", 3, True)))


def test_padding_that_is_not_zeros_is_refused():
    key = KEYS[Suite.X25519]
    sealed = seal(Suite.X25519, key.public, b"content", b"info")
    assert key.open(sealed, b"info") == b"content"
    from protocol.sealing import _hpke, _public_key

    hidden = (7).to_bytes(4, "little") + b"content" + b"hidden".ljust(SIZES[0] - 11, b"\0")
    forged = _hpke(Suite.X25519).encrypt(hidden, _public_key(Suite.X25519, key.public), b"info")
    with pytest.raises(FormatError):
        key.open(forged, b"info")


@pytest.mark.parametrize(("text", "tokens"), [("", 8), ("x" * 4001, 8), ("\u20ac" * 1334, 8), ("x", 0), ("x", 257)])
def test_what_the_owner_does_not_take_is_refused_before_it_is_sealed(text, tokens):
    with pytest.raises(UsageError):
        ask(SIGNED, text, tokens)


def test_an_introduction_has_one_encoding():
    assert sign_introduction(open_introduction(SIGNED), OWNER) == SIGNED
    for how in ({"longest_question": 0}, {"most_tokens": 4096}, {"expires": 0}):
        with pytest.raises(FormatError):
            introduction(**how)


def test_an_announcement_is_for_one_market_and_one_challenge():
    market, challenge = bytes(32), bytes([1]) * 32
    signature = OWNER.sign(announcement_bytes(market, challenge, SIGNED))
    verify_announcement(market, challenge, SIGNED, PUBLIC, signature)
    for other in ((bytes([2]) * 32, challenge), (market, bytes([2]) * 32)):
        with pytest.raises(InvalidSignature):
            verify_announcement(*other, SIGNED, PUBLIC, signature)


def test_keys_do_not_show_in_what_is_printed():
    asked = ask(SIGNED, "secret text", 8)
    assert asked._secret.hex() not in repr(asked)
    assert repr(asked._secret) not in repr(asked)
    assert "_private" not in repr(KEYS[Suite.HYBRID])
