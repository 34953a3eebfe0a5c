"""A federation on this machine: `sim`, `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nodes.commands.options import Base, EpsilonAdapter, Home, Json, Map, Quiet, recipe_of, show
from nodes.home import open_model


def sim(
    home: Home,
    data: Annotated[Path, typer.Option("--data", help="Folder of TASK/train.jsonl and TASK/test.jsonl.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the run.", show_default="a new one below --home")] = None,
    tasks: Annotated[str, typer.Option("--tasks", help="Owners, comma-separated.", show_default="all but the map's public tasks")] = "",
    unseen: Annotated[str, typer.Option("--unseen", help="Tasks that are asked for but owned by nobody, comma-separated.")] = "",
    records: Annotated[int | None, typer.Option("--records", min=1, help="At most so many training records an owner.")] = None,
    query_size: Annotated[int, typer.Option("--query-size", min=1, help="Texts a query.")] = 50,
    queries: Annotated[int, typer.Option("--queries", min=0, help="Queries a task and repeat.")] = 4,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Draw fresh noise and queries so often.")] = 1,
    epsilon_spec: Annotated[float, typer.Option("--epsilon-spec", help="Epsilon of each specification.")] = 1.0,
    epsilon_adapter: EpsilonAdapter = "none",
    delta: Annotated[float, typer.Option("--delta", help="Delta of each guarantee.")] = 1e-6,
    no_train: Annotated[bool, typer.Option("--no-train", help="Specifications alone.")] = False,
    test_records: Annotated[int, typer.Option("--test-records", min=0, help="Test records a task for losses; 0 for none.")] = 64,
    mirror: Annotated[bool, typer.Option("--mirror", help="Match on a local copy instead of by encrypted query.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Repeatable noise and queries; releases are stamped simulated.")] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=2, help="Owners.", show_default="one a task")] = None,
    mix: Annotated[str, typer.Option("--mix", help="What owners have: pure (one task), shards, or dirichlet:ALPHA.")] = "pure",
    engine: Annotated[
        str, typer.Option("--engine", help="What carries the messages: grid, in this process, or flower, its simulation engine (Ray).")
    ] = "grid",
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Owners at a time.", show_default="as cores and memory allow")
    ] = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="Folder of embeddings that later runs of --no-train take up.")] = None,
    other_base: Annotated[
        str | None, typer.Option("--other-base", metavar="DIR:COUNT", help="Another base model, and how many owners have it.")
    ] = None,
    which_map: Map = "kme-lin-96",
    base: Base = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Simulate a federation on this machine: real guards, campaign, market process and queries.

    A run that was killed goes on when the same command is given again with its --out.

    Example: veilmart sim --data DIR --nodes 100 --records 32 --seed 1 --out RUN --json
    """
    from nodes import console
    from nodes.mixes import Mix
    from nodes.report import print_result
    from nodes.simulate import ENGINES, Settings, new_run_folder, plan_tasks, simulate
    from nodes.simulation_engine import require_ray
    from protocol.errors import UsageError
    from protocol.features import open_map

    if engine not in ENGINES:
        hint = "Flower's own deployment: `veilmart campaign run`"
        raise UsageError(f"--engine: expected one of {', '.join(ENGINES)}, got {engine[:20]!r}", hint=hint)
    if engine == "flower":
        require_ray()
    other, count = _other_base(other_base)
    settings = Settings(
        data=data, out=new_run_folder(out, home), tasks=_names(tasks), unseen=_names(unseen), records=records, query_size=query_size,
        queries=queries, repeats=repeats, epsilon_spec=epsilon_spec, delta=delta, recipe=recipe_of(epsilon_adapter, no_train),
        test_records=test_records, mirror=mirror, seed=seed, nodes=nodes, mix=Mix.parse(mix), workers=workers, cache=cache,
        other_base=count, engine=engine,
    )  # fmt: skip
    plan_tasks(settings, open_map(which_map))  # a wrong folder or task shows before the model is loaded
    progress = console.ProgressLine(not quiet)
    result = simulate(
        settings, open_model(home, base), open_map(which_map), progress, other=open_model(home, other) if other else None,
        on_plan=lambda plan: None if quiet else console.say(plan.line),
    )  # fmt: skip
    progress.close()
    if as_json:
        console.print_json(result)
    else:
        print_result(result, settings.out)


def demo(
    home: Home,
    texts: Annotated[
        Path | None, typer.Option("--texts", metavar="DIR", help="Write the made-up records of the six owners to a folder, and no more.")
    ] = None,
    which_map: Map = "kme-lin-96",
    base: Base = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole story on this machine: six owners, private specifications, specialists, encrypted matching, answers.

    The first steps of docs/start-*.md work on its texts: `veilmart demo --texts texts`.

    Example: veilmart demo
    """
    from nodes import console
    from nodes.demo import print_demo, run_demo, write_demo_data
    from protocol.features import open_map

    if texts is not None:
        files = write_demo_data(texts)
        result = {"schema": "veilmart.demo-texts/1", "files": [str(file) for file in files]}
        show(result, as_json, [str(file) for file in files])
        return
    progress = console.ProgressLine(not quiet)
    result = run_demo(home, open_model(home, base), open_map(which_map), progress)
    progress.close()
    if as_json:
        console.print_json(result)
        return
    print_demo(result)


def _other_base(text: str | None) -> tuple[Path | None, int]:
    from protocol.errors import UsageError

    if text is None:
        return None, 0
    folder, _, number = text.rpartition(":")
    if not folder or not number.isdigit() or int(number) < 1:
        raise UsageError("--other-base: expected DIR:COUNT", hint="models/other:3 gives three of the owners that base model")
    return Path(folder), int(number)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


COMMANDS = {"demo": demo, "sim": sim}
