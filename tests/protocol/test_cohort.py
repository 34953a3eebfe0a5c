"""Cohorts: the sum of many and nothing else, over a SuperLink that reads and exchanges what it likes."""

import copy
import dataclasses
import itertools
import random
import struct

import numpy as np
import pytest

from protocol import cohort_round
from protocol.admission import LENIENT, AdmissionPolicy, admit_release
from protocol.cohort import CohortSeal, Resilience
from protocol.cohort_round import (
    Ask,
    Cohort,
    Member,
    Roster,
    Step,
    Transcript,
    aggregate,
    boxes_in,
    contribution,
    cosign,
    joint_release,
    sealed,
)
from protocol.errors import CohortAborted, FeatureNormError, FormatError, InvalidSignature, NotAdmitted, VeilmartError
from protocol.hazmat.noise import NoiseSource, operating_system
from protocol.privacy import MAX_UNITS, NORM_SQUARED, Guarantee, PrivacyUnit, noise_variance
from protocol.release import Card, open_envelope, sign_release
from protocol.specification import BoundedVectors, quantise
from protocol.transparency import Checkpoint, Receipt, leaf_hash, origin_of, sign_checkpoint
from protocol.verify import verify_receipt
from protocol.window import ALWAYS
from tests.protocol.cohorts import ONE, Carrier, carrier_of, cohort_of, owners, public, release_from, sealed_by
from tests.protocol.worlds import ADAPTER, features

KEYS = owners(10)
NAMES = [public(key) for key in KEYS]
SIZES = [Resilience(k, d, c) for k in range(3, 13) for d in range(k) for c in range(k) if k - d >= 3 and k > 2 * d + c]


def numbers(member: bytes) -> list[int]:
    """What a member brings: numbers of either sign whose sum over all can be told from every part of it."""
    place = NAMES.index(member)
    return [1 << place, -(3**place), 1_000_003 * place, (1 << 30) // 10, -(1 << 27)]


def sum_of(members) -> list[int]:
    return np.sum([numbers(member) for member in members], axis=0).tolist()


def ten(**how) -> Carrier:
    return carrier_of(KEYS, numbers, dropouts=2, colluders=4, **how)


# The sum ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lost", [{}, {"share": 2}, {"mask": 2}, {"advertise": 1, "mask": 1}, {"agree": 2}, {"mask": 1, "reveal": 1}], ids=str
)
def test_the_sum_is_that_of_the_survivors_whoever_drops_out_when(lost):
    dropping = iter(NAMES[1:])
    gone = {step: {next(dropping) for _ in range(count)} for step, count in lost.items()}
    result = aggregate((carrier := ten(lost=gone)).cohort, carrier.transcript())
    missing = set().union(*(members for step, members in gone.items() if step in ("advertise", "share", "mask")))
    assert result.survivors == tuple(name for name in NAMES if name not in missing)
    assert result.sums.tolist() == sum_of(result.survivors)


def test_a_third_dropout_ends_a_round_that_was_made_for_two():
    with pytest.raises(FormatError, match="at least 8 members"):
        ten(lost={"mask": set(NAMES[:3])}).transcript()


# What the SuperLink sees --------------------------------------------------------------------------------------------------


def shown(carrier: Carrier) -> list[bytes]:
    """Return what of the members' numbers is in what went over the wire: any two neighbouring ones, or the whole."""
    pairs = []
    for member in NAMES:
        data = struct.pack("<5i", *numbers(member))
        pairs += [data, *(data[start : start + 8] for start in range(0, 16, 4))]
    return [pair for pair in pairs if any(pair in message for message in carrier.seen)]


def test_unmasked_numbers_never_go_over_the_wire():
    carrier = ten(lost={"mask": {NAMES[2]}})
    carrier.transcript()
    assert len(carrier.seen) == 10 + 10 + 9 + 9 + 9
    assert shown(carrier) == []


