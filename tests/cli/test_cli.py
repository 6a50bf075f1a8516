from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import torch
from click.testing import Result

import van_tf
from porting.files import weights_file
from porting.references.van import build_van
from porting.tasks import case as case_module

RunCli = Callable[..., Result]


def test_a_port(run_cli: RunCli, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "van_nano.h5"
    result = run_cli("--variant", "nano", "--checkpoint", checkpoint, "--out", out, "--samples", 2)
    assert result.exit_code == 0, result.output
    assert "AT PARITY: 166 tensors, outputs exact to " in result.output
    assert "216 tensors ported, 18 dropped by name, none left over." in result.output
    assert f"Wrote {out} and {out}.parity.json" in result.output
    assert "block3.1" in result.output


def test_all_layers(run_cli: RunCli, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("--variant", "nano", "--checkpoint", checkpoint, "--out", tmp_path / "x.h5", "--samples", 1)
    assert "block3.1.mlp.dwconv.dwconv" in run_cli(*arguments, "--all-layers").output


def test_the_name_of_the_file_has_a_default(
    run_cli: RunCli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_cli("--variant", "nano", "--checkpoint", checkpoint, "--no-check")
    assert result.exit_code == 0, result.output
    assert "Not checked, as requested" in result.output
    assert (tmp_path / "van_nano.h5").is_file()


def test_not_at_parity_is_exit_code_1(run_cli: RunCli, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.h5"
    result = run_cli("--variant", "nano", "--checkpoint", checkpoint, "--out", out, "--samples", 1, "--max-ratio", 1e-3)
    assert result.exit_code == 1
    assert "First divergence: patch_embed1.proj" in result.output
    assert "Error: " in result.output
    assert not out.exists()


def test_every_report_is_written_even_when_the_check_fails(run_cli: RunCli, checkpoint: Path, tmp_path: Path) -> None:
    reports = [tmp_path / name for name in ("r.html", "r.md", "r.xml", "r.json")]
    result = run_cli(
        *("--variant", "nano", "--checkpoint", checkpoint, "--out", tmp_path / "x.h5", "--samples", 1),
        *("--max-ratio", 1e-3),
        *(argument for path in reports for argument in ("--report", path)),
    )
    assert result.exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json", "r.md", "r.xml"]


def test_a_report_of_no_known_format_is_found_before_the_work(run_cli: RunCli, tmp_path: Path) -> None:
    result = run_cli("--variant", "nano", "--report", tmp_path / "r.pdf", "--checkpoint", tmp_path / "is never opened")
    assert result.exit_code == 6
    assert "Use one of .json, .html, .md, .xml" in result.output


@pytest.fixture
def ported(run_cli: RunCli, checkpoint: Path, tmp_path: Path) -> Path:
    out = tmp_path / "nano.h5"
    result = run_cli("--variant", "nano", "--checkpoint", checkpoint, "--out", out, "--samples", 1)
    assert result.exit_code == 0, result.output
    return out


def test_check_of_a_file(run_cli: RunCli, checkpoint: Path, ported: Path, tmp_path: Path) -> None:
    arguments = ("check", "--variant", "nano", "--weights", ported, "--checkpoint", checkpoint, "--samples", 1)
    assert run_cli(*arguments).exit_code == 0
    with h5py.File(ported, "r+") as file:
        file["block2_0/mlp/fc2/bias"][0] += 0.01
    result = run_cli(*arguments, "--report", tmp_path / "r.json")
    assert result.exit_code == 1
    assert "Error: block2.0.mlp.fc2: " in result.output
    # Judge again from the report alone, with other limits.
    assert run_cli("check", "--from", tmp_path / "r.json").exit_code == 1
    loose = ("--max-ratio", 1e9, "--max-exact-ratio", 1e18)
    judged = run_cli("check", "--from", tmp_path / "r.json", *loose)
    assert judged.exit_code == 1
    assert "Weights that differ from the checkpoint (1): block2_0/mlp/fc2/bias" in judged.output
    assert run_cli("check", "--from", tmp_path / "r.json", "--limit", "block2.0.mlp.fc2:1e9").exit_code == 1
    # Compare with the report of the port.
    baseline = run_cli(
        *("check", "--from", tmp_path / "r.json", *loose),
        *("--baseline", f"{ported}.parity.json"),
    )
    assert baseline.exit_code == 1
    assert "Worse than the baseline: block2.0.mlp.fc2 (exact)" in baseline.output


def test_check_of_what_does_not_fit(run_cli: RunCli, checkpoint: Path, ported: Path, tmp_path: Path) -> None:
    missing = run_cli("check", "--variant", "nano", "--weights", tmp_path / "no.h5", "--checkpoint", checkpoint)
    assert missing.exit_code == 5
    other = tmp_path / "other.h5"
    van_tf.van_nano(classes=3).save(tmp_path / "other.keras")
    weights_file.write_weights(other, van_tf.van_nano(classes=3), zeros_of(van_tf.van_nano(classes=3)))
    result = run_cli("check", "--variant", "nano", "--weights", other, "--checkpoint", checkpoint)
    assert result.exit_code == 7
    assert "its variables do not match those of van_tf.van_nano(): 2 of another shape: head/kernel" in result.output
    assert run_cli("check", "--variant", "nano").exit_code == 2
    assert run_cli("check", "--from", "x.json", "--variant", "nano").exit_code == 2
    assert run_cli("check", "--from", tmp_path / "no.json").exit_code == 5
    assert run_cli("check", "--from", "x.json", "--limit", "head").exit_code == 2


def zeros_of(model: keras.Model) -> dict[str, np.ndarray]:
    return {path: np.zeros(shape, np.float32) for path, shape in weights_file.variable_shapes(model).items()}


def test_report_again(run_cli: RunCli, ported: Path, tmp_path: Path) -> None:
    source = f"{ported}.parity.json"
    assert "AT PARITY" in run_cli("report", source).output
    assert run_cli("report", source, "--format", "markdown").output.startswith("## ✅ Parity of van nano")
    assert run_cli("report", source, "--format", "junit").output.startswith("<?xml")
    written = run_cli("report", source, "--format", "html", "--out", tmp_path / "r.html")
    assert written.exit_code == 0
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    assert run_cli("report", source, "--format", "json").output == Path(source).read_text()
    (tmp_path / "x.json").write_text("{}")
    assert run_cli("report", tmp_path / "x.json").exit_code == 8


def write_html(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><body>Sign in</body></html>")


def write_b0(path: Path) -> None:
    torch.save({"state_dict": build_van("b0").state_dict()}, path)


ERRORS = {
    "missing": (lambda path: None, 5, "no such file", "Check the path"),
    "html": (write_html, 3, "not a checkpoint: a web page", "Download the file itself"),
    "b0 as nano": (write_b0, 4, "are not those of the model", "use --variant b0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_have_a_message_a_hint_and_a_code(run_cli: RunCli, tmp_path: Path, name: str) -> None:
    write, code, message, hint = ERRORS[name]
    write(tmp_path / "x.pth")
    result = run_cli("--variant", "nano", "--checkpoint", tmp_path / "x.pth", "--out", tmp_path / "x.h5")
    assert result.exit_code == code
    assert message in result.output
    assert hint in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "x.h5").exists()


def test_an_output_that_cannot_be_written(run_cli: RunCli, checkpoint: Path, tmp_path: Path) -> None:
    result = run_cli("--variant", "nano", "--checkpoint", checkpoint, "--out", tmp_path / "no" / "x.h5")
    assert result.exit_code == 6
    assert "does not exist" in result.output
    assert "mkdir -p" in result.output


def test_no_official_file(run_cli: RunCli, tmp_path: Path) -> None:
    result = run_cli("--variant", "b5", "--out", tmp_path / "x.h5")
    assert result.exit_code == 5
    assert "no official checkpoint of van b5 is known on the Hugging Face hub" in result.output


def test_interrupted(run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(case_module, "read_checkpoint", interrupt)
    result = run_cli("--variant", "nano", "--out", tmp_path / "x.h5")
    assert result.exit_code == 130
    assert result.output.strip() == "Interrupted; nothing was written."
    assert list(tmp_path.iterdir()) == []


def test_usage(run_cli: RunCli) -> None:
    assert run_cli("--variant", "b9").exit_code == 2
    assert run_cli("--out", "x.h5").exit_code == 2
    assert "--variant is required" in run_cli("--out", "x.h5").output
    mixed = run_cli("--variant", "nano", "inspect", "x.h5")
    assert mixed.exit_code == 2
    assert "the options of a port after inspect" in mixed.output


def test_inspect(run_cli: RunCli, checkpoint: Path, tmp_path: Path) -> None:
    result = run_cli("inspect", checkpoint)
    assert result.exit_code == 0
    assert "block1.0.attn.spatial_gating_unit.conv_spatial.weight" in result.output
    assert "32x1x7x7" in result.output
    assert "234 tensors" in result.output

    out = tmp_path / "x.h5"
    run_cli("--variant", "nano", "--checkpoint", checkpoint, "--out", out, "--no-check")
    assert '"status": "not checked"' in run_cli("inspect", out).output
    facts = json.loads(run_cli("inspect", out, "--json").output)
    assert facts["provenance"]["variant"] == "nano"
    assert len(facts["tensors"]) == 216

    assert run_cli("inspect", tmp_path / "missing").exit_code == 5


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from porting.cli.main import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'keras', 'tensorflow', 'h5py', 'rich', 'huggingface_hub', 'PIL', 'matplotlib',"
        " 'jinja2', 'junitparser'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run_python(code).endswith("[]")


def test_van_tf_leaves_pytorch_alone() -> None:
    code = "import sys, van_tf; print(sorted({'torch', 'timm', 'porting', 'torchvision'} & set(sys.modules)))"
    assert run_python(code) == "[]"


def test_a_pipe_gets_the_result_and_no_noise(checkpoint: Path, tmp_path: Path) -> None:
    """Run the real command in its own process: TensorFlow starts silently, and no progress is drawn."""
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    command = [sys.executable, "-m", "porting.cli.main", "--variant", "nano", "--checkpoint", str(checkpoint)]
    done = subprocess.run(
        [*command, "--out", "nano.h5", "--samples", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "AT PARITY" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nano.h5", "nano.h5.parity.json"]
