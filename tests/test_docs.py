"""The documentation site, which is built from docs/ and from the code, and the notebook."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement

import porting
import van_tf
from porting.cli.main import cli
from tests.documents import ROOT

NOTEBOOK = ROOT / "docs" / "port_and_prove.ipynb"
# What would make a reader's browser ask another server.
FOREIGN = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*(?:src|href)=["']?(?:https?:)?//|url\(["']?(?:https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in strict mode: a link that leads nowhere ends it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ".ci/mkdocs.yml", "-d", str(folder)]
    # The theme prints a notice about its future otherwise.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.mark.slow
def test_every_page_is_there_and_asks_no_other_server(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"changelog"}
    for page in pages:
        text = (site / ("index.html" if page == "index" else f"{page}/index.html")).read_text()
        assert not FOREIGN.search(text), page
    for style in site.rglob("*.css"):
        assert not FOREIGN.search(style.read_text()), style


@pytest.mark.slow
def test_every_command_and_every_option_is_on_the_page_of_commands(site: Path) -> None:
    text = (site / "commands" / "index.html").read_text()
    for name, command in cli.commands.items():
        assert f'id="van-port-{name}"' in text
        for param in command.params:
            assert all(option in text for option in param.opts if option.startswith("--"))
    assert "Sentinel" not in text


@pytest.mark.slow
def test_every_public_name_is_on_the_page_of_the_api(site: Path) -> None:
    text = (site / "api" / "index.html").read_text()
    for module in (porting, van_tf):
        for name in module.__all__:
            assert f'id="{module.__name__}.{name}"' in text


def test_the_tested_versions_are_those_that_the_package_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    allowed = {parsed.name: parsed for group in groups for parsed in map(Requirement, group)}
    rows = re.findall(r"^\| ([\w.-]+) \| ([\d.]+) \|", (ROOT / "docs" / "versions.md").read_text(), re.MULTILINE)
    assert {"tensorflow", "keras", "torch", "timm", "transformers", "keras-hub"} <= {name for name, _ in rows}
    for name, version in rows:
        assert allowed[name].specifier.contains(version), name


def test_the_notebook_is_kept_without_results() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stdout"
    )
    assert "the kernel's height and width are swapped" in printed
    assert printed.lower().count("at parity") >= 4
    for name in ("van_nano.h5", "van_nano.tflite", "van_nano.onnx"):
        assert (tmp_path / name).is_file()
