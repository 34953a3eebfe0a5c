"""The market's commands; only typer is imported at the top, so that `veilmart --help` stays fast."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from market_node import campaign_command, pki_command
from market_node.options import Authority, DatabaseUrl, Home, Json, MarketAddress, Quiet
from protocol import console

if TYPE_CHECKING:
    from market_node.backup import Backup
    from market_node.server import Started


def up(
    home: Home,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 picks a free one.")] = 7443,
    members_port: Annotated[
        int | None,
        typer.Option(
            "--members-port",
            min=0,
            max=65535,
            help="Take members' calls there alone, under certificates; 0 picks a free one.",
            show_default="taken on --port, by signature",
        ),
    ] = None,
    name: Annotated[list[str] | None, typer.Option("--name", help="Host name or address for the certificate; repeatable.")] = None,
    which_map: Annotated[
        str, typer.Option("--map", envvar="VEILMART_MAP", help="Feature map of this market: a name that ships with veilmart, or a file.")
    ] = "kme-lin-96",
    simulation: Annotated[bool, typer.Option("--simulation", help="Accept releases made with simulated noise.")] = False,
    everybody: Annotated[bool, typer.Option("--open", help="Let owners publish who are not enrolled; a simulation does.")] = False,
    largest_epsilon: Annotated[
        float | None, typer.Option("--largest-epsilon", help="Refuse specifications above it.", show_default="2; a simulation takes all")
    ] = None,
    delta: Annotated[
        float | None, typer.Option("--delta", help="Take specifications at this delta only.", show_default="1e-6; a simulation takes all")
    ] = None,
    smallest_count: Annotated[
        int | None,
        typer.Option("--smallest-count", help="Refuse noisy counts of units below it.", show_default="50; a simulation takes all"),
    ] = None,
    private_adapters: Annotated[
        bool, typer.Option("--require-private-adapters", help="Refuse releases with an adapter that was trained without a guarantee.")
    ] = False,
    largest_adapter_epsilon: Annotated[
        float | None,
        typer.Option("--largest-adapter-epsilon", help="Refuse adapters above it, and those without a guarantee.", show_default="any"),
    ] = None,
    flower: Annotated[bool, typer.Option("--flower", help="Run a Flower SuperLink beside the market, for campaigns.")] = False,
    flower_port: Annotated[int, typer.Option("--flower-port", min=0, max=65535, help="Its port on loopback; 0 picks a free one.")] = 7444,
    fleet: Annotated[
        str, typer.Option("--fleet", metavar="HOST:PORT", help="Where SuperNodes connect: the proxy in front of the SuperLink.")
    ] = "",
    witness: Annotated[
        list[str] | None, typer.Option("--witness", metavar="KEY", help="A witness that may sign checkpoints of this market; repeatable.")
    ] = None,
    releases_a_day: Annotated[
        int | None,
        typer.Option("--releases-a-day", min=0, help="Of one owner; 0 for any number.", show_default="100; a simulation takes any number"),
    ] = None,
    adapter_mb_a_day: Annotated[
        int | None,
        typer.Option(
            "--adapter-mb-a-day",
            min=0,
            help="Megabytes of adapters of one owner; 0 for any number.",
            show_default="1024; a simulation takes any number",
        ),
    ] = None,
    metrics: Annotated[
        str, typer.Option("--metrics", metavar="[HOST:]PORT", help="Let Prometheus read counts on loopback; 0 picks a free port.")
    ] = "",
    page: Annotated[
        str, typer.Option("--page", metavar="[HOST:]PORT", help="Where a process of its own serves the market's page; 0 picks a free port.")
    ] = "7480",
    no_page: Annotated[bool, typer.Option("--no-page", help="Serve no page.")] = False,
    database: DatabaseUrl = "",
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=0,
            max=256,
            help="Processes that answer queries; 0 answers in the market's own.",
            show_default="one a core, once the catalogue is large",
        ),
    ] = None,
    ray: Annotated[
        str, typer.Option("--ray", metavar="ADDRESS", help="Have queries answered on this Ray cluster, which sees them encrypted.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line when ready.")] = False,
) -> None:
    """Run a market until it is interrupted.

    Example: veilmart market up --port 7443 --members-port 7445
    """
    import os

    # gRPC would write a line for every handshake that fails, of whoever knocks, past the list of events.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from market_node.quotas import UNLIMITED, Limits
    from market_node.server import run
    from protocol.admission import LENIENT, AdmissionPolicy
    from protocol.features import open_map
    from protocol.privacy import MAX_EPSILON
    from protocol.witness import Witness

    default = LENIENT if simulation else AdmissionPolicy()
    policy = AdmissionPolicy(
        default.largest_epsilon if largest_epsilon is None else largest_epsilon,
        default.delta if delta is None else delta,
        default.smallest_count if smallest_count is None else smallest_count,
        MAX_EPSILON if private_adapters and largest_adapter_epsilon is None else largest_adapter_epsilon,
    )

    usual = UNLIMITED if simulation else Limits()
    limits = Limits(
        usual.releases if releases_a_day is None else releases_a_day,
        usual.adapter_bytes if adapter_mb_a_day is None else adapter_mb_a_day << 20,
    )

    def ready(started: Started) -> None:
        if as_json:
            value = {
                "schema": "veilmart.market/1", "address": started.address, "ca": str(started.ca), "market_key": started.market_key.hex(),
                "releases": started.releases, "simulation": simulation, "superlink": started.superlink, "members": started.members,
                "metrics": started.metrics, "page": started.page,
            }  # fmt: skip
            sys.stdout.write(json.dumps(value) + "\n")
        else:
            sys.stdout.write(
                f"market {started.address}  key {started.market_key.hex()[:16]}  {started.releases} releases\n"
                f"clients need  --market {started.address} --ca {started.ca}\n"
                + (f"members publish at {started.members}, under certificates: clients find it by themselves\n" if started.members else "")
                + (f"SuperLink {started.superlink}, on this machine only: docs/deploy/ has the proxy\n" if started.superlink else "")
                + (f"metrics http://{started.metrics}/metrics, on this machine only\n" if started.metrics else "")
                + (f"page {started.page}\n" if started.page else "")
            )
        sys.stdout.flush()

    witnesses = tuple(Witness.parse(key) for key in witness or ())
    market_home = home / "market"
    beside = None
    if flower:
        from market_node.superlink import superlink

        def beside() -> AbstractContextManager[str]:
            return superlink(market_home, market_home / "ca.crt", market_home / "server.crt", market_home / "server.key", port=flower_port)

    run(
        market_home, host, port, open_map(which_map), policy,
        simulation=simulation, names=tuple(name or ()), witnesses=witnesses, ready=ready, beside=beside,
        everybody=everybody or simulation, fleet=fleet, metrics=metrics, limits=limits, members_port=members_port,
        page="" if no_page else page, page_map=which_map, database=database, workers=workers, ray=ray,
    )  # fmt: skip


def web(
    home: Home,
    page: Annotated[str, typer.Option("--page", metavar="[HOST:]PORT", help="Where to serve; 0 picks a free port.")] = "7480",
    which_map: Annotated[
        str, typer.Option("--map", envvar="VEILMART_MAP", help="Feature map of this market: a name that ships with veilmart, or a file.")
    ] = "kme-lin-96",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line when ready.")] = False,
) -> None:
    """Serve the page of the market in this folder until it is interrupted; its database is read, never written.

    `market up` does this by itself.  Alone it serves a market that runs with --no-page, or a backup.

    Example: veilmart market web --page 7480
    """
    from market_node.page import serving

    def ready(address: str) -> None:
        sys.stdout.write(json.dumps({"schema": "veilmart.web/1", "page": address}) + "\n" if as_json else f"page {address}\n")
        sys.stdout.flush()

    serving.serve(home / "market", page, which_map, market_key=None, ready=ready)


def invite(
    home: Home,
    org: Annotated[str, typer.Option("--org", help="The organisation that is invited.")],
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="HOST:PORT", help="How it reaches this market.", show_default="as started last"),
    ] = None,
    days: Annotated[float, typer.Option("--days", min=0.001, max=90, help="Days until it ends.")] = 7.0,
    owners_per_org: Annotated[
        int, typer.Option("--owners-per-org", min=1, help="Refuse one more for an organisation with so many members and open invites.")
    ] = 20,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write it to a file, mode 0600.", show_default="standard output")] = None,
    as_json: Json = False,
) -> None:
    """Make an invite: one line, for one owner, once.  Whoever has it can become a member, so hand it over as you would a password.

    Example: veilmart market invite --org "City Hospital" -o city.invite
    """
    import datetime
    import time

    from market_node.identity import market_identity
    from market_node.members import Members
    from market_node.server import ADDRESS
    from protocol.enrolment import Invite, words_of
    from protocol.errors import UsageError
    from protocol.keys import write_durably

    market_home = home / "market"
    if not (market_home / "market.key").is_file():
        raise UsageError(f"{market_home}: no market here yet", hint="`veilmart market up` makes one")
    if address is None:
        if not (market_home / ADDRESS).is_file():
            hint = 'HOST:PORT as the organisation reaches it; a market that has said "market HOST:PORT" once is known here'
            raise UsageError("market invite: expected --address, since this market was not up yet", hint=hint)
        address = (market_home / ADDRESS).read_text().strip()
        if address.startswith(("0.0.0.0:", "[::]:")):  # where this market listens, and where nobody else finds it
            hint = "HOST:PORT as the organisation reaches this market"
            raise UsageError(f"market invite: expected --address, since the market listens at {address}", hint=hint)
    # The certificates that are there are read: this may run beside the market, which alone renews them.
    identity = market_identity(market_home, (), datetime.datetime.now(datetime.UTC), renew=False)
    members = Members.open(market_home)
    expires = int(time.time() + 86_400 * days)
    try:
        secret = members.invite(org, expires, owners_per_org, int(time.time()))
    finally:
        members.close()
    market_key = identity.market_key.public_key().public_bytes_raw()
    line = str(Invite(address, org, expires, market_key, secret, identity.ca_file.read_bytes()))
    if out is not None:
        write_durably(out, f"{line}\n".encode())
    result = {
        "schema": "veilmart.invite/1", "organisation": org, "address": address, "expires": expires, "market_words": words_of(market_key),
        "file": str(out) if out else None, "invite": None if out else line,
    }  # fmt: skip
    console.show(result, as_json, [str(out) if out else line])
    if not as_json:
        until = f"{datetime.datetime.fromtimestamp(expires):%Y-%m-%d %H:%M}"
        console.say(f"for {org}, once, until {until}; this market is {words_of(market_key)}")
        console.say(f"there: veilmart node join {address} --invite {f'file:{out.name}' if out else '-'}")


def members(
    home: Home,
    remove: Annotated[str | None, typer.Option("--remove", metavar="HEX", help="Let this owner publish no more (first digits).")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List who may publish, with the words that each owner reads out on the telephone.

    Example: veilmart market members
    """
    import datetime
    import time

    from market_node.members import Members
    from market_node.superlink import forget_supernode
    from protocol.enrolment import words_of

    found = Members.open(home / "market")
    try:
        if remove is not None:
            forget_supernode(home / "market", found.remove(remove.lower(), int(time.time())).owner)
        everyone = found.all()
    finally:
        found.close()
    rows = [
        {
            "owner": member.owner.hex(), "words": words_of(member.owner), "organisation": member.organisation, "node": member.node_name,
            "joined": member.joined, "removed": member.removed,
        }
        for member in everyone
    ]  # fmt: skip
    if as_json:
        console.print_json({"schema": "veilmart.members/1", "members": rows})
        return
    if quiet:
        console.print_lines(*(member.owner.hex() for member in everyone))
        return
    table = [
        [
            member.owner.hex()[:16], words_of(member.owner), member.organisation,
            f"{datetime.datetime.fromtimestamp(member.joined, datetime.UTC):%Y-%m-%d}", "member" if member.removed is None else "REMOVED",
        ]
        for member in everyone
    ]  # fmt: skip
    console.print_table(["owner", "words", "organisation", "since", "state"], table)
    if not rows:
        console.say("nobody is enrolled: `veilmart market invite`")


