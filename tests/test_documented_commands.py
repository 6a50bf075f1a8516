"""Every command in README and docs: the parser takes it, and where it can run here, it runs."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from porting.cli.main import cli
from porting.data import weights_folder
from tests.documents import PAGES, ROOT, Command, commands, inline_code, python_files, text_blocks
from tests.families.test_van_config import reference_of

RunCli = Callable[..., Result]
ALL = [command for page in PAGES for command in commands(page)]
OURS = [command for command in ALL if command.program == "van-port"]
# Placeholders of values that are checked.
VALUES = {"HEX": "0" * 64}
# What cannot run here, and why.
NOT_RUN = {
    r"https://|hf://": "downloads",
    r"port-all": "downloads official files",
    r"--family": "the families' own tests port their models, and without the network",
    r"torchvision:": "takes several GB of memory",
    r"--ray-address": "needs a cluster that runs",
}
# The embedded checkpoint stands for the official ones.
STAND_INS = {"b1": "nano"}


def names(values: list[Command]) -> list[Any]:
    return [pytest.param(value, id=str(value)) for value in values]


def parse(command: Command) -> None:
    """As Click does before it calls the command; raises ClickException for what the parser does not take."""
    words = [VALUES.get(word, word) for word in command.words[1:]]
    group = click.Context(cli, info_name="van-port")
    if words and words[0] in cli.commands:
        cli.commands[words[0]].make_context(words[0], words[1:], parent=group)
    elif words and not words[0].startswith("-"):
        raise click.UsageError(f"no command {words[0]}")
    else:
        cli.make_context("van-port", words)


@pytest.mark.parametrize("command", names(OURS))
def test_the_parser_takes_it(command: Command) -> None:
    with contextlib.suppress(click.exceptions.Exit):  # of --help and --version
        parse(command)


@pytest.mark.parametrize("words", ["check --weihgts x.h5", "chekc --weights x.h5", "--no-such", "port --samples two"])
def test_the_parser_refuses_what_does_not_exist(words: str) -> None:
    with pytest.raises(click.ClickException):
        parse(Command(ROOT / "README.md", ("van-port", *words.split())))


def test_there_are_commands_on_every_page_that_should_have_them() -> None:
    assert {"README.md", "getting-started.md", "gate-ci.md", "families.md"} <= {each.page.name for each in OURS}
    assert len(OURS) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_options_and_paths_in_the_text_exist(page: Path) -> None:
    options = {
        command: {name for param in cli.commands[command].params for name in (*param.opts, *param.secondary_opts)}
        for command in cli.commands
    }
    scripts = "".join(path.read_text() for path in (ROOT / "scripts").glob("*.py"))
    known = set().union(*options.values(), {"--help", "--version"}) | set(re.findall(r'"(--[a-z-]+)"', scripts))
    for code in inline_code(page):
        words = code.split()
        if words[0] == "van-port" and len(words) > 1 and words[1][0] not in "-[" and words[1] != "COMMAND":
            assert words[1] in cli.commands, code
            used = {word for word in words[2:] if word.startswith("--")}
            assert used <= options[words[1]] | {"--help"}, code
        elif words[0].startswith("--"):
            assert words[0] in known, code
        elif re.fullmatch(r"(porting|van_tf|tests|scripts|docs|weights)/[\w./]*(/|\.\w+)", words[0]):
            assert (ROOT / words[0]).exists(), code
            for option in re.findall(r"--[a-z-]+", code):
                assert f'"{option}"' in (ROOT / words[0]).read_text(), code


@pytest.mark.parametrize("command", names([each for each in ALL if each.program != "van-port"]))
def test_other_programs_are_given_what_exists(command: Command) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in command.words[1:]:
        if match := re.fullmatch(r"(?:\.|van-port)\[(.+)\]", word):
            assert set(match[1].split(",")) <= extras.keys()
        elif word.endswith((".py", ".yml", ".ci/run")):
            assert (ROOT / word).is_file()
    if command.program.startswith("python") and command.words[1].startswith("scripts/"):
        text = (ROOT / command.words[1]).read_text()
        assert all(f'"{word}"' in text for word in command.words if word.startswith("--"))


def stood_in(command: Command) -> tuple[str, ...]:
    return tuple(STAND_INS.get(word, word) for word in command.words[1:])


def runnable() -> list[Any]:
    """Each command once, with its stand-ins; what NOT_RUN says is left out, and nothing else."""
    found = {stood_in(command): command for command in OURS if not reason_not_to_run(command)}
    return [pytest.param(words, id=str(command)) for words, command in found.items()]


def reason_not_to_run(command: Command) -> str:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, str(command))), "")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that the commands name."""
    from porting.families.van import VanFamily
    from porting.tasks.options import CheckOptions
    from porting.tasks.port import port

    folder = tmp_path_factory.mktemp("stock")
    shutil.copy(weights_folder() / "van_nano.pth.tar", folder / "van_small_811.pth.tar")
    for name in ("van_b1.h5", "tuned.keras"):
        port(VanFamily(), "nano", folder / name, check=name == "van_b1.h5", options=CheckOptions(samples=2))
    for name in ("van_nano.h5", "van_nano.h5.parity.json", "new.json", "old.json"):
        shutil.copy(folder / ("van_b1.h5.parity.json" if "json" in name else "van_b1.h5"), folder / name)
    for image in sorted((weights_folder() / "parity_images").glob("*_000[01].png")):
        for place in (folder / "photos", folder / "imagenet" / "val" / image.name.rpartition("_")[0]):
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, place)
    own_models(folder)
    [settings] = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "checkpoints.md").read_text(), re.DOTALL)
    (folder / "config.json").write_text(settings)
    torch.save(reference_of(json.loads(settings)).state_dict(), folder / "my_van.pth")
    return folder