def test_control_masks_that_are_switched_off_are_caught(monkeypatch):
    monkeypatch.setattr(cohort_round, "stream", lambda key, count: np.zeros(count, np.uint32))
    carrier = ten()
    carrier.transcript()
    assert len(shown(carrier)) == 10 * 5


def test_without_the_self_mask_a_member_that_is_declared_lost_would_be_open(monkeypatch):
    """The control of the self-mask: a SuperLink that got a member's numbers and says it did not learns its mask key."""

    def opened(carrier: Carrier) -> list[int]:
        carrier.until_masked()
        late, masked = NAMES[4], carrier.masked
        others = [message for message in masked if late not in message[:200]]
        agreed = [carrier.members[name].agree(others) for name in NAMES if name != late]
        revealed = [carrier.members[name].reveal(agreed) for name in NAMES if name != late]
        # What the SuperLink has now: the masked numbers that it withheld, and all masks of pairs with their member.
        secrets: list[np.ndarray] = []
        kept = cohort_round.Roster.pair_mask

        def noted(self, private, mine, other):
            mask = kept(self, private, mine, other)
            secrets.append(mask)
            return mask

        with monkeypatch.context() as patched:
            patched.setattr(cohort_round.Roster, "pair_mask", noted)
            aggregate(carrier.cohort, Transcript(carrier.adverts, tuple(others), tuple(agreed), tuple(revealed)))
        (withheld,) = [message for message in masked if message not in others]
        words = np.frombuffer(withheld[-64 - 20 : -64], "<u4").astype(np.uint32)
        return (words - np.sum(secrets, axis=0, dtype=np.uint32)).view(np.int32).tolist()

    assert opened(ten()) != numbers(NAMES[4])

    class WithoutSelfMask(Member):
        def _masked(self, boxes, contribute):
            with monkeypatch.context() as patched:
                # The first stream of a member's masking is its self-mask.
                streams = iter([lambda key, count: np.zeros(count, np.uint32)])
                real = cohort_round.stream
                patched.setattr(cohort_round, "stream", lambda key, count: next(streams, real)(key, count))
                return super()._masked(boxes, contribute)

    unmasked = ten(member_type=WithoutSelfMask)
    with pytest.MonkeyPatch.context() as patched:  # its commitment would show that the mask is another one: not of interest here
        patched.setattr(cohort_round, "_commitment", lambda cohort, member, self_mask: bytes(32))
        assert opened(unmasked) == numbers(NAMES[4])


def test_masked_numbers_are_uniform_words():
    """200 words of 8 rounds of equal numbers; false alarm below 1e-6 (chi-square, 15 degrees of freedom)."""
    words = []
    for number in range(8):
        carrier = carrier_of(KEYS[:5], lambda member: [0] * 5, round_id=bytes([number]) * 32)
        carrier.until_masked()
        words += [byte for message in carrier.masked for byte in message[-64 - 20 : -64]]
    counts = np.bincount(np.array(words) >> 4, minlength=16)
    assert ((counts - len(words) / 16) ** 2 / (len(words) / 16)).sum() < 60.0


# Noise --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0])
def test_what_colluders_do_not_know_of_the_noise_keeps_the_guarantee(epsilon):
    guarantee = Guarantee(epsilon, 1e-6)
    for sizes in SIZES:
        honest = sizes.least_survivors - sizes.colluders  # the fewest honest members whose noise is in a released sum
        assert honest * sizes.share_variance(guarantee) >= noise_variance(guarantee, NORM_SQUARED)
        # And not much more: published is what is there, and nobody pays for noise that protects nobody.
        assert honest * (sizes.share_variance(guarantee) - 1) < noise_variance(guarantee, NORM_SQUARED)