def health(
    home: Home,
    market: Annotated[
        str | None,
        typer.Option("--market", envvar="VEILMART_MARKET", metavar="HOST:PORT", help="Address.", show_default="the market of this folder"),
    ] = None,
    ca: Annotated[Path | None, typer.Option("--ca", envvar="VEILMART_CA", help="Its certificate authority (ca.crt).")] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, max=60, help="Seconds to wait.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Ask a market whether it serves.  Exit code 0 if it does, 6 if it does not answer or is stopping.

    Example: veilmart market health
    """
    from market_node.server import ADDRESS
    from protocol.errors import UsageError
    from protocol.health import require_serving

    if market is None:
        if not (home / "market" / ADDRESS).is_file():
            raise UsageError(f"{home / 'market'}: no market was started here", hint="--market and --ca name another one")
        market, ca = (home / "market" / ADDRESS).read_text().strip(), ca or home / "market" / "ca.crt"
        for everywhere, here in (("0.0.0.0:", "127.0.0.1:"), ("[::]:", "[::1]:")):
            market = here + market.removeprefix(everywhere) if market.startswith(everywhere) else market
    if ca is None:
        raise UsageError("market health: expected --ca", hint="`veilmart market up` prints the path of its certificate")
    milliseconds = round(1e3 * require_serving(market, ca, timeout).seconds, 1)
    result = {"schema": "veilmart.health/1", "address": market, "serving": True, "milliseconds": milliseconds}
    console.show(result, as_json, [f"market {market} serves, {milliseconds} ms"])


def revoke(
    home: Home,
    owner: Annotated[str, typer.Argument(metavar="HEX", help="First digits, at least 8, of the owner's key.")],
    as_json: Json = False,
) -> None:
    """Take back all releases of an owner and take none any more; logged, and it cannot be undone.  The market may go on serving.

    `members --remove` lets an owner publish no more, and leaves what it published.

    Example: veilmart market revoke 7c1f0a2b
    """
    import datetime
    import time

    from market_node.identity import market_identity
    from market_node.members import Members
    from market_node.store import Store
    from market_node.superlink import forget_supernode
    from protocol.errors import NotFound
    from protocol.notices import Kind, Notice, open_notice, sign_notice

    market_home, digits = home / "market", owner.lower()
    store, enrolled = Store.beside(market_home), Members.open(market_home)
    try:
        everyone = {*store.owners(), *(member.owner for member in enrolled.all())}
        hits = [key for key in everyone if len(digits) >= 8 and key.hex().startswith(digits)]
        if len(hits) != 1:
            raise NotFound(f"owner {digits}: expected the first digits, at least 8, of one owner's key", hint="`veilmart market members`")
        (key,) = hits
        line = store.line_of(key)
        key = line[-1]
        if any(member.owner == key and member.removed is None for member in enrolled.all()):
            forget_supernode(market_home, enrolled.remove(key.hex(), int(time.time())).owner)
        market_key = market_identity(market_home, (), datetime.datetime.now(datetime.UTC), renew=False).market_key
        public = market_key.public_key().public_bytes_raw()
        # A release that comes in between is not named: the notice is there by then, so it is refused, or the same command again names it.
        data = sign_notice(Notice(Kind.REVOCATION, public, key, tuple(sorted(store.releases_of(line)))), market_key)
        index, _ = store.append_notice(notice := open_notice(data, public), data)
    finally:
        enrolled.close()
        store.close()
    result = {"schema": "veilmart.revoke/1", "owner": key.hex(), "releases": [one.hex() for one in notice.subjects], "index": index}
    console.show(result, as_json, [f"{key.hex()[:16]}: revoked with {len(notice.subjects)} releases, notice {index}"])


def witness(
    home: Home,
    market: MarketAddress,
    ca: Authority,
    name: Annotated[str, typer.Option("--name", help="How this witness is called in its signatures.")],
    every: Annotated[float, typer.Option("--every", min=1, help="Seconds between two looks.")] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    show_key: Annotated[bool, typer.Option("--show-key", help="Print the verifier key alone; the market is not asked.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line for each look.")] = False,
) -> None:
    """Sign the checkpoints of somebody else's market, after checking that its log only grew.  Exit code 7 if it did not.

    The market names this witness with `market up --witness KEY`, whoever trusts it with `catalogue trust KEY`.

    Example: veilmart market witness --market 127.0.0.1:7443 --ca ca.crt --name witness.example --once
    """
    import signal
    import threading

    from market_node.witness import Observed, WitnessOf

    of = WitnessOf(market, ca, home / "witness", name)
    if show_key:
        console.show({"schema": "veilmart.witness-key/1", "key": str(of.witness)}, as_json, [str(of.witness)])
        return

    def tell(seen: Observed | Exception) -> None:
        if isinstance(seen, Exception):
            console.say(f"{seen}; looking again")
        elif as_json:
            line = {
                "schema": "veilmart.witness/1", "key": str(of.witness), "origin": seen.checkpoint.origin, "size": seen.checkpoint.size,
                "root": seen.checkpoint.root.hex(), "news": seen.news,
            }  # fmt: skip
            console.print_json(line, indent=None)
        elif seen.news or once:
            console.print_lines(f"signed {seen.checkpoint.size} releases, {seen.news} new, root {seen.checkpoint.root.hex()[:16]}")

    if not as_json:
        console.print_lines(f"witness {of.witness}")
    if once:
        tell(of.observe())
        return
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    of.run(every, stop, tell)


def backup(
    home: Home,
    folder: Annotated[Path, typer.Argument(help="New folder to write.")],
    keys: Annotated[bool, typer.Option("--keys", help="Also copy the market's keys: whoever has them can be this market.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a market, which may go on serving, and check the copy release by release.

    Example: veilmart market backup market-2026
    """
    from market_node.backup import back_up

    progress = console.ProgressLine(not as_json)
    found = back_up(home / "market", folder, keys=keys, on_progress=progress)
    progress.close()
    _tell(found, folder, "veilmart.market-backup/1", as_json)


def restore(
    home: Home,
    folder: Annotated[Path, typer.Argument(help="A backup of `veilmart market backup`.")],
    database: DatabaseUrl = "",
    as_json: Json = False,
) -> None:
    """Put a backup where no market is.  One that is older than what this market signed is not served.

    Example: veilmart market restore market-2026
    """
    from market_node.backup import restore

    progress = console.ProgressLine(not as_json)
    found = restore(folder, home / "market", database=database, on_progress=progress)
    progress.close()
    _tell(found, folder, "veilmart.market-restore/1", as_json)


def _tell(found: Backup, folder: Path, schema: str, as_json: bool) -> None:
    size, root = (found.checkpoint.size, found.checkpoint.root.hex()) if found.checkpoint else (0, None)
    result = {
        "schema": schema, "folder": str(folder), "releases": size, "root": root, "adapters": found.adapters,
        "campaigns": found.campaigns, "keys": found.keys,
    }  # fmt: skip
    kept = "the market's keys are in it: keep it secret" if found.keys else "no key is in it: keep market.key and ca.key elsewhere"
    lines = [f"{folder}: {size} releases, {found.adapters} adapters, {found.campaigns} campaigns, all verified; {kept}"]
    console.show(result, as_json, lines)


def register(app: typer.Typer) -> None:
    """Add the market's commands."""
    group = typer.Typer(help="Run a market.", no_args_is_help=True)
    group.callback()(_group)
    group.command("up")(up)
    group.command("web")(web)
    group.command("invite")(invite)
    group.command("members")(members)
    group.command("health")(health)
    group.command("revoke")(revoke)
    group.command("witness")(witness)
    group.command("backup")(backup)
    group.command("restore")(restore)
    app.add_typer(group, name="market")
    keys = typer.Typer(help="A market's authority and certificates.", no_args_is_help=True)
    for name, function in pki_command.COMMANDS.items():
        keys.command(name)(function)
    app.add_typer(keys, name="pki")
    campaigns = typer.Typer(help="Ask nodes for releases, and publish what they send.", no_args_is_help=True)
    for name, function in campaign_command.COMMANDS.items():
        campaigns.command(name)(function)
    app.add_typer(campaigns, name="campaign")


def _group() -> None:
    """Let a group be a group."""
