"""Campaigns on the command line: `campaign run`, `campaign list`, `campaign show`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from market_node.options import Home, Json, Quiet
from protocol import console
from protocol.errors import CampaignFailed, MarketUnreachable, UsageError

if TYPE_CHECKING:
    from market_node.campaigns import CohortPlan


def campaign_run(
    home: Home,
    market: Annotated[
        str | None, typer.Option("--market", envvar="VEILMART_MARKET", metavar="HOST:PORT", help="Address of the market.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option("--ca", envvar="VEILMART_CA", help="The market's certificate authority.", show_default="this market's")
    ] = None,
    node: Annotated[
        list[str] | None, typer.Option("--node", help="Name of a registered node; repeatable.", show_default="all registered")
    ] = None,
    epsilon: Annotated[float, typer.Option("--epsilon-spec", help="Epsilon to ask for; each owner's policy decides.")] = 1.0,
    delta: Annotated[float, typer.Option("--delta", help="Delta to ask for.")] = 1e-6,
    epsilon_adapter: Annotated[
        float | None,
        typer.Option("--epsilon-adapter", min=0.0, help="Largest epsilon of an adapter.", show_default="as each owner's policy makes it"),
    ] = None,
    cohort: Annotated[
        str | None, typer.Option("--cohort", metavar="NAME", help="Let the nodes release one specification of this name together.")
    ] = None,
    dropouts: Annotated[int, typer.Option("--dropouts", min=0, help="With --cohort: nodes that may go missing.")] = 0,
    colluders: Annotated[int, typer.Option("--colluders", min=0, help="With --cohort: nodes that may tell others what they know.")] = 1,
    which_map: Annotated[str, typer.Option("--map", envvar="VEILMART_MAP", help="With --cohort: the market's feature map.")] = "kme-lin-96",
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds after which open nodes are missing.")] = 600.0,
    at_least: Annotated[int, typer.Option("--at-least", min=0, help="Fail with fewer published releases than this.")] = 1,
    resume: Annotated[str | None, typer.Option("--resume", metavar="ID", help="Go on with a campaign: only open nodes are asked.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Ask nodes for a release, collect what they send and publish it; every node gets a line in the account.

    Example: veilmart campaign run --market 127.0.0.1:7443 --node clinic-a --node clinic-b --timeout 900
    """
    from market_node.campaigns import Campaign, Plan, asked_of, campaigns_of, drive
    from market_node.superlink import address, registered
    from protocol.keys import signing_key

    market_home = home / "market"
    if not address(market_home):
        raise MarketUnreachable("campaign run: no SuperLink runs on this folder", hint="start it with `veilmart market up --flower`")
    if resume is not None:
        campaign = Campaign.open(campaigns_of(market_home) / _id(resume))
    else:
        if market is None:
            raise UsageError("campaign run: expected --market", hint="`veilmart market up` prints it")
        nodes = registered(market_home)
        missing = set(node or ()) - {known.name for known in nodes}
        if missing:
            raise UsageError(
                f"--node: no node named {', '.join(sorted(missing))} is registered",
                hint=f"registered: {', '.join(known.name for known in nodes) or 'none'}",
            )
        chosen = [known for known in nodes if not node or known.name in node]
        if not chosen:
            raise UsageError("campaign run: no node is registered", hint="`veilmart market invite` prints what a node needs to join")
        key = "" if ca is not None else signing_key(market_home / "market.key").public_key().public_bytes_raw().hex()  # our own market's
        authority = str((ca or market_home / "ca.crt").resolve())
        most = "" if epsilon_adapter is None else repr(epsilon_adapter)
        together = None if cohort is None else _together(cohort, which_map, len(chosen), dropouts, colluders)
        plan = Plan(market, authority, repr(epsilon), repr(delta), timeout, asked_of(chosen), key, most, together)
        campaign = Campaign.create(campaigns_of(market_home), plan)
    _renew_courier(market_home)
    progress = console.ProgressLine(not (as_json or quiet))
    if not (as_json or quiet):
        console.say(f"campaign {campaign.campaign_id}: submitting")
    try:
        account = drive(market_home, campaign, lambda done, of: progress("nodes", done, of))
    except CampaignFailed:
        progress.close()
        if as_json:
            console.print_json(campaign.account())
        raise
    progress.close()
    _show(account, as_json, quiet)
    counts = account["counts"]
    if counts["kept"]:
        raise MarketUnreachable(
            f"campaign {campaign.campaign_id}: {counts['kept']} envelopes are kept, the market did not answer",
            hint=f"`veilmart campaign run --resume {campaign.campaign_id}` publishes them; no node is asked again for them",
        )
    if counts["published"] < at_least:
        raise CampaignFailed(
            f"campaign {campaign.campaign_id}: expected at least {at_least} published releases, got {counts['published']}",
            hint=f"`veilmart campaign run --resume {campaign.campaign_id}` asks the open nodes again",
        )


