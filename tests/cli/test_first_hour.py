"""What a new user types first, and what they see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from click.testing import Result

import porting
from porting.cli.main import cli
from porting.parity.report import Limits, ParityReport
from porting.reports.document import to_json

RunCli = Callable[..., Result]


@pytest.fixture(scope="module")
def ported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from porting.families.van import VanFamily
    from porting.tasks.port import port

    out = tmp_path_factory.mktemp("ported") / "nano.h5"
    port(VanFamily(), "nano", out, checkpoint=checkpoint, check=False)
    return out


def test_the_port_command_is_the_bare_one(run_cli: RunCli, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--variant", "nano", "--checkpoint", checkpoint, "--no-check"]
    assert run_cli("port", *arguments, "--out", tmp_path / "a.h5").exit_code == 0
    assert run_cli(*arguments, "--out", tmp_path / "b.h5").exit_code == 0
    assert (tmp_path / "a.h5").stat().st_size == (tmp_path / "b.h5").stat().st_size
    assert "--variant is required" in run_cli("port").output


def test_the_main_help_shows_the_commands(run_cli: RunCli) -> None:
    text = run_cli("--help").output
    for name in ("check", "evaluate", "export", "map", "port", "revert"):
        assert f"\n  {name} " in text
    assert "--max-ratio" not in text
    assert "..." not in text.partition("Commands:")[2].partition("Options:")[0]


def test_a_file_says_which_variant_it_is(run_cli: RunCli, ported: Path, checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "parity.html"
    checked = run_cli("check", "--weights", ported, "--checkpoint", checkpoint, "--report", report)
    assert checked.exit_code == 0, checked.output
    assert f"Wrote {report}" in checked.output
    assert report.is_file()


def test_another_variant_than_the_files_is_refused_at_once(run_cli: RunCli, ported: Path, tmp_path: Path) -> None:
    for command in (["check"], ["export", "--out", tmp_path / "a.onnx"], ["revert", "--out", tmp_path / "a.pth"]):
        result = run_cli(*command, "--variant", "b1", "--weights", ported)
        assert result.exit_code == 7, result.output
        assert "holds weights of van nano, but --variant says b1" in result.output


def test_a_file_that_says_nothing_needs_a_variant(run_cli: RunCli, tmp_path: Path) -> None:
    h5py.File(tmp_path / "plain.h5", "w").close()
    result = run_cli("check", "--weights", tmp_path / "plain.h5")
    assert result.exit_code == 2
    assert "Missing option '--variant'" in result.output


@pytest.mark.parametrize("name", ["none.onnx", "none.tflite", "none.h5"])
def test_a_missing_file_of_weights_is_named(name: str, run_cli: RunCli, tmp_path: Path) -> None:
    result = run_cli("evaluate", "--data", tmp_path, "--weights", tmp_path / name)
    assert result.exit_code == 5
    assert f"{name}: no such file" in result.output


def test_a_picture_is_no_file_of_weights(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    for command in (["check"], ["evaluate", "--data", tmp_path], ["revert", "--out", tmp_path / "x.pth"]):
        result = run_cli(*command, "--weights", tmp_path / "photo.jpg")
        assert "photo.jpg: not a file of Keras weights" in result.output


@pytest.fixture
def report() -> ParityReport:
    return ParityReport((), (), (), None, ((1, 2),), Limits(), problem="nothing ran")


def test_a_report_shows_itself(report: ParityReport, tmp_path: Path) -> None:
    assert str(report) == "NOT AT PARITY: nothing ran"
    assert repr(report) == "<ParityReport: NOT AT PARITY: nothing ran>"
    assert "<iframe srcdoc=" in report._repr_html_()
    assert report.to_html().startswith("<!DOCTYPE html>")
    for suffix in ("html", "md", "xml", "json"):
        report.save(tmp_path / f"r.{suffix}")
        assert (tmp_path / f"r.{suffix}").stat().st_size > 0
    with pytest.raises(porting.PortingError, match="the suffix does not say which report"):
        report.save(tmp_path / "r.doc")
    with pytest.raises(porting.PortingError):
        report.save(tmp_path / "nowhere" / "r.html")
    assert not (tmp_path / "nowhere").exists()


def test_a_report_is_rendered_as_its_new_name_ends(run_cli: RunCli, report: ParityReport, tmp_path: Path) -> None:
    source, out = tmp_path / "r.json", tmp_path / "r.html"
    source.write_text(to_json(report))
    assert run_cli("report", source, "--out", out).exit_code == 0
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert run_cli("report", source, "--out", tmp_path / "r.doc").exit_code == 6
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"schema_version": 3}))
    assert run_cli("report", broken, "--out", tmp_path / "b.html").exit_code == 8
    assert not (tmp_path / "b.html").exists()


def test_options_are_in_groups_under_titles(run_cli: RunCli) -> None:
    text = run_cli("check", "--help").output
    titles = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Model", "Files", "Checkpoint", "Earlier reports", "Parity check", "Output", "Other options"]


@pytest.mark.parametrize("command", [name for name in cli.commands if name not in {"port-all", "report"}])
def test_every_command_that_prints_results_has_quiet_and_json(command: str) -> None:
    options = {option for param in cli.commands[command].params for option in param.opts}
    assert {"--quiet", "-q", "--json"} <= options


def test_quiet_prints_nothing_json_is_alone_and_verbose_prints_all(
    run_cli: RunCli, ported: Path, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "parity.json"
    given = ["check", "--weights", ported, "--checkpoint", checkpoint, "--samples", "1", "--report", file]
    result = run_cli(*given, "--json", "-q")
    assert result.exit_code == 0
    assert json.loads(result.output)["passed"]
    few, all_layers = (run_cli("report", file, *options).output for options in ([], ["-v"]))
    assert "block1.0.attn.proj_1 " in all_layers
    assert "block1.0.attn.proj_1 " not in few
    assert all_layers == run_cli("report", file, "--all-layers").output
    assert run_cli("check", "--from", file, "--quiet").output == ""
    # Quiet lasts for one command alone, and never hides an error.
    assert "van: nano" in run_cli("families").output
    result = run_cli("check", "--weights", tmp_path / "none.h5", "--variant", "nano", "--quiet")
    assert result.exit_code == 5
    assert "Error: " in result.output


def test_names_that_the_model_does_not_have_end_in_one_line(run_cli: RunCli, ported: Path, checkpoint: Path) -> None:
    given = ["check", "--weights", ported, "--checkpoint", checkpoint, "--samples", "1"]
    for option in (["--limit", "foo:3"], ["--waive", "foo"]):
        result = run_cli(*given, *option)
        assert result.exit_code == 2, result.output
        assert "'foo' is no module of the PyTorch model" in result.output


def test_a_limit_that_judges_nothing_is_refused(run_cli: RunCli, report: ParityReport, tmp_path: Path) -> None:
    report.save(tmp_path / "r.json")
    result = run_cli("check", "--from", tmp_path / "r.json", "--limit", "foo:3")
    assert result.exit_code == 2
    assert "the report has no layer 'foo'" in result.output


def test_a_missing_file_is_said_to_be_missing(run_cli: RunCli, tmp_path: Path) -> None:
    result = run_cli("check", "--weights", tmp_path / "none.h5")
    assert result.exit_code == 5
    assert "none.h5: no such file" in result.output


def test_rows_are_read_from_a_path_in_text(tmp_path: Path) -> None:
    (tmp_path / "rows.toml").write_text('[[row]]\nsource = "a"\ntarget = "b"\nkind = "dense"\n')
    assert porting.read_rows(str(tmp_path / "rows.toml")) == [porting.KeyRule("a", "b", "dense")]


def test_options_that_would_do_nothing_are_refused(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    for arguments, code, said in (
        (
            ["evaluate", "--variant", "nano", "--weights", "x.h5", "--data", "x", "--ray-address", "a:1"],
            2,
            "--engine ray",
        ),
        (["map", "a.b:c", "d.e:f", "--out", tmp_path / "rows.txt"], 6, "rows are written as .toml"),
    ):
        result = run_cli(*arguments)
        assert (result.exit_code, said in " ".join(result.output.split())) == (code, True), result.output
