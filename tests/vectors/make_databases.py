"""Write today's databases of a market as SQL text, each schema once: python -m tests.vectors.make_databases market-1.sql quotas-1.sql."""

import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import insert

from market_node.certificates import ISSUED
from market_node.members import Members
from market_node.quotas import Limits, Quota, Quotas
from market_node.store import Store
from protocol.catalogue import scalars_of
from protocol.notices import Kind, Notice, sign_notice
from protocol.release import open_envelope
from tests.protocol.worlds import ADAPTER, envelope_of, small_map


def fill(home: Path) -> None:
    """Put something into every table."""
    feature_map, keys, market = small_map(), [Ed25519PrivateKey.generate() for _ in range(5)], Ed25519PrivateKey.generate()
    owners = [key.public_key().public_bytes_raw() for key in keys]
    store, members, quotas = Store.open(home), Members.open(home), Quotas.open(home, Limits())
    store.require_map(feature_map)
    for number, key in enumerate(keys):
        envelope = envelope_of(feature_map, key, seed=number, adapter=ADAPTER if number % 2 else None)
        release = open_envelope(envelope)
        store.append(release, envelope, scalars_of(release, feature_map))
        quotas.charge(owners[number], Quota.RELEASES, 1, 1_800_000_000 + number)
        members.enrol(members.invite(f"clinic {number}", 1_900_000_000), owners[number], "11" * 32 if number else "", 1_800_000_000)
    members.invite("nobody yet", 1_900_000_000)
    members.remove(owners[4].hex(), 1_800_000_100)
    public = market.public_key().public_bytes_raw()
    withdrawal = Notice(Kind.WITHDRAWAL, public, owners[0], (release_id(store, 0),))
    rotation = Notice(Kind.ROTATION, public, owners[1], (Ed25519PrivateKey.generate().public_key().public_bytes_raw(),))
    for notice, key in ((withdrawal, keys[0]), (rotation, keys[1])):
        store.append_notice(notice, sign_notice(notice, key))
    store.keep_cosigned("witness.example", 5, b"a note of a witness")
    issued = {"serial": "4a5b6c7d", "name": f"veilmart://node/{owners[2].hex()}", "key_digest": bytes(32), "issued": 1_800_000_000}
    with store._writing.begin() as db:  # an authority's list, here without its authority
        db.execute(insert(ISSUED).values(**issued, ends=1_807_776_000))
    for part in (store, members, quotas):
        part.close()


def release_id(store: Store, position: int) -> bytes:
    return open_envelope(store.envelopes(position, position + 1)[0]).release_id


def main(*targets: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        for name, target in zip(("market.db", "quotas.db"), targets, strict=True):
            with closing(sqlite3.connect(Path(folder) / name)) as db:
                (Path(__file__).parent / target).write_text("".join(f"{line}\n" for line in db.iterdump()))


if __name__ == "__main__":
    main(*sys.argv[1:])
