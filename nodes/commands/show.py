"""What a market says of one release: `show`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nodes.commands.options import Authority, Home, Json, Learnware, Map, MarketAddress, show

if TYPE_CHECKING:
    from protocol.release import Release


def show_release(
    home: Home,
    learnware: Learnware,
    market: MarketAddress,
    ca: Authority,
    which_map: Map = "kme-lin-96",
    as_json: Json = False,
) -> None:
    """Show what is public about a release: both guarantees, how many units, licence, base model.  The market does not learn which one.

    All of it is in the signed catalogue, which is fetched whole. --epsilon-at-most, --licence and so on of `find` go by the same.
    Who signed the release is known where the release is here: pulled, or with all others by `find --mirror`.

    Example: veilmart show notes@7c1f0a2b --market 127.0.0.1:7443 --ca ca.crt
    """
    from nodes.market_client import MarketClient, find_release_id
    from protocol.features import open_map
    from protocol.release import open_envelope

    feature_map = open_map(which_map)
    with MarketClient(market, ca, home) as client:
        catalogue = client.sync(feature_map)
        release_id = find_release_id(learnware, catalogue, standing_alone=False)
        organisations, description = client.organisations(catalogue.head), client.describe()
        position, pulled = catalogue.release_ids.index(release_id), home / "learnwares" / release_id.hex()
        here = str(pulled) if (pulled / "release").is_file() else None
        release = open_envelope((pulled / "release").read_bytes()) if here else client.kept_release(description, position, release_id)
    terms, columns, title = catalogue.terms_of(position), catalogue.columns(1), catalogue.card(position).title
    guarantee, units, std = terms.guarantee, float(columns.counts[position]), float(columns.count_stds[position])
    holds = terms.window.holds(client.today())
    stands = release_id not in catalogue.gone
    organisation = organisations.names[organisations.numbers[position]] or None
    result = {
        "schema": "veilmart.show/1", "release_id": release_id.hex(), "title": title, "position": position, "stands": stands,
        "holds": holds, **terms.window.dates,
        "organisation": organisation, "signers": [signer.hex() for signer in release.signers] if release is not None else None,
        "witnesses": list(description.witnesses), "epsilon": guarantee.epsilon, "delta": guarantee.delta, "unit": str(guarantee.unit),
        "units_estimated": units, "units_std": std, "noise_std": terms.noise_variance**0.5, "adapter_size_class": terms.adapter_class,
        "adapter_guarantee": terms.adapter_guarantee or None, "licence": terms.licence or None, "base_model": terms.base_model.hex(),
        "map": feature_map.name, "pulled": here,
    }  # fmt: skip
    adapter = f"at most {terms.adapter_class} bytes; guarantee: {terms.adapter_guarantee}" if terms.adapter_class else "none is published"
    lines = [
        f"{title}  position {position} of {len(catalogue)}" + ("" if stands else "  TAKEN BACK: it is chosen no more"),
        f"holds          {terms.window}" + ("" if holds else "  NOT TODAY: it is not chosen"),
        f"id             {release_id.hex()}",
        f"organisation   {organisation or 'not named by the market'}",
        f"signed by      {signers_of(release)}",
        f"witnessed by   {', '.join(description.witnesses) or 'nobody whom you trust (`veilmart catalogue trust`)'}",
        f"specification  epsilon {guarantee.epsilon:g} at delta {guarantee.delta:g}, unit {guarantee.unit}, add-or-remove-one",
        f"made from      {units:.0f} ± {std:.0f} units, as the noise lets it be known",
        f"adapter        {adapter}",
        f"licence        {terms.licence or 'none is stated'}",
        f"base model     {terms.base_model.hex()[:16]}; map {feature_map.name}",
        *([f"pulled         {here}"] if here else []),
    ]
    show(
        result,
        as_json,
        lines,
        then=(f'ask -m {title} "..."' if here else f"pull {title}") if stands and holds and terms.adapter_class else "",
    )


def signers_of(release: Release | None) -> str:
    """Return who signed a release, in words; None for one that is not here."""
    if release is None:
        return "not known without the release, which is not here"
    keys = ", ".join(signer.hex()[:16] for signer in release.signers)
    return f"its owner {keys}" if release.cohort is None else f"{len(release.signers)} owners, who released it together: {keys}"


COMMANDS = {"show": show_release}
