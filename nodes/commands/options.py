"""The options that several commands share, and what every command does with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nodes.commands.completion import learnwares, markets
from nodes.home import default_home
from protocol.console import show as show  # every command needs it beside its options
from protocol.errors import UsageError

if TYPE_CHECKING:
    from nodes.finetune import Recipe
    from nodes.private_training import PrivateRecipe
    from protocol.privacy import PrivacyUnit


HOME_HELP = "Folder of models, keys, ledger and copies."
Home = Annotated[
    Path,
    typer.Option("--home", envvar="VEILMART_HOME", default_factory=default_home, help=HOME_HELP, show_default="the user's data folder"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print ids only, no progress.")]
Base = Annotated[Path | None, typer.Option("--base", help="Directory of the base model.", show_default="the imported one")]
Map = Annotated[str, typer.Option("--map", envvar="VEILMART_MAP", help="Feature map: a name that ships with veilmart, or a file.")]
_MARKET = typer.Option("--market", envvar="VEILMART_MARKET", metavar="HOST:PORT", help="Address of the market.", autocompletion=markets)
MarketAddress = Annotated[str, _MARKET]
MaybeMarket = Annotated[str | None, _MARKET]
Learnware = Annotated[str, typer.Argument(metavar="ID", help="NAME@HEX as `find` prints it, or the id.", autocompletion=learnwares)]
Authority = Annotated[Path, typer.Option("--ca", envvar="VEILMART_CA", help="The market's certificate authority (ca.crt).")]
MaybeAuthority = Annotated[Path | None, typer.Option("--ca", envvar="VEILMART_CA", help="The market's certificate authority (ca.crt).")]
Population = Annotated[
    str, typer.Option("--population", help="Whose data this is: one ledger for life, whatever file or model it is used for.")
]
Unit = Annotated[
    str | None,
    typer.Option(
        "--unit", help="What epsilon protects: 'record', or a field such as 'person'.", show_default="the ledger's; record if new"
    ),
]
EpsilonAdapter = Annotated[str, typer.Option("--epsilon-adapter", metavar="E|none", help="Epsilon of the adapter (DP-SGD).")]


def recipe_of(epsilon_adapter: str, no_train: bool, delta: float = 1e-6, held_out: float = 0.0) -> Recipe | PrivateRecipe | None:
    """Return how the adapter is trained, or None for a specification alone.

    held_out: share of the records on which training without a guarantee is checked; with one there is no such check.
    """
    from nodes.finetune import Recipe
    from nodes.private_training import PrivateRecipe
    from protocol.privacy import Guarantee

    if no_train:
        return None
    if epsilon_adapter == "none":
        return Recipe(held_out=held_out)
    try:
        epsilon = float(epsilon_adapter)
    except ValueError:
        raise UsageError("--epsilon-adapter: expected a number or 'none'", hint="a smaller one keeps less of the gain: try 8") from None
    return PrivateRecipe(Guarantee(epsilon, delta))


def population_name(name: str) -> str:
    """Return the name of a population; raise UsageError for one that could not be a folder."""
    from nodes.ledger import POPULATION

    if not POPULATION.fullmatch(name):  # it becomes the name of a folder
        raise UsageError("--population: expected 1 to 63 of a-z, 0-9, '.', '_', '-' beginning with a letter or digit")
    return name


def unit_in(text: str | None, folder: Path) -> PrivacyUnit:
    """Return the unit that was asked for; without one, that of the ledger in this folder."""
    from nodes.populations import unit_of
    from protocol.privacy import PrivacyUnit

    if text is None:
        return unit_of(folder)
    # "field:person" is how every command prints it; no field's name holds a colon
    return PrivacyUnit.parse(text) if text == "record" or text.startswith("field:") else PrivacyUnit(text)


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes; raise UsageError where there are none to read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