def test_control_shares_that_forget_the_colluders_leave_too_little():
    sizes = Resilience(10, 2, 4)
    forgetful = -(-noise_variance(ONE, NORM_SQUARED) // (10 - 2))
    assert (8 - 4) * forgetful < 0.51 * noise_variance(ONE, NORM_SQUARED)
    assert (8 - 4) * sizes.share_variance(ONE) >= noise_variance(ONE, NORM_SQUARED)


def test_four_colluders_with_the_superlink_hold_too_few_shares_of_anybody():
    """What they hold together of an honest member is below the threshold, and of each member at most one kind is ever revealed."""
    carrier = ten(lost={"mask": {NAMES[9]}})
    secrets = {name: member._secrets for name, member in carrier.members.items()}
    transcript = carrier.transcript()
    threshold = carrier.cohort.resilience.threshold
    assert 4 < threshold == 8
    for message in transcript.revealed:
        content = message[-64 - 10 * 66 : -64]
        sender = next(name for name in NAMES if name in message[:100])
        held = secrets[sender].held
        for place, dealer in enumerate(NAMES):
            share = content[place * 66 : (place + 1) * 66]
            self_mask, mask_key = held[dealer]
            assert share == (mask_key if dealer == NAMES[9] else self_mask)
            assert (mask_key if dealer != NAMES[9] else self_mask) not in message


@pytest.mark.slow
def test_the_noise_of_a_sum_is_that_which_is_published():
    """48 000 coordinates of three survivors of four: within 2 %, 3.1 standard deviations; the seed is fixed."""
    source = NoiseSource(random.Random(8).randbytes, simulated=True)
    records = quantise(features(5, 1, 3999))
    deviations: list[int] = []
    for number in range(12):
        keys = KEYS[:4]
        cohort = cohort_of(keys, dropouts=1, dimension=3999, round_id=bytes([number]) * 32)
        members = {public(key): Member(cohort, key) for key in keys}
        carrier = Carrier(cohort, members, lambda _, cohort=cohort: contribution(records, cohort, source), {"mask": {public(keys[0])}})
        result = aggregate(cohort, carrier.transcript())
        deviations += (result.sums - 3 * records.rows.sum(axis=0)).tolist()
    found = np.square(np.array(deviations, float)).mean()
    assert found == pytest.approx(result.variance, rel=0.02)
    assert result.variance == 3 * Resilience(4, 1, 0).share_variance(ONE) == pytest.approx(noise_variance(ONE, NORM_SQUARED), rel=1e-6)
    # The controls: neither the noise of all four, nor that of shares which forget the dropout, would pass for it.
    assert found != pytest.approx(result.variance * 4 / 3, rel=0.02)
    assert found != pytest.approx(result.variance * 3 / 4, rel=0.02)


# A SuperLink that lies ----------------------------------------------------------------------------------------------------


def test_two_survivor_lists_never_both_find_enough_signatures():
    """However a SuperLink deals honest members out between two lists, and though colluders sign both."""
    for sizes in SIZES:
        honest, c = sizes.members - sizes.colluders, sizes.colluders
        for first in range(honest + 1):
            assert not (first + c >= sizes.threshold and honest - first + c >= sizes.threshold)


def opened_by_two_lists(carrier: Carrier) -> list[int]:
    """Return what a SuperLink with four colluders learns that shows half of the others one list, and half of them another."""
    carrier.until_masked()
    victim, colluders = NAMES[5], NAMES[6:]
    lists = {"with": carrier.masked, "without": tuple(message for message in carrier.masked if victim not in message[:100])}
    sums = {}
    for which, honest in (("with", NAMES[:3]), ("without", NAMES[3:5])):
        twins = []
        for name in colluders:  # they do not keep to answering once
            twins.append(copy.copy(carrier.members[name]))
            twins[-1]._answers = dict(twins[-1]._answers)
        asked = [*(carrier.members[name] for name in honest), *twins]
        agreed = [member.agree(lists[which]) for member in asked]
        revealed = [member.reveal(agreed) for member in asked]
        sums[which] = aggregate(carrier.cohort, Transcript(carrier.adverts, lists[which], tuple(agreed), tuple(revealed))).sums
    return (sums["with"] - sums["without"]).tolist()


def test_colluders_who_sign_two_lists_open_nobody():
    with pytest.raises(FormatError, match="at least 8 members"):
        opened_by_two_lists(ten())


def test_control_with_half_of_the_members_as_threshold_they_would(monkeypatch):
    monkeypatch.setattr(Resilience, "threshold", property(lambda self: self.members // 2 + 1))
    assert opened_by_two_lists(ten()) == numbers(NAMES[5])


def test_a_superlink_that_shows_two_survivor_lists_gets_nothing():
    carrier = ten()
    carrier.until_masked()
    first, second = carrier.masked[:9], carrier.masked[1:]  # with and without the last and the first member
    lists = {name: first if place < 5 else second for place, name in enumerate(NAMES)}
    agreed = [carrier.members[name].agree(lists[name]) for name in NAMES if name not in (NAMES[0], NAMES[9])]
    for name in NAMES[1:9]:
        with pytest.raises(FormatError, match=r"survivors' signatures under one list|at least 8"):
            carrier.members[name].reveal(agreed)
        with pytest.raises(CohortAborted):  # and whatever it says next, the round is over
            carrier.members[name].reveal(agreed[:4])


def test_nobody_signs_two_survivor_lists():
    carrier = ten()
    carrier.until_masked()
    carrier.members[NAMES[3]].agree(carrier.masked)
    with pytest.raises(CohortAborted, match="twice over different messages"):
        carrier.members[NAMES[3]].agree(carrier.masked[:9])


def never(member: bytes) -> list[int]:
    raise AssertionError("a member charged its ledger in a round that does not fit")


def test_keys_that_were_exchanged_are_noticed_before_anything_is_charged():
    carrier = carrier_of(KEYS, never, dropouts=2, colluders=4)
    carrier.boxes()
    victim, stranger = NAMES[0], owners(11)
    liar = next(key for key in stranger if public(key) not in NAMES)
    forged = Member(carrier_of([*KEYS[1:], liar], never, dropouts=2, colluders=4).cohort, liar).advertise()
    own = carrier.adverts[0]
    for adverts in (
        (forged, *carrier.adverts[1:]),
        carrier.adverts[1:],
        (own[:-70] + bytes([own[-70] ^ 1]) + own[-69:], *carrier.adverts[1:]),
    ):
        fresh = ten().members[victim]
        fresh.advertise()
        with pytest.raises(VeilmartError):
            fresh.share(adverts)


def test_a_superlink_that_shows_members_different_keys_of_one_is_noticed_by_all_before_anything_is_charged():
    """A colluder signs two sets of keys, and half of the members are shown each: their boxes do not open."""
    carrier = carrier_of(KEYS, never, dropouts=2, colluders=4)
    adverts = [carrier.members[name].advertise() for name in NAMES]
    second = Member(carrier.cohort, KEYS[9]).advertise()
    rosters = {name: [*adverts[:9], second if place % 2 else adverts[9]] for place, name in enumerate(NAMES)}
    dealt = [carrier.members[name].share(rosters[name]) for name in NAMES[:9]]
    boxes: dict[bytes, list[bytes]] = {name: [] for name in NAMES}
    for message, name in zip(dealt, NAMES, strict=False):
        for other, box in boxes_in(Roster.of(carrier.cohort, rosters[name]), message)[1].items():
            boxes[other].append(name + box)
    for name in NAMES[:9]:
        with pytest.raises(CohortAborted, match="does not open"):
            carrier.members[name].mask(boxes[name], lambda: never(b""))


def test_different_lists_of_dealers_are_noticed_before_anything_is_revealed():
    carrier = ten()
    boxes = carrier.boxes()
    boxes[NAMES[0]] = [part for part in boxes[NAMES[0]] if part[:32] != NAMES[5]]
    masked = [carrier.members[name].mask(boxes[name], lambda name=name: numbers(name)) for name in NAMES]
    for name in NAMES:
        with pytest.raises(FormatError, match="one list of dealers"):
            carrier.members[name].agree(masked)


def test_messages_of_another_round_are_worth_nothing_in_this_one():
    first, second = ten(), ten(round_id=bytes([9]) * 32)
    first.transcript()
    second.boxes()
    with pytest.raises(FormatError, match="of this round"):
        aggregate(second.cohort, Transcript(second.adverts, first.masked, first.agreed, first.revealed))


def test_the_same_question_again_gets_the_same_bytes_and_another_one_nothing():
    carrier, calls = ten(), []
    boxes = carrier.boxes()
    member = carrier.members[NAMES[0]]
    said = [member.mask(boxes[NAMES[0]], lambda: calls.append(1) or numbers(NAMES[0])) for _ in range(3)]
    assert len(set(said)) == len(calls) == 1
    with pytest.raises(CohortAborted):
        member.mask(boxes[NAMES[0]][:-1], lambda: numbers(NAMES[0]))
    with pytest.raises(CohortAborted):  # nor the first one, from then on
        member.mask(boxes[NAMES[0]], lambda: numbers(NAMES[0]))


def test_a_member_keeps_no_secret_of_a_round_that_is_over():
    """Whoever takes its machine over later finds nothing that opens what a SuperLink recorded."""
    done = ten(lost={"mask": {NAMES[9]}})
    done.transcript()
    assert [member._secrets for member in done.members.values()][:9] == [None] * 9
    assert done.members[NAMES[9]]._secrets is not None, "one that may still be asked goes on"
    with pytest.raises(CohortAborted):
        done.members[NAMES[9]].agree([])
    assert done.members[NAMES[9]]._secrets is None


def test_steps_out_of_order_end_a_round():
    for name in ("share", "agree", "reveal"):
        member = ten().members[NAMES[0]]
        with pytest.raises(CohortAborted, match="out of order"):
            getattr(member, name)([])
        with pytest.raises(CohortAborted):
            member.advertise()


def changed(message: bytes, position: int) -> bytes:
    return message[:position] + bytes([message[position] ^ 1]) + message[position + 1 :]


def test_whoever_signs_recomputes_the_sum_and_no_changed_message_passes():
    carrier = ten(lost={"mask": {NAMES[6]}})
    transcript = carrier.transcript()
    aggregate(carrier.cohort, transcript)
    for field in dataclasses.fields(Transcript):
        messages = getattr(transcript, field.name)
        for position in (40, -100, -1):
            forged = dataclasses.replace(transcript, **{field.name: (changed(messages[0], position), *messages[1:])})
            with pytest.raises(VeilmartError):
                aggregate(carrier.cohort, forged)


def test_shares_that_a_colluder_changed_open_nothing():
    """Signed by a member, so nothing but the commitment shows it."""
    carrier = ten()
    transcript = carrier.transcript()
    liar = carrier.members[NAMES[0]]
    body = transcript.revealed[0][:-64]
    body = changed(body, len(body) - 10)
    with pytest.raises(FormatError, match="another self-mask"):
        aggregate(carrier.cohort, dataclasses.replace(transcript, revealed=(body + liar._key.sign(body), *transcript.revealed[1:])))


# Parameters ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "d", "c"), [(2, 0, 0), (3, 1, 0), (4, 2, 0), (10, 2, 6), (10, 3, 4), (33, 0, 0), (10, -1, 0), (10, 0, -1), (5, 0, 5)]
)
def test_cohorts_that_cannot_keep_their_promise_are_refused(k, d, c):
    Resilience(10, 2, 4)
    with pytest.raises(FormatError, match="cohort: expected"):
        Resilience(k, d, c)


def test_parameters_read_back_and_no_other_spelling_does():
    cohort = cohort_of(KEYS, dropouts=2, colluders=4)
    assert Cohort.from_bytes(cohort.body) == cohort
    ask = Ask(Step.SHARE, cohort, (b"one", b"", b"three"))
    assert Ask.from_bytes(ask.to_bytes()) == ask
    for data in (ask.to_bytes() + b"x", ask.to_bytes()[:-1], cohort.body):
        with pytest.raises(FormatError):
            Ask.from_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        {"members": tuple(reversed(NAMES))}, {"members": (*NAMES[:9], NAMES[8])}, {"round_id": b"short"}, {"dimension": 0},
        {"guarantee": Guarantee(1.0, 1e-6, unit=PrivacyUnit("person"))}, {"name": "../x"}, {"guarantee": Guarantee(0.0005, 1e-12)},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_cohort_with_impossible_parameters_does_not_exist(change):
    with pytest.raises(FormatError):
        dataclasses.replace(cohort_of(KEYS, dropouts=2, colluders=4), **change)


def test_the_largest_sums_that_members_may_bring_fit_in_a_word():
    for sizes in SIZES:
        assert sizes.members * sizes.most_units <= MAX_UNITS
    cohort = cohort_of(KEYS[:3], dimension=1)
    row = np.array([[1024, 4096]], np.int64)
    with pytest.raises(FeatureNormError, match="at most 133333 records"):
        contribution(BoundedVectors(np.repeat(row, 133_334, axis=0)), cohort, operating_system())
    full = BoundedVectors(np.repeat(row, 133_333, axis=0))
    carrier = Carrier(
        cohort, {public(key): Member(cohort, key) for key in KEYS[:3]}, lambda _: contribution(full, cohort, operating_system())
    )
    sums = aggregate(cohort, carrier.transcript()).sums
    assert abs(int(sums[1]) - 3 * 133_333 * 4096) < 6 * noise_variance(ONE, NORM_SQUARED) ** 0.5


def test_vectors_under_another_bound_are_refused():
    cohort = cohort_of(KEYS[:3], dimension=1)
    with pytest.raises(FeatureNormError, match="under the bound"):
        contribution(BoundedVectors(np.array([[1024, 8192]], np.int64), norm_squared=1 << 30), cohort, operating_system())


# The release --------------------------------------------------------------------------------------------------------------


def honest_round():
    records = quantise(features(20, 3))
    cohort = cohort_of(KEYS, dropouts=2, colluders=4)
    members = {public(key): Member(cohort, key) for key in KEYS}
    return Carrier(cohort, members, lambda _: contribution(records, cohort, operating_system()), {"mask": {NAMES[0], NAMES[7]}})


@pytest.fixture(scope="module")
def released():
    release, publisher = release_from(honest_round(), KEYS)
    return release, publisher, sign_release(release, publisher)


def test_a_cohorts_release_reads_back_and_is_admitted(released):
    release, publisher, envelope = released
    opened = open_envelope(envelope)
    assert opened.body == release.body
    assert opened.cohort == release.cohort
    assert (len(opened.signers), opened.owner) == (8, public(publisher))
    assert opened.specification.noise_variance == 8 * Resilience(10, 2, 4).share_variance(ONE) >= 2 * noise_variance(ONE, NORM_SQUARED)
    admit_release(opened, AdmissionPolicy())


def test_the_same_sums_without_a_cohort_are_not_admitted(released):
    """The control of admission: more noise than the claim needs, and nobody's shares to explain it."""
    with pytest.raises(NotAdmitted, match="noise_variance"):
        admit_release(dataclasses.replace(released[0], cohort=None), LENIENT)


def test_every_flipped_bit_of_a_cohorts_release_is_noticed(released):
    envelope = released[2]
    for position in range(0, len(envelope), 7):
        with pytest.raises(VeilmartError):
            open_envelope(changed(envelope, position))


def forged(released, **change) -> bytes:
    """Return the envelope of a release whose publisher changed its seal, or the release itself."""
    release, publisher, _ = released
    seal = {name: change.pop(name) for name in ("survivors", "signatures", "cohort_id", "resilience") if name in change}
    return sign_release(dataclasses.replace(release, cohort=dataclasses.replace(release.cohort, **seal), **change), publisher)


WAYS_TO_CHEAT = {
    "a survivor's signature is another one": lambda r: {"signatures": (bytes(64), *r.cohort.signatures[1:])},
    "signatures in another order": lambda r: {"signatures": tuple(reversed(r.cohort.signatures))},
    "a survivor is left out": lambda r: {"survivors": r.cohort.survivors[1:], "signatures": r.cohort.signatures[1:]},
    "another round": lambda r: {"cohort_id": bytes(32)},
    "fewer colluders, for a smaller share": lambda r: {"resilience": Resilience(10, 2, 3)},
    "other sums": lambda r: {"specification": dataclasses.replace(r.specification, noisy_sums=r.specification.noisy_sums + np.int32(1))},
    "less noise": lambda r: {"specification": dataclasses.replace(r.specification, noise_variance=r.specification.noise_variance - 8)},
    "the noise of ten": lambda r: {
        "specification": dataclasses.replace(r.specification, noise_variance=r.specification.noise_variance // 8 * 10)
    },
    "a smaller epsilon": lambda r: {"specification": dataclasses.replace(r.specification, guarantee=Guarantee(0.9, 1e-6))},
    "another name": lambda r: {"card": Card("other")},
    "a summary that nobody signed": lambda r: {"card": Card("joint", "the best of all")},
    "an adapter that nobody signed": lambda r: {"adapter": ADAPTER},
    "another base model": lambda r: {"base_model": bytes(32)},
    "noise from a seed": lambda r: {"simulated": True},
}


@pytest.mark.parametrize("cheat", WAYS_TO_CHEAT.values(), ids=WAYS_TO_CHEAT)
def test_a_cohorts_release_that_its_survivors_did_not_sign_is_refused(released, cheat):
    open_envelope(forged(released))
    with pytest.raises((FormatError, InvalidSignature)):
        open_envelope(forged(released, **cheat(released[0])))


def test_an_auditor_with_a_file_alone_sees_who_released_together(released, tmp_path):
    def verified(envelope: bytes):
        market = KEYS[9]
        note = sign_checkpoint(Checkpoint(origin_of(public(market)), 1, leaf_hash(envelope), bytes(32)), market)
        file = tmp_path / "joint.receipt"
        file.write_bytes(Receipt(envelope, public(market), 0, note, ()).to_bytes())
        return verify_receipt(file)

    result, lines = verified(released[2])
    assert result["signers"] == [survivor.hex() for survivor in released[0].cohort.survivors]
    assert "signed by 8 of 10 owners" in "".join(lines)
    for cheat in ("a survivor's signature is another one", "the noise of ten"):
        with pytest.raises((FormatError, InvalidSignature)):
            verified(forged(released, **WAYS_TO_CHEAT[cheat](released[0])))


def test_nobody_else_publishes_a_cohorts_release(released):
    release, _, _ = released
    dropped = KEYS[0]
    with pytest.raises(FormatError, match="one of its survivors"):
        sign_release(dataclasses.replace(release, owner=public(dropped)), dropped)


def test_a_release_of_one_owner_has_the_bytes_that_it_had(released):
    release, publisher, _ = released
    alone = dataclasses.replace(release, cohort=None)
    assert b"cohort" not in alone.body
    assert open_envelope(sign_release(alone, publisher)).cohort is None


def test_a_seal_needs_the_signatures_of_all_survivors():
    carrier = honest_round()
    result = aggregate(carrier.cohort, carrier.transcript())
    signed = [cosign(result, key) for key in KEYS if public(key) in result.survivors]
    sealed(result, signed)
    with pytest.raises(FormatError, match="at least 8"):
        sealed(result, signed[1:])
    with pytest.raises(CohortAborted, match="not in the sum"):
        cosign(result, KEYS[0])
    with pytest.raises(FormatError, match="signatures of all"):
        CohortSeal(carrier.cohort.cohort_id, carrier.cohort.resilience, result.survivors, (bytes(64),))
    open_envelope(
        sign_release(joint_release(result, sealed_by(result, KEYS), result.survivors[0], 1, b"", ALWAYS), _key_of(result.survivors[0]))
    )


def _key_of(owner: bytes):
    return next(key for key in KEYS if public(key) == owner)


def test_the_steps_of_a_round_are_all_told_apart():
    for one, other in itertools.permutations(("advertise", "share", "mask", "agree", "reveal", "sign"), 2):
        assert f"cohort-{one}" not in f"cohort-{other}"
