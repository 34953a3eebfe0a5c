"""RFC 9162 against its own definitions, and checkpoints that only their market can have signed."""

import hashlib
import random
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import FormatError, InvalidProof, InvalidSignature, VeilmartError
from protocol.transparency import (
    EMPTY_ROOT,
    Checkpoint,
    accept,
    appended,
    leaf_hash,
    open_checkpoint,
    origin_of,
    prove_consistency,
    prove_inclusion,
    root_of,
    root_of_all,
    sign_checkpoint,
    verify_consistency,
    verify_inclusion,
)

SIZES = 34
ENTRIES = [f"entry {n}".encode() for n in range(SIZES)]
KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes_raw()


def tree_hash(entries: list[bytes]) -> bytes:
    """MTH of RFC 9162 2.1.1, word for word."""
    if not entries:
        return hashlib.sha256().digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    k = 1
    while 2 * k < len(entries):
        k *= 2
    return hashlib.sha256(b"\x01" + tree_hash(entries[:k]) + tree_hash(entries[k:])).digest()


def grown(entries: list[bytes]) -> dict[tuple[int, int], bytes]:
    nodes: dict[tuple[int, int], bytes] = {}
    for index, entry in enumerate(entries):
        for level, number, value in appended(index, leaf_hash(entry), lambda *at: nodes[at]):
            assert (level, number) not in nodes  # a full subtree is written once, and never changes
            nodes[level, number] = value
    return nodes


NODES = grown(ENTRIES)


def nodes(level: int, number: int) -> bytes:
    return NODES[level, number]


ROOTS = [tree_hash(ENTRIES[:size]) for size in range(SIZES + 1)]


def test_the_root_is_that_of_the_definition_for_every_size():
    assert [root_of(size, nodes) for size in range(SIZES + 1)] == ROOTS
    assert [root_of_all(ENTRIES[:size]) for size in range(SIZES + 1)] == ROOTS
    assert ROOTS[0] == EMPTY_ROOT


def test_appending_completes_two_subtrees_on_average():
    assert len(NODES) < 2 * SIZES


def test_every_entry_of_every_size_is_proven():
    for size in range(1, SIZES + 1):
        for index in range(size):
            proof = prove_inclusion(index, size, nodes)
            assert len(proof) <= (size - 1).bit_length()
            verify_inclusion(leaf_hash(ENTRIES[index]), index, size, proof, ROOTS[size])


def test_every_pair_of_sizes_is_proven_consistent():
    for second in range(1, SIZES + 1):
        for first in range(1, second + 1):
            verify_consistency(first, second, ROOTS[first], ROOTS[second], prove_consistency(first, second, nodes))


def refused(function, *args) -> bool:
    try:
        function(*args)
    except InvalidProof:
        return True
    return False


def mutations(proof: list[bytes], rng: random.Random):
    for at in range(len(proof)):
        flipped = bytearray(proof[at])
        flipped[rng.randrange(32)] ^= 1 << rng.randrange(8)
        yield [*proof[:at], bytes(flipped), *proof[at + 1 :]]
        yield proof[:at] + proof[at + 1 :]
        yield [*proof[: at + 1], proof[at], *proof[at + 1 :]]
        yield [*proof[:at], proof[at][:-1], *proof[at + 1 :]]
    yield [*proof, bytes(32)]


def test_no_changed_proof_is_accepted():
    rng, tried = random.Random(0), 0
    for size in range(1, SIZES + 1):
        for index in range(size):
            proof, leaf = prove_inclusion(index, size, nodes), leaf_hash(ENTRIES[index])
            for changed in mutations(proof, rng):
                assert refused(verify_inclusion, leaf, index, size, changed, ROOTS[size])
                tried += 1
            for other in (index - 1, index + 1):
                assert refused(verify_inclusion, leaf, other, size, proof, ROOTS[size])
            assert refused(verify_inclusion, leaf_hash(b"another"), index, size, proof, ROOTS[size])
        for first in range(1, size):
            proof = prove_consistency(first, size, nodes)
            for changed in mutations(proof, rng):
                assert refused(verify_consistency, first, size, ROOTS[first], ROOTS[size], changed)
                tried += 1
    assert tried > 10_000


def test_without_memory_a_rewritten_log_passes():
    """Control: a client that remembers nothing is shown any history."""
    rewritten = Checkpoint("log", 3, tree_hash([b"x", b"y", b"z"]), bytes(32))
    assert accept(None, rewritten, []) == rewritten


@pytest.mark.parametrize("kind", ["edit", "delete", "swap", "insert", "truncate"])
def test_a_rewritten_log_cannot_prove_that_it_only_appends(kind):
    rng = random.Random(kind)
    for _ in range(40):
        size = rng.randrange(2, SIZES - 1)
        at = rng.randrange(size - 1)
        old, new = ENTRIES[:size], [*ENTRIES[:size], b"news", b"more news"]
        match kind:
            case "edit":
                new[at] = b"edited"
            case "delete":
                del new[at]
            case "swap":
                new[at], new[at + 1] = new[at + 1], new[at]
            case "insert":
                new.insert(at, b"slipped in")
            case "truncate":
                new = old[: at + 1]
        forged = grown(new)
        known = Checkpoint("log", size, tree_hash(old), bytes(32))
        shown = Checkpoint("log", len(new), tree_hash(new), bytes(32))
        first, second = sorted((size, len(new)))
        proof = prove_consistency(first, second, lambda *node, forged=forged: forged[node]) if len(new) >= size else []
        if kind == "truncate":  # a prefix is a valid older state; what is remembered stays
            assert accept(known, shown, prove_consistency(len(new), size, nodes)) == known
        else:
            with pytest.raises(InvalidProof):
                accept(known, shown, proof)


