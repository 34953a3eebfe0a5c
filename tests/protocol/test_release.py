import json
import os
import struct

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import FormatError, InvalidSignature, UnsupportedVersion, VeilmartError
from protocol.features import default_map
from protocol.privacy import Guarantee, PoissonSampledGaussian, PrivacyUnit, PrivateTraining, sampled_multiplier, training_to_plain
from protocol.release import MAGIC, AdapterReference, open_envelope, parse_release
from tests.protocol.worlds import ADAPTER, envelope_of, release_of, small_map

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
MAP = small_map()
ENVELOPE = envelope_of(MAP, KEY, adapter=ADAPTER)
BODY = ENVELOPE[:-64]


def resigned(body: bytes) -> bytes:
    return body + KEY.sign(body)


def with_metadata(change) -> bytes:
    (size,) = struct.unpack_from("<I", BODY, len(MAGIC))
    start = len(MAGIC) + 4
    metadata = json.loads(BODY[start : start + size])
    change(metadata)
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()
    return resigned(MAGIC + struct.pack("<I", len(text)) + text + BODY[start + size :])


def test_a_release_reads_back_to_the_same_bytes():
    release = open_envelope(ENVELOPE)
    assert release.body == BODY
    assert release.adapter == ADAPTER
    assert release.specification.guarantee.epsilon == 1.0


def test_a_release_carries_its_privacy_unit():
    envelope = with_metadata(lambda m: m.update(unit="field:person"))
    release = open_envelope(envelope)
    assert release.specification.guarantee.unit == PrivacyUnit("person")
    assert release.body == envelope[:-64]


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["alone", "with an adapter"])
def test_a_release_with_metadata_and_signature_takes_at_most_a_kilobyte(adapter):
    """With the default map's 97 integers; what people write on the card comes on top."""
    assert len(envelope_of(default_map(), KEY, adapter=adapter, number=2)) <= 1_000


def test_every_flipped_bit_is_noticed():
    for position in range(len(ENVELOPE)):
        for bit in (0, 5):
            forged = bytearray(ENVELOPE)
            forged[position] ^= 1 << bit
            with pytest.raises(VeilmartError):
                open_envelope(bytes(forged))


WAYS_TO_CHEAT = {
    "a float": lambda m: m.update(release_number=1.0),
    "null": lambda m: m.update(simulated=None),
    "a boolean": lambda m: m.update(simulated=True),
    "an extra field": lambda m: m.update(exact_n=300),
    "a missing field": lambda m: m.pop("unit"),
    "less noise than the claim": lambda m: m.update(noise_variance=m["noise_variance"] - 1),
    "a larger claim of privacy": lambda m: m.update(epsilon="0.5"),
    "another spelling of epsilon": lambda m: m.update(epsilon="1.00"),
    "epsilon nan": lambda m: m.update(epsilon="nan"),
    "replace-one": lambda m: m.update(relation="replace-one"),
    "a unit that nobody defined": lambda m: m.update(unit="galaxy"),
    "a unit without a field": lambda m: m.update(unit="field:"),
    "a unit that is what records say": lambda m: m.update(unit="field:text"),
    "a second release without a predecessor": lambda m: m.update(release_number=2),
    "an adapter with a guarantee that nobody checked": lambda m: m["adapter"].update(guarantee="epsilon 1"),
    "an adapter of a gigabyte": lambda m: m["adapter"].update(size_bytes=1 << 30),
    "a window that ends before it begins": lambda m: m.update(valid_from=m["valid_until"] + 1),
    "a window without an end": lambda m: m.pop("valid_until"),
    "a window beyond the end of days": lambda m: m.update(valid_until=1 << 16),
    "a window before 1970": lambda m: m.update(valid_from=-1),
    "a window of hours": lambda m: m.update(valid_from="20000.5"),
    "a name with a path": lambda m: m["card"].update(name="../x"),
}


@pytest.mark.parametrize("cheat", WAYS_TO_CHEAT.values(), ids=WAYS_TO_CHEAT)
def test_a_signed_release_that_breaks_a_rule_is_refused(cheat):
    open_envelope(with_metadata(lambda m: None))
    with pytest.raises(FormatError):
        open_envelope(with_metadata(cheat))


PRIVATE = PrivateTraining(Guarantee(8.0, 1e-6), PoissonSampledGaussian(sampled_multiplier(Guarantee(8.0, 1e-6), 0.125, 40), 0.125, 40))
PRIVATE_ADAPTER = AdapterReference(b"a" * 32, 1000, PRIVATE)


def with_guarantee(change) -> bytes:
    """A signed release whose adapter's guarantee was changed."""

    def swap(metadata) -> None:
        metadata["adapter"]["guarantee"] = training_to_plain(PRIVATE)
        change(metadata["adapter"]["guarantee"])

    return with_metadata(swap)


def test_an_adapters_guarantee_reads_back_with_its_mechanism():
    release = open_envelope(envelope_of(MAP, KEY, adapter=PRIVATE_ADAPTER))
    assert release.adapter == PRIVATE_ADAPTER
    assert str(release.adapter.guarantee) == "epsilon 8.0 at delta 1e-06, unit record"


