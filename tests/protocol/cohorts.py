"""A round of a cohort over a SuperLink that is a few lines, with every message that it carries written down."""

from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.cohort import CohortSeal
from protocol.cohort_round import Aggregate, Cohort, Member, Roster, Transcript, aggregate, boxes_in, cosign, sealed
from protocol.privacy import Guarantee
from protocol.window import ALWAYS

ONE = Guarantee(1.0, 1e-6)
BASE = bytes([7]) * 32


def owners(count: int) -> list[Ed25519PrivateKey]:
    """Return keys in the order of their public halves."""
    keys = [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(1, count + 1)]
    return sorted(keys, key=public)


def public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def cohort_of(keys, *, dropouts=0, colluders=0, dimension=4, guarantee=ONE, **how) -> Cohort:
    ids = {"market_key": bytes([1]) * 32, "round_id": bytes([2]) * 32, "map_id": bytes([3]) * 32, "base_model": BASE, **how}
    return Cohort(dimension=dimension, guarantee=guarantee, name="joint", members=tuple(sorted(map(public, keys))), dropouts=dropouts,
                  colluders=colluders, **ids)  # fmt: skip


@dataclass
class Carrier:
    """An honest SuperLink over members in this process.  lost: who says nothing from a step on."""

    cohort: Cohort
    members: dict[bytes, Member]
    contribute: Callable[[bytes], list[int]]
    lost: dict[str, set[bytes]] = field(default_factory=dict)
    seen: list[bytes] = field(default_factory=list)  # all that went over the wire
    adverts: tuple[bytes, ...] = ()
    masked: tuple[bytes, ...] = ()
    agreed: tuple[bytes, ...] = ()
    revealed: tuple[bytes, ...] = ()

    def there(self, step: str) -> list[bytes]:
        steps = ("advertise", "share", "mask", "agree", "reveal")
        gone = set().union(*(self.lost.get(earlier, set()) for earlier in steps[: steps.index(step) + 1]))
        return [member for member in self.members if member not in gone]

    def take(self, messages) -> tuple[bytes, ...]:
        messages = tuple(messages)
        self.seen += messages
        return messages

    def boxes(self) -> dict[bytes, list[bytes]]:
        """Let members advertise and deal; return what each is sent for the next step."""
        self.adverts = self.take(self.members[one].advertise() for one in self.there("advertise"))
        dealt = self.take(self.members[one].share(self.adverts) for one in self.there("share"))
        roster = Roster.of(self.cohort, self.adverts)
        boxes: dict[bytes, list[bytes]] = {member: [] for member in self.members}
        for message in dealt:
            dealer, of_others = boxes_in(roster, message)
            for other, box in of_others.items():
                boxes[other].append(dealer + box)
        return boxes

    def until_masked(self) -> None:
        boxes = self.boxes()
        self.masked = self.take(self.members[one].mask(boxes[one], lambda one=one: self.contribute(one)) for one in self.there("mask"))

    def transcript(self) -> Transcript:
        self.until_masked()
        self.agreed = self.take(self.members[one].agree(self.masked) for one in self.there("agree"))
        self.revealed = self.take(self.members[one].reveal(self.agreed) for one in self.there("reveal"))
        return Transcript(self.adverts, self.masked, self.agreed, self.revealed)


def carrier_of(keys, contribute, lost=None, member_type=Member, **how) -> Carrier:
    cohort = cohort_of(keys, **how)
    return Carrier(cohort, {public(key): member_type(cohort, key) for key in keys}, contribute, lost or {})


def sealed_by(result: Aggregate, keys) -> CohortSeal:
    return sealed(result, [cosign(result, key) for key in keys if public(key) in result.survivors])


def release_from(carrier: Carrier, keys):
    """Return the release of an honest round and the key of the survivor who publishes it."""
    from protocol.cohort_round import joint_release

    result = aggregate(carrier.cohort, carrier.transcript())
    publisher = next(key for key in keys if public(key) == result.survivors[0])
    return joint_release(result, sealed_by(result, keys), public(publisher), 1, b"", ALWAYS), publisher
