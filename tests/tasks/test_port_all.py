from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from click.testing import Result

from porting.errors import CheckpointError
from porting.families.van import VanFamily
from porting.references.van import build_van
from porting.tasks.port_all import port_all

Cli = Callable[..., Result]


def test_a_failed_variant_does_not_end_the_run(family: VanFamily, checkpoint: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"no checkpoint")
    outcomes = list(port_all(family, {"b0": str(bad), "nano": str(checkpoint)}, tmp_path, check=False))
    assert [outcome.variant for outcome in outcomes] == ["b0", "nano"]
    assert isinstance(outcomes[0].error, CheckpointError)
    assert outcomes[1].error is None
    assert outcomes[1].path.is_file()
    assert not outcomes[0].path.exists()


def test_the_command_tells_all_and_exits_with_the_first_failure(run_cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    torch.save(build_van("b0", 10).state_dict(), tmp_path / "b0.pth")
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    out = tmp_path / "new" / "folder"
    locations = {"nano": checkpoint, "b0": tmp_path / "b0.pth", "b1": tmp_path / "bad.pth", "b2": tmp_path / "b0.pth"}
    options = [f"--checkpoint={variant}={path}" for variant, path in locations.items()]
    chosen = [f"--variant={variant}" for variant in locations]
    result = run_cli("port-all", "--out-dir", out, *options, *chosen, "--no-check")
    assert result.exit_code == 3
    assert sorted(path.name for path in out.iterdir()) == ["van_b0.h5", "van_nano.h5"]
    assert "2 of 4 ported" in result.output
    assert "b1: " in result.output
    assert "use --variant b0" in result.output


def test_all_well(run_cli: Cli, tmp_path: Path) -> None:
    result = run_cli("port-all", "--out-dir", tmp_path, "--variant", "nano", "--samples", 1, "--suffix", ".keras")
    assert result.exit_code == 0, result.output
    assert "at parity" in result.output
    assert (tmp_path / "van_nano.keras.parity.json").is_file()


def test_usage(run_cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    unused = run_cli("port-all", "--out-dir", tmp_path, "--variant", "nano", f"--checkpoint=b1={checkpoint}")
    assert (unused.exit_code, "names b1, which --variant does not select" in unused.output) == (2, True)
    assert run_cli("port-all", "--out-dir", tmp_path, "--checkpoint", "b9=x").exit_code == 2
