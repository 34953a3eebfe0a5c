"""What an owner says about releases afterwards: `node withdraw`, `node rotate-key`."""

from __future__ import annotations

from pathlib import Path

from nodes.commands.options import Authority, Home, Json, Learnware, Map, MarketAddress, Population, population_name, show
from protocol.errors import NotFound, Unauthorised


def node_withdraw(
    home: Home,
    learnware: Learnware,
    market: MarketAddress,
    ca: Authority,
    population: Population = "default",
    which_map: Map = "kme-lin-96",
    as_json: Json = False,
) -> None:
    """Take a release of yours back: it is chosen no more, and the market deletes its adapter.  Again it changes nothing.

    It cannot be undone, gives no budget back, and what others fetched before they have.

    Example: veilmart node withdraw notes@7c1f0a2b --market 127.0.0.1:7443 --ca ca.crt
    """
    from nodes.market_client import MarketClient, find_release_id
    from nodes.membership import Membership
    from nodes.populations import folder_of
    from nodes.succession import keys_before
    from protocol.features import open_map
    from protocol.keys import signing_key, write_durably
    from protocol.notices import Kind, Notice, sign_notice
    from protocol.release import open_envelope

    key_file: Path = folder_of(home, population_name(population)) / "owner.key"
    if not key_file.exists():
        raise NotFound(f"{key_file}: there is no key, so nothing was published from here", hint="--population names another one")
    key = signing_key(key_file)
    owner = key.public_key().public_bytes_raw()
    with MarketClient(market, ca, home, Membership.of(key_file.parent)) as client:
        feature_map = open_map(which_map)
        # Also one that was taken back before: the same command finishes what broke off.
        release_id = find_release_id(learnware, client.sync(feature_map), standing_alone=False)
        release = open_envelope(client.release(release_id))
        if release.owner not in (owner, *keys_before(key_file.parent, owner)):
            raise Unauthorised(f"{release.title}: it is of another owner", hint="--population names your other key")
        notice = sign_notice(Notice(Kind.WITHDRAWAL, client.describe().market_key, owner, (release_id,)), key)
        index = client.submit(notice)
    write_durably(kept := home / "receipts" / f"{release_id.hex()}.withdrawal", notice, 0o644)
    result = {
        "schema": "veilmart.withdraw/1", "release_id": release_id.hex(), "title": release.title, "index": index, "notice": str(kept),
    }  # fmt: skip
    lines = [
        f"{release.title}: withdrawn, notice {index} of this market",
        "it stays in the log, is chosen no more, and its adapter is deleted there; the budget it cost is spent",
    ]
    show(result, as_json, lines)


def node_rotate_key(
    home: Home,
    market: MarketAddress,
    ca: Authority,
    population: Population = "default",
    as_json: Json = False,
) -> None:
    """Go on under a new key: the old one signs the new one over, the market logs it, and the old one is deleted.

    Ledger, budget and the numbers of releases go on; releases under the old key stay yours.  Again it finishes what broke off.

    Example: veilmart node rotate-key --market 127.0.0.1:7443 --ca ca.crt
    """
    from nodes.ledger import in_use
    from nodes.market_client import MarketClient
    from nodes.membership import Membership
    from nodes.populations import folder_of
    from nodes.succession import begin_rotation, finish_rotation
    from protocol.enrolment import words_of

    folder = folder_of(home, population_name(population))
    with in_use(folder, alone=True):
        with MarketClient(market, ca, home) as client:
            notice, new = begin_rotation(folder, client.describe().market_key)
        with MarketClient(market, ca, home, Membership.of(folder)) as client:
            index = client.submit(notice)
        finish_rotation(folder, notice)
    result = {"schema": "veilmart.rotate-key/1", "owner": new.hex(), "owner_words": words_of(new), "index": index}
    lines = [
        f"you are now    {words_of(new)}    read it to the operator on the telephone",
        f"notice {index} of this market; other markets do not know this key yet",
    ]
    show(result, as_json, lines, then="node backup FILE --key FILE")  # a copy of the new key


COMMANDS = {"node withdraw": node_withdraw, "node rotate-key": node_rotate_key}
