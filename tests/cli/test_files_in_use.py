"""No command overwrites its inputs, and none writes to anything but a file."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from porting.families.van import VanFamily
from porting.tasks.port import port
from tests.files.test_result import spellings

RunCli = Callable[..., Result]


@pytest.fixture(scope="module")
def ported(family: VanFamily, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ported") / "x.h5"
    port(family, "nano", out, checkpoint=checkpoint, check=False)
    return out


# A command, the option under which it reads the file, and the one under which it would overwrite it.
CLASHES = {
    "port": (["--variant", "nano"], "--checkpoint", "--out"),
    "port, refused file": (["--variant", "nano", "--out", "other.h5"], "--checkpoint", "--keep-failed"),
    "port, report": (["--variant", "nano", "--out", "other.h5"], "--checkpoint", "--report"),
    "check, report": (["check", "--variant", "nano"], "--weights", "--report"),
    "check, report over checkpoint": (["check", "--variant", "nano", "--weights", "w.h5"], "--checkpoint", "--report"),
    "check --from": (["check"], "--from", "--report"),
    "check --baseline": (["check", "--from", "r.json"], "--baseline", "--report"),
    "revert": (["revert", "--variant", "nano"], "--weights", "--out"),
    "revert, report": (["revert", "--variant", "nano", "--out", "other.pth"], "--weights", "--report"),
    "export": (["export", "--variant", "nano", "--format", "onnx"], "--weights", "--out"),
    "export over checkpoint": (["export", "--variant", "nano", "--weights", "w.h5"], "--checkpoint", "--out"),
    "export, report": (["export", "--variant", "nano", "--out", "o.onnx"], "--weights", "--report"),
}
# The suffix that each output option needs to get as far as the comparison.
SUFFIXES = {"--out": ".onnx", "--keep-failed": ".h5", "--report": ".json"}


@pytest.mark.parametrize("case", CLASHES)
def test_an_output_that_is_an_input_is_refused_before_any_work(run_cli: RunCli, tmp_path: Path, case: str) -> None:
    arguments, reads, writes = CLASHES[case]
    suffix = ".pth" if case == "revert" else ".h5" if case == "port" else SUFFIXES[writes]
    path = tmp_path / f"x{suffix}"
    path.write_text("content")
    for spelled in spellings(path).values():
        # Give the links a valid suffix, so that the check of suffixes is not what refuses them.
        renamed = spelled
        if spelled.suffix != suffix:
            renamed = spelled.rename(spelled.with_name(f"{spelled.name}{suffix}"))
        result = run_cli(*arguments, reads, path, writes, renamed)
        assert result.exit_code == 2, result.output
        assert f"{writes} {renamed} is also the file that {reads} reads" in result.output
        assert path.read_text() == "content"


def test_two_outputs_of_one_name(run_cli: RunCli, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.h5"
    arguments = ("--variant", "nano", "--checkpoint", checkpoint, "--out", out)
    for more in (("--keep-failed", out), ("--report", f"{out}.parity.json"), ("--keep-failed", f"{out}.parity.json")):
        result = run_cli(*arguments, *more)
        assert result.exit_code == 2, result.output
        assert "writes" in result.output
    assert list(tmp_path.iterdir()) == []


def test_port_all_is_refused_as_a_whole(run_cli: RunCli, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "van_nano.h5"
    path.write_bytes(checkpoint.read_bytes())
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    result = run_cli(
        "port-all", "--out-dir", tmp_path, "--variant", "nano", "--checkpoint", f"nano={path}", "--no-check"
    )
    assert result.exit_code == 2, result.output
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    # The output of one variant is the input of another.
    chosen = (
        "--variant",
        "b0",
        "--variant",
        "nano",
        "--checkpoint",
        f"b0={path}",
        "--checkpoint",
        f"nano={checkpoint}",
    )
    result = run_cli("port-all", "--out-dir", tmp_path, *chosen, "--no-check")
    assert result.exit_code == 2, result.output
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_a_report_rendered_onto_itself(run_cli: RunCli, tmp_path: Path) -> None:
    from porting.reports.document import to_json
    from tests.reports.test_reports import PASSED

    path = tmp_path / "r.json"
    path.write_text(to_json(PASSED))
    result = run_cli("report", path, "--format", "html", "--out", path)
    assert result.exit_code == 2, result.output
    assert json.loads(path.read_text())["schema_version"] == 3


@pytest.mark.parametrize("what", ["device", "pipe", "link"])
def test_an_output_that_is_no_regular_file(run_cli: RunCli, checkpoint: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "x.h5"
    if what == "pipe":
        os.mkfifo(out)
    else:
        out.symlink_to(os.devnull)
    result = run_cli("--variant", "nano", "--checkpoint", checkpoint, "--out", out, "--no-check")
    assert result.exit_code == 6, result.output
    assert "not a regular file" in result.output
    assert not out.is_file()


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["--variant", "nano", "--no-check", "--out", "x.h5", "--checkpoint"], 3),
        (["inspect"], 5),
        (["report"], 8),
        (["check", "--from"], 8),
        (["revert", "--variant", "nano", "--out", "x.pth", "--weights"], 5),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_inputs_that_never_end_or_never_come(run_cli: RunCli, tmp_path: Path, command: list[str], code: int) -> None:
    os.mkfifo(tmp_path / "pipe.h5")
    endless = Path("/dev/zero")
    for path in (tmp_path / "pipe.h5", endless):
        result = run_cli(*command, path)
        assert result.exit_code == code, result.output
        assert isinstance(result.exception, SystemExit)


def test_a_report_for_a_program_goes_to_standard_output_alone(
    run_cli: RunCli, checkpoint: Path, ported: Path, tmp_path: Path
) -> None:
    for name in ("-", "/dev/stdout"):
        result = run_cli(
            "check",
            "--variant",
            "nano",
            "--weights",
            ported,
            "--checkpoint",
            checkpoint,
            "--samples",
            1,
            "--report",
            name,
        )
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["passed"]
        assert "AT PARITY" in result.stderr
        identity = {"name": ported.name, "sha256": hashlib.sha256(ported.read_bytes()).hexdigest()}
        assert report["context"]["file"] == identity
    result = run_cli("inspect", ported)
    assert "provenance" in result.stdout, "the next command prints its results as usual"


def test_a_report_of_another_file_does_not_count(run_cli: RunCli, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.h5"
    assert run_cli("--variant", "nano", "--checkpoint", checkpoint, "--out", out, "--samples", 1).exit_code == 0
    report = f"{out}.parity.json"
    assert run_cli("check", "--from", report).exit_code == 0
    assert "x.h5.parity.json: AT PARITY" in run_cli("inspect", out).output
    other = out.read_bytes().replace(b'"nano"', b'"nanx"')
    assert other != out.read_bytes()
    out.write_bytes(other)
    result = run_cli("check", "--from", report)
    assert result.exit_code == 8, result.output
    assert "belongs to a file other than" in result.output
    assert "x.h5.parity.json: cannot be used" in run_cli("inspect", out).output


@pytest.mark.parametrize(("redirection", "code"), [(">/dev/full", 6), (">&-", 0), ("| head -c 1", 141)])
def test_standard_output_that_is_full_or_closed(redirection: str, code: int) -> None:
    command = f"{sys.executable} -m porting.cli.main report {{}} --all-layers {redirection}"
    from porting.reports.document import to_json
    from tests.reports.test_reports import PASSED

    path = Path(os.environ.get("TMPDIR", "/tmp"), f"report-{os.getpid()}.json")
    path.write_text(to_json(PASSED))
    try:
        # `head` must have exited before anything is printed.
        text = (
            command.format(path).replace("| head -c 1", "> >(exec true)")
            if "head" in redirection
            else command.format(path)
        )
        script = f"set -o pipefail; {text}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    finally:
        path.unlink()
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
