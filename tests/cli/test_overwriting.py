"""No command writes over a file that it reads, by whichever options it is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import Result

from porting.cli.main import cli

OUTPUTS = {"out", "report_files", "keep_failed"}
NEEDED = {"--weights": "w.h5", "--out": "o.h5", "--data": "d.csv"}


def files(command: click.Command, *, written: bool) -> Iterator[click.Option]:
    for parameter in command.params:
        is_path = isinstance(parameter.type, click.Path) or parameter.name == "checkpoint"
        is_own = parameter.name in {"resume", "out_dir", "images"}  # read by its writer, or folders
        if isinstance(parameter, click.Option) and is_path and not is_own and (parameter.name in OUTPUTS) is written:
            yield parameter


def pairs() -> Iterator[tuple[str, str, str]]:
    for name, command in cli.commands.items():
        for output in files(command, written=True):
            for other in files(command, written=False):
                yield name, output.opts[0], other.opts[0]


def test_every_command_that_writes_is_among_these() -> None:
    assert {name for name, _, _ in pairs()} == {"check", "evaluate", "export", "map", "port", "revert"}
    assert ("export", "--report", "--labels") in set(pairs())


@pytest.mark.parametrize(("command", "output", "read"), list(pairs()))
def test_an_input_is_kept(
    command: str,
    output: str,
    read: str,
    run_cli: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    suffix = {"--report": ".json", "--out": ".h5", "--keep-failed": ".h5"}[output]
    (tmp_path / f"x{suffix}").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / f"x{suffix}")
    known = {option for each in cli.commands[command].params for option in each.opts}
    others = {option: value for option, value in NEEDED.items() if option in known - {output, read}}
    models = ["a.py:make", "b.py:make"] if command == "map" else []
    given = [text for pair in {**others, output: f"x{suffix}", read: "link"}.items() for text in pair]
    result = run_cli(command, *models, *given)
    assert (tmp_path / f"x{suffix}").read_text() == "{}"
    assert result.exit_code != 0
    if read != "--config":  # which is refused as it is parsed
        assert result.exit_code == 2, result.output
        assert f"is also the file that {read} reads" in result.output


@pytest.mark.parametrize("option", ["--source", "--target", "--keras-preprocessing"])
def test_the_file_of_a_function_is_kept(option: str, run_cli: Callable[..., Result], tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text("def make(): pass")
    command = ["evaluate", "--weights", "w.h5", "--data", "d.csv", option, f"{own}:make", "--report", own]
    result = run_cli(*command)
    assert result.exit_code == 2
    assert own.read_text() == "def make(): pass"


def test_a_file_of_the_checkpoints_folder_is_kept(run_cli: Callable[..., Result], tmp_path: Path) -> None:
    config = tmp_path / "folder" / "config.json"
    config.parent.mkdir()
    config.write_text("{}")
    result = run_cli("check", "--weights", "w.h5", "--checkpoint", config.parent, "--report", config)
    assert "is also the file that --checkpoint reads" in result.output
    assert config.read_text() == "{}"
    # A new file there, or one beside the images, is none that is read.
    result = run_cli("check", "--weights", "w.h5", "--checkpoint", config.parent, "--report", tmp_path / "new.json")
    assert "reads" not in result.output
    result = run_cli("check", "--weights", "w.h5", "--images", config.parent, "--report", config)
    assert "reads" not in result.output


def test_the_bare_command_keeps_its_inputs_too(run_cli: Callable[..., Result], tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text("{}")
    result = run_cli("--variant", "nano", "--inputs", rows, "--out", tmp_path / "x.h5", "--report", rows)
    assert "is also the file that --inputs reads" in result.output
    assert rows.read_text() == "{}"
