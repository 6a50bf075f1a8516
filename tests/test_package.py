"""Tests the distribution that users install: a wheel with its data, and documents that are true."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from porting.cli.main import cli

ROOT = Path(__file__).parent.parent
TEST_COMMAND = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest"
IMPORT_NAMES = {"pillow": "PIL"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    subprocess.run([*command, folder, ROOT], check=True, timeout=300)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_their_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"porting/weights/sources.toml", "porting/weights/van_nano.pth.tar", "porting/py.typed"} <= names
    assert sum(name.startswith("porting/weights/parity_images/") for name in names) == 40
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"porting", "van_tf"}


@pytest.mark.slow
def test_the_installed_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, site, wheel], check=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = "import porting, van_tf; print(porting.__file__); print(van_tf.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    assert all(line.startswith(str(site)) for line in where.stdout.splitlines())
    done = subprocess.run(
        [sys.executable, "-m", "porting.cli.main", "--variant", "nano"],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "AT PARITY" in done.stdout
    assert (elsewhere / "van_nano.h5").is_file()


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[\[><=,]", requirement)[0] for requirement in declared}
    modules = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names} | {"porting", "van_tf", "tests"}
    modules |= {path.stem for path in (ROOT / "scripts").glob("*.py")}
    imported = set()
    for path in ROOT.glob("*/**/*.py"):
        if path.relative_to(ROOT).parts[0] in {"porting", "van_tf", "scripts", "tests"}:
            imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
    assert imported - modules - set(sys.stdlib_module_names) == set()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert TEST_COMMAND in (ROOT / "README.md").read_text()
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text()


def test_the_readme_shows_options_that_exist() -> None:
    readme = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    commands = [cli, *cli.commands.values()]
    known = {
        name for command in commands for option in command.params for name in (*option.opts, *option.secondary_opts)
    } | {"--help"}
    used = {
        option for line in readme.splitlines() if "van-port " in line for option in re.findall(r"--[a-z0-9-]+", line)
    }
    assert used
    assert used - known == set()


def test_imports_follow_the_arrows() -> None:
    """pyproject.toml lists the packages and the imports allowed between them."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


def test_nothing_names_a_path_of_one_machine() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".yml", ""} and path.is_file():
            assert not re.search(r"/(?:root|home/\w+|work)/", path.read_text(errors="ignore")), name
