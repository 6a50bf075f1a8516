from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from porting import port as port_module
from porting.references.van import build_van

RunCli = Callable[..., Result]


def test_a_port(run_cli: RunCli, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "van_nano.h5"
    result = run_cli("--variant", "nano", "--checkpoint", checkpoint, "--out", out, "--samples", 2)
    assert result.exit_code == 0, result.output
    assert "AT PARITY: 165 layers" in result.output
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
    assert "Not checked, as asked" in result.output
    assert (tmp_path / "van_nano.h5").is_file()


def test_not_at_parity_is_exit_code_1(run_cli: RunCli, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.h5"
    result = run_cli("--variant", "nano", "--checkpoint", checkpoint, "--out", out, "--samples", 1, "--max-ratio", 1e-3)
    assert result.exit_code == 1
    assert "NOT AT PARITY from patch_embed1.proj on" in result.output
    assert "Error: " in result.output
    assert not out.exists()


def write_html(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><body>Sign in</body></html>")


def write_b0(path: Path) -> None:
    torch.save({"state_dict": build_van("b0").state_dict()}, path)


ERRORS = {
    "missing": (lambda path: None, 5, "no such file", "Check the path"),
    "html": (write_html, 3, "not a checkpoint: a web page", "fetch the file itself"),
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

    monkeypatch.setattr(port_module, "read_checkpoint", interrupt)
    result = run_cli("--variant", "nano", "--out", tmp_path / "x.h5")
    assert result.exit_code == 130
    assert result.output.strip() == "Interrupted; nothing was written."
    assert list(tmp_path.iterdir()) == []


def test_usage(run_cli: RunCli) -> None:
    assert run_cli("--variant", "b9").exit_code == 2
    assert run_cli("--out", "x.h5").exit_code == 2
    assert "--variant is needed" in run_cli("--out", "x.h5").output
    mixed = run_cli("--variant", "nano", "inspect", "x.h5")
    assert mixed.exit_code == 2
    assert "do not go with inspect" in mixed.output


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
        "heavy = {'torch', 'timm', 'keras', 'tensorflow', 'h5py', 'rich', 'huggingface_hub', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run_python(code).endswith("[]")


def test_van_tf_leaves_pytorch_alone() -> None:
    code = "import sys, van_tf; print(sorted({'torch', 'timm', 'porting', 'torchvision'} & set(sys.modules)))"
    assert run_python(code) == "[]"


def test_a_pipe_gets_the_result_and_no_noise(checkpoint: Path, tmp_path: Path) -> None:
    """The real command in a process of its own: TensorFlow's start is quiet, and no progress is drawn."""
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
