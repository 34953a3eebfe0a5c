"""Bytes of strangers, changed: every parser gives a typed error, or a value whose own bytes are the ones that it was given.

Signatures, seals and checksums would stop nearly every change before the parser: here they are left out, or made again.  Encrypted queries
have a test of their own (tests/protocol/test_encryption.py), and releases one through hypothesis (tests/protocol/test_release.py).
"""

import base64
import hashlib
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError

from nodes.adapter import Adapter
from nodes.endpoint import Refused, parse_question
from nodes.guard import Order
from nodes.guard_service import order_from_wire
from protocol import cohort_round, notices, sealing, transparency
from protocol.aggregation import State, aggregates_of, parse_aggregates
from protocol.catalogue import Head, Terms, card_of, parse_cards, parse_terms, split_cards
from protocol.certificates import make_request, new_tls_key, open_request, proves
from protocol.claims import parse_claims
from protocol.codec import encode, format_decimal
from protocol.cohort import CohortSeal
from protocol.cohort_round import Ask, Member, Roster, Step
from protocol.conflict import Conflict, sign_conflict
from protocol.encryption import EncryptedScores, MatchPlan
from protocol.enrolment import CHECK_BYTES, PREFIX, Invite
from protocol.errors import FormatError, VeilmartError
from protocol.evidence import pack, unpack
from protocol.features import load_map
from protocol.notices import Kind, Notice, open_notice, sign_notice
from protocol.organisations import numbered, open_organisations
from protocol.proof import AnswerProof, pack_releases, unpack_releases
from protocol.release import Card, parse_release
from protocol.sealing import Asked, OpeningKey, Question, Reply, Suite, open_introduction, open_question, sign_introduction
from protocol.transparency import Checkpoint, Receipt, open_checkpoint, origin_of, sign_checkpoint
from protocol.wire import guard_pb2 as pb
from protocol.witness import Witness, cosign, cosigned_at
from tests.nodes.test_adapter import BASE, adapter, tensors
from tests.protocol.cohorts import cohort_of, owners, public
from tests.protocol.test_sealing import introduction
from tests.protocol.worlds import ADAPTER, release_of, small_map

MAP, OWNER, MARKET = small_map(), Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
KEY, PUBLIC = OWNER.public_key().public_bytes_raw(), MARKET.public_key().public_bytes_raw()
RELEASE = release_of(MAP, OWNER, adapter=ADAPTER)
NOTE = sign_checkpoint(Checkpoint(origin_of(PUBLIC), 3, bytes(range(32)), bytes(32)), MARKET)
HASHES = tuple(bytes([n]) * 32 for n in range(3))
WITNESS = Witness("witness.example", KEY)
RECEIPT = Receipt(b"envelope" * 9, PUBLIC, 2, NOTE, HASHES)
ORGANISATIONS = numbered([("a", "clinic"), ("b", ""), ("a", "clinic"), ("c", "shop")])
PLAN = MatchPlan.build(3, MAP.dimension)
HONEST_S = 1.0  # of one input; a thousand times what any takes


@dataclass(frozen=True)
class Parser:
    """sample: bytes that it takes.  again: the bytes of what it made, None where it cannot say them.  typed: errors it may raise."""

    sample: bytes
    parse: Callable
    again: Callable | None
    typed: type[Exception] | tuple = VeilmartError


def sealed_to(content: bytes):
    """A key that opens whatever is sealed to exactly this content."""
    return SimpleNamespace(open=lambda sealed, info: content, suite=Suite.X25519)


def question_of(content: bytes) -> Question:
    shown = sign_introduction(introduction(), OWNER)
    return open_question(hashlib.sha256(shown).digest() + bytes(64), shown, sealed_to(content))


def reply_bytes(reply: Reply) -> bytes:
    metadata = {"finished": int(reply.finished), "refusal": str(reply.refusal), "text": reply.text, "tokens": reply.tokens}
    return encode(sealing.REPLY, metadata, b"")