def own_models(folder: Path) -> None:
    """The models of docs/port-your-own-model.md under the names that pages have for them, and what is theirs."""
    text = python_files()["models.py"]
    (folder / "models.py").write_text(text)
    (folder / "my_models.py").write_text(text + "\n\nmake_torch, make_keras = torch_net, keras_net\n")
    (folder / "broken.py").write_text(text.replace("epsilon=1e-5", "epsilon=1e-3"))
    names: dict[str, Any] = {}
    exec(text, names)
    torch.manual_seed(0)
    torch.save(names["torch_net"]().state_dict(), folder / "own.pth")
    np.savez(folder / "batch.npz", images=np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32))


@pytest.fixture
def at_hand(stock: Path, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stock, in which the test is."""
    shutil.copytree(stock, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("words", runnable())
def test_it_runs(words: tuple[str, ...], at_hand: Path, run_cli: RunCli) -> None:
    if "rows.toml" in words and words[0] != "map":
        assert run_cli("map", "models.py:torch_net", "models.py:keras_net", "--out", "rows.toml").exit_code == 0
    if "own.h5" in words and "--out" not in words[: words.index("own.h5")]:
        options = ["--source", "models.py:torch_net", "--target", "models.py:keras_net", "--map", "rows.toml"]
        assert run_cli(*options, "--checkpoint", "own.pth", "--out", "own.h5").exit_code == 0
    done = run_cli(*words, *on_few_images(words))
    assert done.exit_code == 0, done.output
    if "--out" in words:
        assert Path(words[words.index("--out") + 1]).exists()


def on_few_images(words: tuple[str, ...]) -> list[str]:
    """An option that makes a check of images shorter, for a command that has it."""
    command = cli.commands.get(words[0], cli)
    has_it = any("--samples" in param.opts for param in command.params)
    return ["--samples", "2"] if has_it and not {"--samples", "--from", "--source"} & set(words) else []


@pytest.mark.slow
def test_what_the_pages_show_is_printed(at_hand: Path, run_cli: RunCli) -> None:
    """Every block of output of three pages, with other numbers."""
    options = ["--map", "rows.toml", "--checkpoint", "own.pth"]
    printed = run_cli("--variant", "nano", "--samples", "2").output
    printed += run_cli("map", "models.py:torch_net", "models.py:keras_net", "--out", "rows.toml").output
    printed += run_cli("--source", "models.py:torch_net", "--target", "models.py:keras_net", *options).output
    failed = run_cli("--source", "broken.py:torch_net", "--target", "broken.py:keras_net", *options, "--out", "b.h5")
    assert failed.exit_code == 1
    known = without_numbers(printed + failed.output)
    shown = 0
    for name in ("getting-started.md", "port-your-own-model.md", "read-a-report.md"):
        page = ROOT / "docs" / name
        called = {" ".join(command.words) for command in commands(page)}
        for lines in text_blocks(page):
            if not any(line.startswith(("van-port", "python3", ".venv", "echo")) for line in lines) or not called:
                text = without_numbers("\n".join(lines))
                assert text in known, f"{name}:\n{text}"
                shown += 1
    assert shown >= 4


def without_numbers(text: str) -> str:
    """On one line, with `#` for every number and for a layer in brackets: they are not the same on all machines."""
    text = re.sub(r"\([a-z]\w+(\.\w+)+\)", "(#)", " ".join(text.split()))
    return re.sub(r"\d[\d.]*(e[+-]?\d+)?", "#", text)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_that_is_documented_exists(shell: str) -> None:
    guide = (ROOT / "docs" / "getting-started.md").read_text()
    assert f"_VAN_PORT_COMPLETE={shell}_source van-port" in guide
    runner = CliRunner()
    script = runner.invoke(cli, prog_name="van-port", env={"_VAN_PORT_COMPLETE": f"{shell}_source"})
    assert f"_VAN_PORT_COMPLETE={shell}_complete" in script.output
    asked = {"_VAN_PORT_COMPLETE": "bash_complete", "COMP_WORDS": "van-port check --variant ", "COMP_CWORD": "3"}
    assert "plain,nano" in runner.invoke(cli, prog_name="van-port", env=asked).output.splitlines()
