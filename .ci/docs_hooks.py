"""What the documentation site takes from the code: all commands, the public API, and the changelog.

The pages in docs/ also stand for themselves on a forge; what only the site can render is added here.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files

from porting.cli.main import cli

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any) -> Files:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    changelog = re.sub(r"\[docs/([\w-]+)\.(\w+)\]\(docs/", r"[\1.\2](", changelog)
    files.append(File.generated(config, "changelog.md", content=changelog))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri == "commands.md":
        return "\n".join([markdown.replace("The built site lists them below.", "They are listed below."), *_commands()])
    if page.file.src_uri == "api.md":
        return markdown + "".join(_reference(package) for package in ("porting", "van_tf"))
    return markdown


def _commands() -> Iterator[str]:
    """Every command as its --help shows it, with a table of its options."""
    yield "\n## All options\n"
    group = click.Context(cli, info_name="van-port")
    for name, command in cli.commands.items():
        context = click.Context(command, parent=group, info_name=name)
        yield f"### van-port {name}\n"
        yield from _description(command.help or "")
        pieces = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        yield f"\n```text\n{pieces}\n```\n"
        yield "| option | meaning |\n|---|---|"
        for param in command.get_params(context):
            if record := param.get_help_record(context):
                names, meaning = (" ".join(text.split()).replace("|", "&#124;") for text in record)
                yield f"| <code>{names}</code> | {meaning.replace('[', '&#91;')} |"
        yield ""


def _description(text: str) -> Iterator[str]:
    """Paragraphs as they are, and those that Click leaves alone, behind a line with \\b, as blocks."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        first, _, rest = paragraph.partition("\n")
        yield f"```text\n{inspect.cleandoc(' ' * 2 + rest)}\n```" if first.strip() == "\b" else paragraph
        yield ""


def _reference(package: str) -> str:
    """A heading for each public name, and a table of the constructors that a factory makes."""
    names = ast.literal_eval(_assigned(ROOT / package / "__init__.py")["__all__"])
    made = {}
    if package == "van_tf":
        calls = _assigned(ROOT / "van_tf" / "model.py").items()
        made = {
            name: ast.literal_eval(call.args[1]) for name, call in calls if name in names and isinstance(call, ast.Call)
        }
    lines = [f"\n## {package}\n", *(f"::: {package}.{name}\n" for name in names if name not in made)]
    if made:
        lines.append("### Variants\n\nTheir arguments are those of `van_tf.van`, without `config`.\n")
        lines.append("| constructor | model |\n|---|---|")
        lines += [f'| <code id="{package}.{name}">{package}.{name}</code> | {about} |' for name, about in made.items()]
    return "\n".join(lines) + "\n"


def _assigned(path: Path) -> dict[str, ast.expr]:
    """What a module assigns to names at its top level."""
    return {
        node.targets[0].id: node.value
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