def invite_line(data: bytes) -> str:
    return PREFIX + base64.urlsafe_b64encode(data + hashlib.sha256(data).digest()[:CHECK_BYTES]).decode().rstrip("=")


def order_bytes(order: Order) -> tuple:
    adapter_epsilon = "" if order.epsilon_adapter is None else format_decimal(order.epsilon_adapter)
    return format_decimal(order.guarantee.epsilon), format_decimal(order.guarantee.delta), order.map_id, adapter_epsilon


def parsed_order(data: bytes):
    message = pb.Order.FromString(data)
    order = order_from_wire(message)
    assert order_bytes(order) == (message.epsilon, message.delta, message.map_id, message.epsilon_adapter)
    return order


def request_of(data: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(data).replace("CERTIFICATE", "CERTIFICATE REQUEST").encode()


REQUEST = make_request(new_tls_key(), KEY, PUBLIC, 1_800_000_000, proves(OWNER)).decode().replace("CERTIFICATE REQUEST", "CERTIFICATE")
INVITATION = Invite("market.example:7443", "City Hospital", 1_900_000_000, PUBLIC, bytes(32), b"-----BEGIN CERTIFICATE-----\nMIIB\n")
INVITE_DATA = base64.urlsafe_b64decode(str(INVITATION).removeprefix(PREFIX) + "==")[:-CHECK_BYTES]
WITHDRAWAL = sign_notice(Notice(Kind.WITHDRAWAL, PUBLIC, KEY, (RELEASE.release_id,)), OWNER)
REVOCATION = sign_notice(Notice(Kind.REVOCATION, PUBLIC, KEY, tuple(sorted(HASHES))), MARKET)
HEAD = Head(3, bytes(32), 1, bytes(32), bytes(32), bytes(64))
PROOF = AnswerProof(PUBLIC, MAP.map_id, "std128", HEAD, bytes(32), b"q" * 40, b"a" * 40, bytes(64))
AGGREGATES = aggregates_of([RELEASE], set(), MAP, State(MAP.map_id, 1, bytes(32), 0, bytes(32))).body
TERMS, CARD = Terms.of(RELEASE).body, card_of(RELEASE)
ANSWER = bytes(PLAN.answer_bytes)
SMALL = adapter(tensors=tensors(layers=range(3, 4)), last_layer=3).to_bytes()
BODY = b'{"model":"notes@7c1f0a2b","messages":[{"role":"user","content":"pt c/o chest pain"}],"max_tokens":16,"stream":false}'
REPLY_KEY = OpeningKey.generate(Suite.X25519).public
CONTENT = encode(sealing.QUESTION, {"signed": 0, "text": "pt c/o chest pain", "tokens": 8}, bytes(32) + REPLY_KEY)
KEYS = owners(3)
COHORT = cohort_of(KEYS)
ADVERTS = tuple(Member(COHORT, key).advertise() for key in KEYS)
SEAL = CohortSeal(COHORT.cohort_id, COHORT.resilience, tuple(sorted(map(public, KEYS))), (bytes(64),) * 3)
TOGETHER = replace(
    RELEASE, owner=SEAL.survivors[0], adapter=None, card=Card("joint"), cohort=SEAL,
    specification=replace(RELEASE.specification, noise_variance=SEAL.noise_variance(COHORT.guarantee)),
)  # fmt: skip

PARSERS = {
    "release": Parser(RELEASE.body, parse_release, lambda release: release.body),
    "release of a cohort": Parser(TOGETHER.body, parse_release, lambda release: release.body),
    "step of a cohort": Parser(Ask(Step.SHARE, COHORT, ADVERTS).to_bytes(), Ask.from_bytes, Ask.to_bytes),
    "advertisement of a cohort's member": Parser(ADVERTS[0], lambda data: Roster.of(COHORT, [data, *ADVERTS[1:]]), None),
    "aggregates": Parser(AGGREGATES, parse_aggregates, lambda made: made.body),
    "claims": Parser(RELEASE.body, parse_claims, lambda claims: claims.body),
    "terms": Parser(TERMS, parse_terms, lambda terms: terms.body),
    "card": Parser(CARD, lambda body: parse_cards([body])[0], lambda card: card.body),
    "page of cards": Parser(CARD * 3, lambda data: split_cards(data, 3), b"".join),
    "withdrawal": Parser(WITHDRAWAL, lambda data: (open_notice(data, PUBLIC), data), lambda made: made[0].body + made[1][-64:]),
    "revocation": Parser(REVOCATION, lambda data: (open_notice(data, PUBLIC), data), lambda made: made[0].body + made[1][-64:]),
    "checkpoint": Parser(NOTE.partition(b"\n\n")[0] + b"\n", transparency._parse, lambda checkpoint: checkpoint.text),
    "signed checkpoint": Parser(NOTE, lambda data: open_checkpoint(data, PUBLIC), None),
    "cosigned checkpoint": Parser(cosign(NOTE, WITNESS.name, OWNER, 1_800_000_000), lambda data: cosigned_at(data, WITNESS), None),
    "witness": Parser(str(WITNESS).encode(), lambda data: Witness.parse(data.decode("latin-1")), lambda made: str(made).encode()),
    "receipt": Parser(RECEIPT.to_bytes(), Receipt.from_bytes, Receipt.to_bytes),
    "proof of an answer": Parser(PROOF.to_bytes(), AnswerProof.from_bytes, AnswerProof.to_bytes),
    "file of releases": Parser(pack_releases([b"one" * 5, b"two" * 9, b""]), unpack_releases, pack_releases),
    "invite": Parser(INVITE_DATA, lambda data: Invite.parse(invite_line(data)), lambda made: _data_of(str(made))),
    "line of an invite": Parser(str(INVITATION).encode(), lambda data: Invite.parse(data.decode("latin-1")), None),
    "introduction": Parser(
        sign_introduction(introduction(), OWNER), lambda data: (open_introduction(data), data), lambda made: made[0].body + made[1][-64:]
    ),
    "question": Parser(CONTENT, question_of, None),
    "reply": Parser(reply_bytes(Reply("rest", 3, True)), lambda data: Asked(b"", sealed_to(data), b"").open(b""), reply_bytes),
    "encrypted answer": Parser(ANSWER, lambda data: EncryptedScores.from_bytes(data, PLAN), EncryptedScores.to_bytes),
    "adapter": Parser(SMALL, lambda data: Adapter.from_bytes(data, base_model=BASE), Adapter.to_bytes),
    "map": Parser(MAP.manifest, load_map, lambda made: made.manifest),
    "evidence": Parser(pack({"manifest.json": b"{}", "checkpoint": NOTE}), unpack, pack),
    "conflict": Parser(sign_conflict(RECEIPT, b"envelope" * 8, MARKET).to_bytes(), Conflict.from_bytes, Conflict.to_bytes),
    "organisations": Parser(
        ORGANISATIONS.numbers.tobytes(), lambda data: open_organisations(data, ORGANISATIONS.names, 4), lambda made: made.numbers.tobytes()
    ),
    "request for a certificate": Parser(ssl.PEM_cert_to_DER_cert(REQUEST), lambda data: open_request(request_of(data), PUBLIC), None),
    "order": Parser(
        pb.Order(epsilon="0.5", delta="1e-06", map_id=bytes(32), epsilon_adapter="2.0").SerializeToString(), parsed_order, None,
        (VeilmartError, DecodeError),
    ),
    "question to the endpoint": Parser(BODY, parse_question, None, Refused),
}  # fmt: skip
EVERY = pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)


