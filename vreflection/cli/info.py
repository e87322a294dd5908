"""`vreflection info`"""

from __future__ import annotations

import json
from typing import Annotated

import typer


def command(as_json: Annotated[bool, typer.Option("--json", help="print as JSON")] = False) -> None:
    """Versions, devices, and which implementation each part would use here, and why."""
    from ..capabilities import capabilities

    found = capabilities()
    if as_json:
        typer.echo(json.dumps(found))
        return
    for group, entries in found.items():
        typer.echo(group)
        for name, value in entries.items():
            typer.echo(f"  {name:<18} {value}")
