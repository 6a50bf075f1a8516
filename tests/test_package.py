"""Tests the distribution that users install: a wheel with its data, and documents that are true."""

from __future__ import annotations

import json
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
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")
# All that the help of every command imports.
LIGHT = {"click", "cloup", "filelock", "h5py", "ml_dtypes", "numpy", "rapidfuzz"}
EVERY_HELP = """
import contextlib
from porting.cli.main import cli
for name in ["", *cli.commands]:
    with contextlib.suppress(SystemExit):
        cli([*name.split(), "--help"], prog_name="van-port")
"""
METADATA = """
import json
from importlib import metadata
found = metadata.distribution("van-port")
names = {str(path) for path in found.files}
points = {point.name: point.value for point in found.entry_points if point.group == "pytest11"}
print(json.dumps({
    "requires-python": found.metadata["Requires-Python"],
    "classifiers": found.metadata.get_all("Classifier"),
    "typed": [f"{package}/py.typed" in names for package in ("porting", "van_tf")],
    "licence": [found.metadata["License-Expression"], any(name.endswith("licenses/LICENSE") for name in names)],
    "fixture": points["porting"],
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    subprocess.run([*command, folder, ROOT], check=True, timeout=300)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_their_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"porting/weights/sources.toml", "porting/weights/van_nano.pth.tar"} <= names
    assert {"porting/py.typed", "van_tf/py.typed"} <= names
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


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d"]
    subprocess.run([*command, folder], cwd=ROOT, check=True, capture_output=True, timeout=300)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel_of_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel_of_sdist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    subprocess.run([*command, folder, sdist], check=True, timeout=300)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_sdist_makes_the_same_wheel(wheel: Path, wheel_of_sdist: Path) -> None:
    assert wheel.name == wheel_of_sdist.name == f"van_port-{PROJECT['version']}-py3-none-any.whl"
    one, other = (
        {info.filename: info.CRC for info in zipfile.ZipFile(path).infolist() if "RECORD" not in info.filename}
        for path in (wheel, wheel_of_sdist)
    )
    assert one == other


def interpreter(version: str) -> str | None:
    """A Python of this version, where one is installed; pyenv's stand-ins in PATH may have none behind them."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for found in (shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python{version}"))):
        if found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
            return str(found)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_it_installs_on_every_python(version: str, sdist: Path, wheel_of_sdist: Path, tmp_path: Path) -> None:
    """Both distributions, without the frameworks, which take several GB: what needs none of them has to work.

    The interpreter that runs the tests has all dependencies, and a wheel is tried there as a whole above.
    """
    python = interpreter(version)
    if python is None:
        pytest.skip(f"Python {version} is not installed")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True, timeout=300)
    folder = tmp_path / "venv" / "bin"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            [folder / command[0], *command[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    light = [each for each in PROJECT["dependencies"] if re.split("[<>=]", each)[0] in LIGHT]
    assert len(light) == len(LIGHT)
    run("pip", "install", "--quiet", *light)
    for distribution in (sdist, wheel_of_sdist):
        run("pip", "install", "--quiet", "--no-deps", "--force-reinstall", distribution)
        assert run("van-port", "--version").split()[-1] == PROJECT["version"]
        shown = run("python", "-c", EVERY_HELP)
        assert all(f"Usage: van-port {name}" in shown for name in cli.commands)
        assert "van: nano b0" in run("van-port", "families")
        found = json.loads(run("python", "-c", METADATA))
        assert found["requires-python"] == PROJECT["requires-python"]
        assert found["classifiers"] == PROJECT["classifiers"]
        assert found["typed"] == [True, True]
        assert found["licence"] == [PROJECT["license"], True]
        assert found["fixture"] == "porting.pytest_plugin"
        run("pip", "uninstall", "--quiet", "--yes", "van-port")


def test_the_version_is_the_same_everywhere() -> None:
    released = re.findall(r"^## (\S+) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert released[:1] == cited == [PROJECT["version"]]


def test_every_python_of_the_classifiers_is_tried() -> None:
    said = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)]
    assert tuple(said) == PYTHONS
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_every_import_is_a_declared_dependency() -> None:
    project = PROJECT
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


@pytest.mark.parametrize("package", ["parity", "models", "mapping", "files", "sources", "proposing"])
def test_contributing_names_every_module(package: str) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| `porting/{package}/`"))
    modules = {path.stem for path in (ROOT / "porting" / package).glob("*.py")} - {"__init__"}
    assert not {name for name in modules if f"`{name}`" not in row}


def test_the_contract_of_a_report_names_every_other_module() -> None:
    """A report imports nothing of the check. The contract lists modules one by one."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    listed = next(each for each in contracts if each["name"] == "A report is results alone")["forbidden_modules"]
    modules = {f"porting.parity.{path.stem}" for path in (ROOT / "porting" / "parity").glob("*.py")}
    assert modules - {"porting.parity.__init__", "porting.parity.report"} <= set(listed)
