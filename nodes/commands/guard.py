"""The guard as a process: `node up`, its journal: `node log`, its policy: `node policy`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nodes.commands.options import (
    Base,
    EpsilonAdapter,
    Home,
    Json,
    Map,
    MaybeMarket,
    Population,
    Quiet,
    Unit,
    population_name,
    recipe_of,
    show,
    unit_in,
)
from protocol.errors import UsageError

if TYPE_CHECKING:
    from nodes.policy import OwnerPolicy

WATCH_S = 0.2  # between two looks at whether the guard's worker lives


def node_up(
    home: Home,
    data: Annotated[Path, typer.Option("--data", help="Your records: JSONL with prompt and response, or text.")],
    socket: Annotated[
        Path | None, typer.Option("--socket", help="Where the guard listens.", show_default="guard/socket below --home")
    ] = None,
    socket_group: Annotated[str | None, typer.Option("--socket-group", help="Group (name or number) that may ask the guard.")] = None,
    policy_file: Annotated[
        Path | None,
        typer.Option("--policy", metavar="FILE", help="Your limits (TOML); `node policy` shows one.", show_default="the options"),
    ] = None,
    slot: Annotated[
        float, typer.Option("--slot", min=0.0, help="Without --policy: seconds between the moments at which a release may become visible.")
    ] = 1.0,
    flower: Annotated[
        str | None, typer.Option("--flower", metavar="HOST:PORT", help="Also run a SuperNode that dials this SuperLink.")
    ] = None,
    market: MaybeMarket = None,
    ca: Annotated[
        Path | None, typer.Option("--ca", envvar="VEILMART_CA", help="Certificate authority of the SuperLink and the market.")
    ] = None,
    app_user: Annotated[
        str | None, typer.Option("--app-user", help="User (name or number) under which bundles run, in a sandbox; needs root.")
    ] = None,
    unisolated: Annotated[
        bool, typer.Option("--unisolated", help="Run bundles as yourself: whoever runs the SuperLink can then read your data.")
    ] = False,
    budget: Annotated[float, typer.Option("--budget", help="Epsilon of everything that this population releases in its life.")] = 4.0,
    delta: Annotated[float, typer.Option("--delta", help="Delta of each guarantee.")] = 1e-6,
    largest_epsilon: Annotated[float, typer.Option("--largest-epsilon", help="Of one release.")] = 2.0,
    name: Annotated[str | None, typer.Option("--name", help="Public name of the learnware.", show_default="the data file's name")] = None,
    population: Population = "default",
    unit: Unit = None,
    epsilon_adapter: EpsilonAdapter = "none",
    no_train: Annotated[bool, typer.Option("--no-train", help="Specifications alone, no adapter.")] = False,
    which_map: Map = "kme-lin-96",
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Run the guard of a data file until it is interrupted; with --flower, the SuperNode beside it.

    Where the policy has a table [relay] it answers questions that come through the market, over a line that it dials out.

    Example: veilmart node up --data notes.jsonl --flower market.example:443 --ca ca.crt --app-user veilmart-app
    """
    import logging
    import signal
    import sys
    import threading

    from nodes import console
    from nodes.guard import Guard
    from nodes.guard_service import Desk, serving
    from nodes.guard_worker import Worker
    from nodes.journal import Journal
    from nodes.ledger import Ledger, in_use
    from nodes.owner import Owner
    from nodes.policy import AdapterRelease
    from nodes.populations import folder_of
    from nodes.supernode import AppUser, places_of, supernode, supernode_key
    from protocol.errors import VeilmartError

    if flower is not None:
        if ca is None:
            raise UsageError("node up: --flower needs --ca", hint="the operator hands out ca.crt")
        if (app_user is None) != unisolated:
            raise UsageError(
                "node up: --flower needs --app-user, or --unisolated and your trust in whoever runs the SuperLink",
                hint="docs/deploy/README.md shows both",
            )
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    options = _Options(budget, delta, largest_epsilon, population_name(population), unit, epsilon_adapter, no_train, slot)
    owner_policy = options.policy(home) if policy_file is None else _from_file(policy_file, options)
    limits, rules = owner_policy.limits, owner_policy.relay
    if rules is not None and (market is None or ca is None):
        raise UsageError("node up: [relay] in the policy needs --market and --ca", hint="or `veilmart node join` a market once")
    folder = folder_of(home, limits.population)
    user = AppUser.parse(app_user) if app_user is not None else None
    group = _group_of(socket_group) if socket_group is not None else user.gid if user is not None else None
    hide = [*places_of(data), Path.home()] if user is not None else []  # the command's own folders and the records
    path = (socket or home / "guard" / "socket").resolve()
    recipe = recipe_of(owner_policy.adapter_epsilon, owner_policy.adapter is AdapterRelease.NONE, limits.budget.delta)
    owner = Owner(data, home=home, name=name, policy=limits, recipe=recipe, feature_map=which_map, base=base, cohort=owner_policy.cohort)

    def make() -> Guard:  # in the worker: only there lie records, key and model
        return owner.guard

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with ExitStack() as stack:
        stack.enter_context(in_use(folder))
        journal = Journal(folder / "journal.jsonl")
        stack.callback(journal.close)
        worker = Worker(make, rules)  # before any thread: it is forked
        stack.callback(worker.close)
        owner_policy.require_accepted(which_map, worker.map_id, worker.base_model)
        ledger = Ledger.open(folder / "ledger.db", limits.budget, limits.population, limits.unit)
        desk = Desk(
            journal, owner_policy.service, ledger.released, worker.hand_over,
            schedule=owner_policy.schedule, delta=limits.budget.delta,
            take_part=worker.take_part if owner_policy.cohort is not None else None,
        )  # fmt: skip
        worker.listen(desk.outcome)
        desk.resume()
        stack.enter_context(serving(desk, path, owner_policy.service, group))
        if rules is not None and market is not None and ca is not None:
            from nodes.membership import Membership
            from nodes.relay import RelayLine

            membership = Membership(folder, bytes.fromhex(worker.owner), worker.prove)
            stack.enter_context(RelayLine(market, ca.resolve(), home, desk.collect, worker, rules, membership=membership))
        if flower is not None and ca is not None:
            stack.enter_context(supernode(home, flower, ca.resolve(), f"unix:{path}", app_user=user, hide=hide))
        ready = {
            "schema": "veilmart.node/1", "socket": str(path), "owner": worker.owner, "superlink": flower or "",
            "supernode_key": supernode_key(home) if flower is not None else "", "isolated": user is not None,
            "population": limits.population, "slot_s": owner_policy.service.slot_s, "relay": (market or "") if rules is not None else "",
        }  # fmt: skip
        if as_json:
            import json

            console.print_lines(json.dumps(ready))
        else:
            console.print_lines(f"guard of {data.name} at {path}" + (f", SuperNode of {flower}" if flower else ""))
        sys.stdout.flush()
        while not stop.wait(WATCH_S):
            if not worker.alive:
                raise VeilmartError(
                    "guard: the process that holds the data ended",
                    hint="start it again: what was accepted is in the journal, and is served then",
                )


