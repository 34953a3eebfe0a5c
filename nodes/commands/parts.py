"""What this program runs on: `audit parts`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nodes.commands.options import Json, show


def audit_parts(
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the list to this file: CycloneDX 1.6, JSON.")] = None,
    files: Annotated[bool, typer.Option("--files", help="Read every file and compare it with the hash from its installation.")] = False,
    as_json: Json = False,
) -> None:
    """List the installed packages with version, licence and the hash of their file list.  Exit code 4 if --files finds one altered.

    Example: veilmart audit parts --files -o parts.json
    """
    import hashlib

    from nodes import console
    from nodes.audit.parts import bill_of, installed
    from nodes.audit.report import to_json
    from protocol.errors import CheckFailed
    from protocol.keys import write_durably

    parts = installed()
    data = to_json(bill_of(parts))
    if out is not None:
        write_durably(out, data, 0o644)
    altered: dict[str, list[str]] = {}
    progress = console.ProgressLine(not as_json)
    for done, part in enumerate(parts if files else (), start=1):
        if found := part.altered():
            altered[part.name] = found
        progress("files", done, len(parts))
    progress.close()
    result = {
        "schema": "veilmart.parts/1", "parts": len(parts), "file": str(out) if out else None, "sha256": hashlib.sha256(data).hexdigest(),
        "files_compared": files, "altered": altered,
    }  # fmt: skip
    lines = [f"{part.name}\t{part.version}\t{part.licence or '-'}" for part in parts] if out is None else [f"{out}: {len(parts)} packages"]
    lines += [f"{name}: {len(found)} files are not as installed: {', '.join(found[:3])}" for name, found in altered.items()]
    show(result, as_json, lines)
    if altered:
        raise typer.Exit(CheckFailed.exit_code)


COMMANDS = {"audit parts": audit_parts}