WAYS_TO_CLAIM = {
    "a smaller epsilon than the mechanism keeps": lambda g: g.update(epsilon="7.9"),
    "a smaller delta": lambda g: g.update(delta="1e-09"),
    "more steps": lambda g: g["event"].update(steps=60),
    "a higher rate": lambda g: g["event"].update(sampling_rate="0.25"),
    "less noise": lambda g: g["event"].update(multiplier="0.5"),
    "noise that is no number": lambda g: g["event"].update(multiplier="nan"),
    "hardly any noise": lambda g: g["event"].update(multiplier="1e-300"),
    "a rate above one": lambda g: g["event"].update(sampling_rate="1.5"),
    "steps without end": lambda g: g["event"].update(steps=10**12),
    "another mechanism": lambda g: g["event"].update(kind="laplace"),
    "a single gaussian": lambda g: g.update(event={"kind": "gaussian", "multiplier": "9.0"}),
    "another unit than the specification's": lambda g: g.update(unit="field:person"),
    "replace-one": lambda g: g.update(relation="replace-one"),
    "no mechanism": lambda g: g.pop("event"),
    "an extra field": lambda g: g.update(loss="0.1"),
    "an extra field of the mechanism": lambda g: g["event"].update(loss="0.1"),
    "another spelling": lambda g: g.update(epsilon="8.00"),
}


@pytest.mark.parametrize("claim", WAYS_TO_CLAIM.values(), ids=WAYS_TO_CLAIM)
def test_a_guarantee_that_its_mechanism_does_not_keep_is_refused(claim):
    open_envelope(with_guarantee(lambda guarantee: None))
    with pytest.raises(FormatError):
        open_envelope(with_guarantee(claim))


def payload_start() -> int:
    (size,) = struct.unpack_from("<I", BODY, len(MAGIC))
    return len(MAGIC) + 4 + size


@pytest.mark.parametrize("position", [1, 4], ids=["a first release with a predecessor", "a digest without an adapter"])
def test_an_id_where_none_belongs_is_refused(position):
    body = release_of(small_map(), KEY).body
    at = body.index(b"}", body.rindex(b'"unit"')) + 1 + 32 * position
    with pytest.raises(FormatError):
        open_envelope(resigned(body[:at] + bytes(range(32)) + body[at + 32 :]))


@pytest.mark.parametrize("kept", [0, 31, 160, 164])
def test_ids_or_sums_that_are_missing_are_refused(kept):
    with pytest.raises(FormatError):
        open_envelope(resigned(BODY[: payload_start() + kept]))


def test_json_with_other_spacing_is_refused():
    (size,) = struct.unpack_from("<I", BODY, len(MAGIC))
    start = len(MAGIC) + 4
    text = json.dumps(json.loads(BODY[start : start + size]), sort_keys=True).encode()
    with pytest.raises(FormatError, match="canonical"):
        open_envelope(resigned(MAGIC + struct.pack("<I", len(text)) + text + BODY[start + size :]))


def test_text_that_is_no_unicode_is_refused():
    text = b'{"\\ud800":1}'
    with pytest.raises(FormatError):
        open_envelope(resigned(MAGIC + struct.pack("<I", len(text)) + text + bytes(20)))


def test_another_key_cannot_sign_for_the_owner():
    with pytest.raises(InvalidSignature):
        open_envelope(BODY + Ed25519PrivateKey.generate().sign(BODY))


def test_another_version_is_named_as_such():
    with pytest.raises(UnsupportedVersion):
        open_envelope(resigned(BODY.replace(b"/v3\0", b"/v2\0", 1)))


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_mutated_bytes_give_typed_errors_only(data):
    mutated = bytearray(BODY)
    for _ in range(data.draw(st.integers(1, 4))):
        match data.draw(st.sampled_from(("set", "cut", "insert"))):
            case "set":
                mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
            case "cut":
                del mutated[data.draw(st.integers(0, len(mutated) - 1)) :]
            case "insert":
                at = data.draw(st.integers(0, len(mutated)))
                mutated[at:at] = data.draw(st.binary(max_size=8))
        if not mutated:
            break
    try:
        release = open_envelope(resigned(bytes(mutated)))
    except VeilmartError:
        return
    assert release.body == bytes(mutated)


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_a_million_mutated_releases_give_typed_errors_only():
    """Parsed without the signature, so that every mutation reaches the parser."""
    rng, accepted = np.random.default_rng(11), 0
    for _ in range(int(os.environ.get("VEILMART_FUZZ", "1000000"))):
        mutated = bytearray(BODY)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(mutated)))
            match rng.integers(4):
                case 0:
                    mutated[at] ^= 1 << int(rng.integers(8))
                case 1:
                    mutated[at] = rng.integers(256)
                case 2:
                    del mutated[at : at + int(rng.integers(1, 9))]
                case 3:
                    mutated[at:at] = rng.bytes(int(rng.integers(1, 9)))
        try:
            release = parse_release(bytes(mutated))
        except VeilmartError:
            continue
        accepted += 1
        assert release.body == bytes(mutated)
    assert accepted, "mutated sums are other sums: some must be releases"


def test_the_sums_are_little_endian_int32_at_the_end():
    sums = open_envelope(ENVELOPE).specification.noisy_sums
    assert BODY.endswith(np.asarray(sums, "<i4").tobytes())