def _data_of(line: str) -> bytes:
    text = line.removeprefix(PREFIX)
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))[:-CHECK_BYTES]


PIECES = [b"0", b"-1", b"9" * 20, b"1e9", b"null", b"[", b"{}", b'"', b"\\u0000", b"\xff", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\n", b" "]


def mutated(sample: bytes, rng: random.Random) -> bytes:
    """Return the sample with one to three changes: bits, bytes, pieces that parsers stumble over, parts that are gone or there twice."""
    data = bytearray(sample)
    for _ in range(rng.randrange(1, 4)):
        at = int(len(data) * rng.random() ** 2) if rng.random() < 0.7 else rng.randrange(len(data) + 1)  # headers come first
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            piece = rng.choice(PIECES)
            data[at : at + len(piece) * rng.randrange(2)] = piece
        else:
            data[at:] = data[at:] if rng.random() < 0.7 else b""
    return bytes(data)


def test_a_request_of_another_version_or_for_a_name_of_another_kind_is_refused():
    """Both are errors of a kind of their own where certificates are parsed, and came through as such."""
    der = ssl.PEM_cert_to_DER_cert(REQUEST)
    version = der.index(b"\x02\x01\x00") + 2
    name = der.index(b"veilmart://") - 2
    for at, value in ((version, 1), (name, 0x83)):
        with pytest.raises(FormatError):
            open_request(request_of(der[:at] + bytes([value]) + der[at + 1 :]), PUBLIC)


@pytest.fixture
def unsigned(monkeypatch):
    """Whoever signed it: what comes behind the signature is looked at."""
    for module in (notices, sealing):
        monkeypatch.setattr(module, "_verify", lambda *args: None)
    monkeypatch.setattr(cohort_round, "verify_signature", lambda *args: None)


def feed(parser: Parser, count: int, seed: int) -> int:
    """Return how many of so many changed inputs were taken; raise for an error without a type, or for a value of other bytes."""
    rng, taken = random.Random(seed), 0
    for _ in range(count):
        data = mutated(parser.sample, rng)
        started = time.thread_time()
        try:
            made = parser.parse(data)
        except parser.typed:
            made = None
        else:
            taken += 1
            assert parser.again is None or parser.again(made) == data
        assert time.thread_time() - started < HONEST_S
    return taken


@EVERY
def test_the_sample_is_taken(parser, unsigned):
    made = parser.parse(parser.sample)
    assert parser.again is None or parser.again(made) == parser.sample


@EVERY
def test_a_thousand_changed_inputs(parser, unsigned):
    feed(parser, 1000, 1)


@pytest.mark.slow
@EVERY
def test_fifty_thousand_changed_inputs(parser, unsigned):
    feed(parser, 50_000, 2)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@EVERY
def test_a_million_changed_inputs(parser, unsigned):
    feed(parser, 1_000_000, 3)


def without_lengths(data: bytes) -> Receipt:
    """A receipt's parser that believes every length and compares nothing."""
    import json
    import struct

    start = data.index(b"{")
    index = json.loads(data[start : data.index(b"}") + 1])["index"]
    payload = data[data.index(b"}") + 1 :]
    (size,) = struct.unpack_from("<I", payload, 32)
    (note,) = struct.unpack_from("<I", payload, 36 + size)
    rest = payload[40 + size + note :]
    hashes = tuple(rest[at : at + 32] for at in range(0, len(rest), 32))
    return Receipt(payload[36 : 36 + size], payload[:32], index, payload[40 + size : 40 + size + note], hashes)


def test_a_parser_that_checks_no_length_is_caught_by_that_test():
    """Control."""
    import struct

    good = PARSERS["receipt"]
    assert without_lengths(good.sample) == Receipt.from_bytes(good.sample)
    with pytest.raises((AssertionError, struct.error, ValueError, KeyError, TypeError)):
        feed(Parser(good.sample, without_lengths, Receipt.to_bytes), 1000, 1)