def test_two_histories_of_one_size_are_refused():
    known = Checkpoint("log", 3, ROOTS[3], bytes(32))
    with pytest.raises(InvalidProof, match="two roots"):
        accept(known, replace(known, root=tree_hash([b"x", b"y", b"z"])), [])
    with pytest.raises(InvalidProof, match="two catalogues"):
        accept(known, replace(known, catalogue=bytes([1] * 32)), [])
    with pytest.raises(InvalidProof, match="an empty log"):
        accept(known, Checkpoint("log", 0, EMPTY_ROOT, bytes(32)), [])
    assert accept(None, known, []) == known


# Checkpoints --------------------------------------------------------------------------------------------------------------

CHECKPOINT = Checkpoint(origin_of(PUBLIC), 5, ROOTS[5], hashlib.sha256(b"head").digest())
NOTE = sign_checkpoint(CHECKPOINT, KEY)


WITH_NOTICES = replace(CHECKPOINT, notices=(2, ROOTS[2]))


def test_a_checkpoint_binds_the_notices_and_one_signed_before_it_did_still_stands():
    note = sign_checkpoint(WITH_NOTICES, KEY)
    assert open_checkpoint(note, PUBLIC) == WITH_NOTICES
    assert note.startswith(CHECKPOINT.text + b"notices 2 ")
    for at in range(len(note)):
        changed = bytearray(note)
        changed[at] ^= 1 << at % 8
        with pytest.raises((FormatError, InvalidSignature)):
            open_checkpoint(bytes(changed), PUBLIC)
    assert accept(open_checkpoint(NOTE, PUBLIC), WITH_NOTICES, []) == WITH_NOTICES
    assert accept(WITH_NOTICES, CHECKPOINT, []) == WITH_NOTICES  # an older answer that came late


def test_a_checkpoint_with_fewer_or_other_notices_is_refused():
    proof = prove_consistency(5, 6, nodes)
    newer = Checkpoint(CHECKPOINT.origin, 6, ROOTS[6], bytes(32))
    for forgot in (None, (1, ROOTS[1]), (0, EMPTY_ROOT)):
        with pytest.raises(InvalidProof, match="at least 2 notices"):
            accept(WITH_NOTICES, replace(newer, notices=forgot), proof)
    for shown in (replace(newer, notices=(2, ROOTS[3])), replace(WITH_NOTICES, notices=(2, ROOTS[3]))):
        with pytest.raises(InvalidProof, match="two lists"):
            accept(WITH_NOTICES, shown, proof if shown.size == 6 else [])
    assert accept(WITH_NOTICES, replace(newer, notices=(2, ROOTS[2])), proof).size == 6
    # The control: where checkpoints bind no notices, whatever is forgotten passes.
    assert accept(CHECKPOINT, newer, proof) == newer


def test_a_checkpoint_is_a_signed_note():
    assert open_checkpoint(NOTE, PUBLIC) == CHECKPOINT
    text, signatures = NOTE.decode().split("\n\n")
    assert text.splitlines()[:2] == [origin_of(PUBLIC), "5"]
    dash, name, _ = signatures.rstrip("\n").split(" ")
    assert (dash, name) == ("\u2014", origin_of(PUBLIC))


def test_lines_of_witnesses_do_not_disturb():
    assert open_checkpoint(NOTE + "\u2014 witness.example AAAAAAAA\n".encode(), PUBLIC) == CHECKPOINT


def test_every_flipped_bit_is_caught():
    for at in range(len(NOTE)):
        for bit in range(8):
            changed = bytearray(NOTE)
            changed[at] ^= 1 << bit
            with pytest.raises((FormatError, InvalidSignature)):
                open_checkpoint(bytes(changed), PUBLIC)


def test_another_market_cannot_sign_it():
    other = Ed25519PrivateKey.generate()
    with pytest.raises(InvalidSignature):
        open_checkpoint(sign_checkpoint(CHECKPOINT, other), PUBLIC)
    with pytest.raises(InvalidSignature, match="another market"):
        open_checkpoint(NOTE, other.public_key().public_bytes_raw())


@pytest.mark.parametrize("size", ["05", "+5", " 5", "5 ", "5.0", "-1", str(1 << 60), "\uff15"])
def test_a_size_has_one_spelling(size):
    text, rest = NOTE.decode().split("\n\n")
    lines = text.split("\n")
    lines[1] = size
    forged = ("\n".join(lines) + "\n\n" + rest).encode()
    with pytest.raises((FormatError, InvalidSignature)):
        open_checkpoint(forged, PUBLIC)


@given(st.binary(max_size=400))
def test_foreign_bytes_give_typed_errors(data):
    with pytest.raises(VeilmartError):
        open_checkpoint(data, PUBLIC)