def _group_of(text: str) -> int:
    import grp

    if text.isdecimal():
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise UsageError(f"--socket-group: there is no group {text!r}") from None


@dataclass(frozen=True, slots=True)
class _Options:
    """What the command line says instead of a policy file."""

    budget: float = 4.0
    delta: float = 1e-6
    largest_epsilon: float = 2.0
    population: str = "default"
    unit: str | None = None
    epsilon_adapter: str = "none"
    no_train: bool = False
    slot: float = 1.0

    def policy(self, home: Path) -> OwnerPolicy:
        from nodes.guard import Policy
        from nodes.ledger import Budget
        from nodes.policy import AdapterRelease, OwnerPolicy, Service
        from nodes.populations import folder_of

        unit = unit_in(self.unit, folder_of(home, self.population))
        limits = Policy(Budget(self.budget, self.delta), largest_epsilon=self.largest_epsilon, population=self.population, unit=unit)
        adapter = AdapterRelease.NONE if self.no_train else AdapterRelease.RELAY
        return OwnerPolicy(limits, adapter=adapter, adapter_epsilon=self.epsilon_adapter, service=Service(slot_s=self.slot))


def _from_file(path: Path, options: _Options) -> OwnerPolicy:
    from nodes.policy import read_policy

    if options != _Options():
        raise UsageError(
            "node up: --policy with --budget, --delta, --largest-epsilon, --population, --unit, --epsilon-adapter, --no-train or --slot",
            hint=f"set these in {path}",
        )
    return read_policy(path)