def campaign_list(home: Home, quiet: Quiet = False, as_json: Json = False) -> None:
    """List campaigns, the oldest first.

    Example: veilmart campaign list
    """
    from market_node.campaigns import all_campaigns, campaigns_of

    accounts = [campaign.account() for campaign in all_campaigns(campaigns_of(home / "market"))]
    if as_json:
        rows = [{name: value for name, value in account.items() if name not in ("schema", "nodes")} for account in accounts]
        console.print_json({"schema": "veilmart.campaigns/1", "campaigns": rows})
        return
    if quiet:
        console.print_lines(*(account["campaign"] for account in accounts))
        return
    table = [
        [account["campaign"], account["state"], str(account["counts"]["published"]), str(len(account["nodes"])), account["cause"] or "-"]
        for account in accounts
    ]
    console.print_table(["campaign", "state", "published", "of", "cause"], table)


def campaign_show(
    home: Home,
    campaign_id: Annotated[str, typer.Argument(metavar="ID", help="Campaign, as `veilmart campaign list` prints it.")],
    as_json: Json = False,
) -> None:
    """Show what became of every node of a campaign.

    Example: veilmart campaign show 20260102-101500-a1b2c3
    """
    from market_node.campaigns import Campaign, campaigns_of

    _show(Campaign.open(campaigns_of(home / "market") / _id(campaign_id)).account(), as_json, quiet=False)


def _together(name: str, which_map: str, members: int, dropouts: int, colluders: int) -> CohortPlan:
    """Return the plan of a cohort; raise UsageError where so few nodes cannot keep its promise."""
    from market_node.campaigns import CohortPlan
    from protocol.cohort import Resilience
    from protocol.errors import FormatError
    from protocol.features import open_map

    try:
        Resilience(members, dropouts, colluders)
    except FormatError as error:
        raise UsageError(f"--cohort: {error}", hint="register more nodes, or make it for fewer --dropouts or --colluders") from None
    feature_map = open_map(which_map)
    return CohortPlan(name, feature_map.map_id.hex(), feature_map.base_model, feature_map.dimension, dropouts, colluders)


def _renew_courier(market_home: Path) -> None:
    """Have a good certificate lie there for the campaign, where this market issues any: a port for members asks for it."""
    import datetime

    from market_node.authority import KEY
    from market_node.certificates import courier
    from protocol.keys import signing_key

    if (market_home / KEY).exists():
        public = signing_key(market_home / "market.key").public_key().public_bytes_raw()
        courier(market_home, public, datetime.datetime.now(datetime.UTC))


def _id(text: str) -> str:
    if not text or not all(character.isalnum() or character == "-" for character in text):  # it becomes the name of a folder
        raise UsageError("campaign: expected an id such as 20260102-101500-a1b2c3", hint="`veilmart campaign list` names them")
    return text


def _show(account: dict[str, Any], as_json: bool, quiet: bool) -> None:
    if as_json:
        console.print_json(account)
        return
    if quiet:
        console.print_lines(account["campaign"])
        return
    console.print_lines(f"campaign {account['campaign']}  {account['state']}{': ' + account['cause'] if account['cause'] else ''}")
    rows = []
    for node in account["nodes"]:
        what = f"position {node['index']}" if node["outcome"] == "published" else node["reason"]
        rows.append([node["name"] or str(node["node_id"]), node["outcome"], node["release_id"][:16] or "-", what or "-"])
    console.print_table(["node", "outcome", "release", "what"], rows)


COMMANDS: dict[str, Callable[..., None]] = {"run": campaign_run, "list": campaign_list, "show": campaign_show}
