"""`van-port families`."""

from __future__ import annotations

import cloup

from porting.cli.groups import JSON, output_options
from porting.cli.overwriting import PortCommand
from porting.errors import PortingError
from porting.families.registry import family_names, get_family


@cloup.command(cls=PortCommand, short_help="List the model families and their variants.")
@output_options(JSON)
def families(as_json: bool) -> None:
    """List the model families and their variants, including those from other installed packages."""
    from porting.cli.terminal import say, say_json

    found: list[dict[str, object]] = []
    for name in family_names():
        try:
            family = get_family(name)
        except PortingError as error:
            found.append({"family": name, "error": error.message})
        else:
            layouts = [naming.name for naming in family.namings]
            found.append({"family": name, "variants": list(family.variants), "layouts": layouts})
    if as_json:
        say_json(found)
        return
    for each in found:
        variants = each.get("variants")
        shown = " ".join(variants) if isinstance(variants, list) else f"unavailable: {each['error']}"
        say(f"{each['family']}: {shown}")