def node_log(
    home: Home,
    population: Population = "default",
    contains: Annotated[
        str | None,
        typer.Option("--contains", metavar="HEAD", help="Also expect the line with this hash, which you kept from an earlier look."),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show what was asked of the guard and what became of it, after verifying the journal's chain.

    Example: veilmart node log --json
    """
    from nodes import console
    from nodes.journal import GENESIS, read
    from nodes.populations import folder_of
    from protocol.errors import LedgerDamaged, NotFound

    path = folder_of(home, population_name(population)) / "journal.jsonl"
    if not path.is_file():
        raise NotFound(f"{path}: no journal yet", hint="the first `veilmart node up` makes one")
    entries = read(path)
    if contains is not None and contains not in {entry.hash.hex() for entry in entries}:
        raise LedgerDamaged(f"journal: no line has the hash {contains[:16]}", hint="it was rewritten since, or this is another journal")
    head = entries[-1].hash.hex() if entries else GENESIS.hex()
    if as_json:
        rows = [{"number": e.number, "time": e.time, "event": e.event, **e.fields, "hash": e.hash.hex()} for e in entries]
        console.print_json({"schema": "veilmart.journal/1", "population": population, "entries": rows, "chain": "verified", "head": head})
        return
    if quiet:
        console.print_lines(*(e.hash.hex() for e in entries))
        return
    table = [
        [
            str(e.number),
            e.time,
            e.event,
            " ".join(f"{name}={str(value)[:16]}" for name, value in e.fields.items() if value),
            e.hash.hex()[:16],
        ]
        for e in entries
    ]
    console.print_table(["#", "time (UTC)", "event", "what", "hash"], table)
    console.print_lines(f"{len(entries)} lines, chain verified; head {head}")


def node_policy(
    file: Annotated[Path | None, typer.Argument(help="A policy to check; without one, a whole policy is printed to start from.")] = None,
    as_json: Json = False,
) -> None:
    """Check a policy file, or print one that has every key.

    Example: veilmart node policy > policy.toml
    """
    from nodes import console
    from nodes.policy import EXAMPLE, read_policy

    if file is None:
        if as_json:
            console.print_json({"schema": "veilmart.policy/1", "example": EXAMPLE})
        else:
            console.print_lines(EXAMPLE.rstrip())
        return
    policy = read_policy(file)
    limits, schedule = policy.limits, policy.schedule
    result = {
        "schema": "veilmart.policy/1", "population": limits.population, "unit": str(limits.unit), "maps": list(policy.maps),
        "base_models": list(policy.base_models), "epsilon_for_life": limits.budget.epsilon, "delta": limits.budget.delta,
        "largest_epsilon": limits.largest_epsilon, "smallest_epsilon": limits.smallest_epsilon, "minimum_units": limits.minimum_records,
        "valid_days": limits.valid_days,
        "adapter": str(policy.adapter), "epsilon_adapter": policy.adapter_epsilon,
        "largest_epsilon_adapter": limits.largest_adapter_epsilon, "slot_s": policy.service.slot_s,
        "orders_per_hour": policy.service.orders_per_hour,
        "relay": policy.relay and {
            "askers": sorted(key.hex() for key in policy.relay.askers), "questions_per_hour": policy.relay.questions_per_hour,
            "longest_question": policy.relay.longest_question, "most_tokens": policy.relay.most_tokens,
        },
        "cohort": policy.cohort and {
            "name": policy.cohort.name, "members": sorted(key.hex() for key in policy.cohort.members), "colluders": policy.cohort.colluders,
            "rounds": policy.cohort.rounds, "minimum_units": policy.cohort.minimum_units,
        },
        "schedule": schedule and {"first": schedule.first.isoformat(), "every_days": schedule.every.days, "epsilon": schedule.epsilon},
    }  # fmt: skip
    show(result, as_json, [f"{name:<24}{value}" for name, value in result.items() if name != "schema"])


COMMANDS = {"node up": node_up, "node log": node_log, "node policy": node_policy}
