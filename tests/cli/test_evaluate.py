"""Tests `van-port evaluate` from the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

RunCli = Callable[..., Result]
COUNT = 40


@pytest.fixture(scope="module")
def ported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from porting.families.van import VanFamily
    from porting.tasks.port import port

    out = tmp_path_factory.mktemp("ported") / "nano.h5"
    port(VanFamily(), "nano", out, checkpoint=checkpoint, check=False)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        place = root / ("cat", "dog")[number % 2]
        place.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 50, 3)).astype(np.uint8)).save(place / f"{number}.png")
    return root


@pytest.fixture
def arguments(checkpoint: Path, ported: Path, folder: Path) -> list[str]:
    given = {"--variant": "nano", "--weights": ported, "--checkpoint": checkpoint, "--data": folder, "--batch-size": 16}
    return ["evaluate", *(str(each) for pair in given.items() for each in pair)]


def test_three_arms_and_reports_of_every_form(run_cli: RunCli, arguments: list[str], tmp_path: Path) -> None:
    reports = [tmp_path / f"e.{suffix}" for suffix in ("json", "html", "md")]
    options = [option for path in reports for option in ("--report", path)]
    result = run_cli(*arguments, "--max-flips", 0, *options)
    assert result.exit_code == 0, result.output
    for title in ("PyTorch", "Keras, same tensors", "Keras, own preprocessing"):
        assert title in result.output
    document = json.loads(reports[0].read_text())
    assert document["samples"] == COUNT
    assert document["steps"][0]["flips"] == 0
    assert "cat" in reports[1].read_text()
    again = run_cli("report", reports[0], "--format", "markdown", "--out", tmp_path / "again.md")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.md").read_text() == reports[2].read_text()
    assert "Keras, same tensors" in run_cli("report", reports[0]).output
    assert run_cli("report", reports[0], "--format", "junit").exit_code == 2


@pytest.mark.slow
def test_gates_end_in_exit_code_1(run_cli: RunCli, arguments: list[str], tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "import numpy as np\ndef prepare(image):\n    return np.resize(image[::-1] / 255.0, (64, 64, 3)) * 8.0\n"
    )
    baseline = tmp_path / "baseline.json"
    assert run_cli(*arguments, "--report", baseline, "--keras-preprocessing", "none").exit_code == 0
    assert run_cli(*arguments, "--baseline", baseline, "--keras-preprocessing", "none").exit_code == 0
    text = baseline.read_text()
    document = json.loads(text)
    document["arms"][0]["top1"]["rate"] = 1.0
    baseline.write_text(json.dumps(document))
    worse = run_cli(*arguments, "--baseline", baseline, "--keras-preprocessing", "none")
    assert worse.exit_code == 1
    assert "below the baseline's" in worse.output
    changed = run_cli(*arguments, "--keras-preprocessing", f"{own}:prepare", "--max-drop", 0)
    assert "The preprocessing changes" in changed.output


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--data", "nowhere"], 5, "no such folder"),
        (["--weights", "nowhere.h5"], 5, "nowhere.h5"),
        (["--baseline", "nowhere.json"], 5, "nowhere.json"),
        (["--labels", "nowhere.txt"], 5, "nowhere.txt"),
        (["--report", "a.xml"], 6, "does not say what to write"),
        (["--keras-preprocessing", "nowhere.py:f"], 5, "nowhere.py: no such file"),
        (["--engine", "ray", "--ray-address", "127.0.0.1:9"], 10, "nothing answers at 127.0.0.1:9"),
    ],
)
def test_what_a_user_gets_wrong(
    run_cli: RunCli, arguments: list[str], options: list[str], code: int, message: str, tmp_path: Path
) -> None:
    result = run_cli(*arguments, *options)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_nothing_that_is_read_is_overwritten(run_cli: RunCli, arguments: list[str], ported: Path) -> None:
    before = ported.read_bytes()
    result = run_cli(*arguments, "--resume", ported)
    assert result.exit_code == 2
    assert "is also the file that --weights reads" in result.output
    assert ported.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "none"], "no such folder"),
        (["--labels", "none.txt"], "none.txt: no such file"),
        (["--keras-preprocessing", "none.py:prepare"], "none.py: no such file"),
        (["--pytorch-preprocessing", "none.py:prepare"], "none.py: no such file"),
        (["--variant", "b0"], "holds weights of van nano"),
    ],
)
def test_what_is_wrong_shows_before_tensorflow_loads(
    run_cli: RunCli, arguments: list[str], options: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object) -> None:
        raise AssertionError("TensorFlow was started")

    monkeypatch.setattr("porting.tasks.evaluate.start_tensorflow", start)
    result = run_cli(*arguments, *options)
    assert said in result.output
    assert result.exit_code not in {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_end_in_the_midst_loses_nothing(
    arguments: list[str], folder: Path, tmp_path: Path, how: signal.Signals
) -> None:
    kept, report = tmp_path / "progress.json", tmp_path / "report.json"
    images = sorted(folder.rglob("*.png"))
    rows = [f"{path},{number % 2}" for number in range(800) for path in images]
    (tmp_path / "test.csv").write_text("\n".join(["image,label", *rows]))
    command = [sys.executable, "-m", "porting.cli.main", *arguments, "--data", str(tmp_path / "test.csv")]
    command += ["--resume", str(kept), "--report", str(report)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not kept.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(how)
    _, said = process.communicate(timeout=120)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    if how == signal.SIGINT:
        assert "Run the same command again" in said
    done = json.loads(kept.read_text())["tally"]["counts"]["samples"]
    assert 0 < done < len(rows)
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads(report.read_text())["samples"] == len(rows)
    assert not kept.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano.tflite", "nano.onnx", "nano_saved"])
def test_exports_are_evaluated_in_their_own_runtimes(
    run_cli: RunCli, arguments: list[str], ported: Path, checkpoint: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / name
    given = ["--variant", "nano", "--weights", ported, "--out", out, "--no-check"]
    exported = run_cli("export", *given, *([] if "." in name else ["--format", "saved_model"]))
    assert exported.exit_code == 0, exported.output
    result = run_cli(*arguments, "--weights", out, "--keras-preprocessing", "none", "--max-flips", 0)
    assert result.exit_code == 0, result.output
    assert f"no answer of {COUNT} samples changes" in result.output
