"""Tests `van-port map`: models named on the command line, rows in a file, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result

import porting
from porting.errors import KeyMapError, SourceError
from porting.mapping.rows_file import read_rows, rows_text
from porting.mapping.rules import KeyRule

RunCli = Callable[..., Result]
MODELS = """
from torch import nn
import keras
from keras import layers

def reference(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 2))

def candidate(width=4, stride=1):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(width, 3, stride, "same" if stride > 1 else "valid", activation="relu", name="conv")(inputs)
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))

def broken():
    raise RuntimeError("[bold]no")

def number():
    return 3
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    return path


def test_rows_are_proposed_written_and_taken(run_cli: RunCli, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.toml"
    arguments = ("--source-arg", "width=6", "--target-arg", "width=6")
    result = run_cli("map", f"{models}:reference", f"{models}:candidate", *arguments, "--out", out, "--all-rows")
    assert result.exit_code == 0, result.output
    assert "0 -> conv (conv): proven, exact from this layer to the outputs" in result.output
    assert "2 rows proven, 0 likely, 0 open" in result.output
    rows = porting.read_rows(out)
    assert rows == [KeyRule("0", "conv", "conv"), KeyRule("3", "head", "dense:6x6x6")]
    namespace: dict[str, Callable[..., object]] = {}
    exec(MODELS, namespace)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    reference, candidate = namespace["reference"](6), namespace["candidate"](6)
    ported = porting.port_weights(reference.eval(), candidate, rows, inputs=images)  # type: ignore[attr-defined]
    assert ported.require_parity()


WITH_CONSTANT = """
import torch
from torch import nn
import keras
from keras import layers

class Windowed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.register_buffer("window", torch.tensor([0.25, 0.75, 0.5]))

    def forward(self, x):
        return self.fc(x * self.window)

def candidate():
    inputs = keras.Input((3,))
    return keras.Model(inputs, layers.Dense(4, name="head")(layers.Rescaling([0.25, 0.75, 0.5])(inputs)))
"""


def test_constants_of_the_code_have_rows(run_cli: RunCli, tmp_path: Path) -> None:
    """What the map calls complete must be all that port, check and revert need."""
    models, out, own, back = (tmp_path / name for name in ("models.py", "rows.toml", "own.pth", "back.pth"))
    models.write_text(WITH_CONSTANT)
    result = run_cli("map", f"{models}:Windowed", f"{models}:candidate", "--out", out)
    assert result.exit_code == 0, result.output
    assert "window -> none (constant)" in result.output
    assert KeyRule("window", "", "constant") in read_rows(out)
    namespace: dict[str, Callable[[], torch.nn.Module]] = {}
    exec(WITH_CONSTANT, namespace)
    torch.save(namespace["Windowed"]().state_dict(), own)
    given = ["--source", f"{models}:Windowed", "--target", f"{models}:candidate", "--map", out]
    result = run_cli(*given, "--checkpoint", own, "--out", tmp_path / "x.h5")
    assert result.exit_code == 0, result.output
    result = run_cli("revert", *given, "--weights", tmp_path / "x.h5", "--out", back)
    assert result.exit_code == 0, result.output
    before, after = torch.load(own, weights_only=True), torch.load(back, weights_only=True)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    result = run_cli("map", f"{models}:Windowed", f"{models}:candidate", "--map", out)
    assert result.exit_code == 0, result.output


def test_a_row_has_a_target_unless_its_kind_has_none() -> None:
    with pytest.raises(KeyMapError, match="row 'window': the kind constant has no target"):
        KeyRule("window", "head", "constant")
    with pytest.raises(KeyMapError, match="row 'fc': the kind dense needs a target"):
        KeyRule("fc", "", "dense")


def test_json_and_given_inputs(run_cli: RunCli, models: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32))
    result = run_cli("map", f"{models}:reference", f"{models}:candidate", "--inputs", tmp_path / "x.npz", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["complete"]
    assert [row["confidence"] for row in found["rows"]] == ["proven", "proven"]


def test_two_networks_that_differ_are_exit_code_4(run_cli: RunCli, models: Path) -> None:
    result = run_cli("map", f"{models}:reference", f"{models}:candidate", "--target-arg", "stride=2")
    assert result.exit_code == 4, result.output
    assert "conv does not give what 0 gives: " in result.output
    assert "stride is (2, 2) in Keras, (1, 1) in PyTorch" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("reference", "models.py:candidate"), 2, "does not name a model"),
        (("nowhere.py:make", "models.py:candidate"), 5, "no such file"),
        (("models.py:nothing", "models.py:candidate"), 2, "has no 'nothing'"),
        (("models.py:broken", "models.py:candidate"), 2, "RuntimeError: [bold]no"),
        (("models.py:number", "models.py:candidate"), 2, "makes a int, not a PyTorch model"),
        (("models.py:reference", "models.py:number"), 2, "makes a int, not a Keras model"),
        (("no_such_package:make", "models.py:candidate"), 2, "the package no_such_package is not installed"),
        (("models.py:reference", "keras.applications:Nothing"), 2, "keras.applications has no 'Nothing'"),
        (("models.py:reference", "models.py:candidate", "--pair", "x"), 2, "must have the form torch.name=keras/path"),
        (("models.py:reference", "models.py:candidate", "--pair", "9=conv"), 4, "'9' is no module"),
        (("models.py:reference", "models.py:candidate", "--source-arg", "x"), 2, "is not an argument"),
        (("models.py:reference", "models.py:candidate", "--inputs", "models.py"), 5, "not an .npz of inputs"),
    ],
)
def test_errors_are_one_message(
    run_cli: RunCli,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_cli("map", *arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert said in result.output


def test_a_half_finished_map_is_completed(run_cli: RunCli, models: Path, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.toml", tmp_path / "all.toml"
    rows.write_text(rows_text([KeyRule("3", "head", "dense:4x6x6")]))
    arguments = ("map", f"{models}:reference", f"{models}:candidate", "--map", rows)
    result = run_cli(*arguments, "--out", out)
    assert result.exit_code == 0, result.output
    assert read_rows(out) == [KeyRule("0", "conv", "conv"), KeyRule("3", "head", "dense:4x6x6")]
    before = rows.read_text()
    result = run_cli(*arguments, "--out", rows)
    assert result.exit_code == 2
    assert "is also the file that --map reads" in result.output
    assert rows.read_text() == before


def test_a_family_file_works_as_it_is_written(
    run_cli: RunCli, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    from porting.tasks.port import port
    from porting.tasks.revert import revert

    monkeypatch.chdir(tmp_path)
    arguments = ("map", f"{models}:reference", f"{models}:candidate", "--source-arg", "width=6")
    result = run_cli(*arguments, "--target-arg", "width=6", "--family", "own_net")
    assert result.exit_code == 0, result.output
    assert "Wrote own_net.py" in result.output
    text = (tmp_path / "own_net.py").read_text()
    assert 'KeyRule("3", "head", "dense:6x6x6")' in text
    monkeypatch.syspath_prepend(tmp_path)
    family = importlib.import_module("own_net").OwnNetFamily()
    torch.save(family.synthetic_reference(family.spec("default")).state_dict(), tmp_path / "own.pth")
    ported = port(family, "default", tmp_path / "own.h5", checkpoint=tmp_path / "own.pth")
    assert ported.report is not None
    assert ported.report.passed
    back = revert(family, "default", tmp_path / "own.h5", tmp_path / "back.pth")
    assert back.report is not None
    assert back.report.passed
    # A person may have completed it: it is never overwritten.
    result = run_cli(*arguments, "--family", "own_net")
    assert result.exit_code == 2
    assert "own_net.py exists already" in result.output
    assert (tmp_path / "own_net.py").read_text() == text
    result = run_cli(*arguments, "--family", "own net")
    assert result.exit_code == 2
    assert "cannot name a family" in result.output


def test_a_published_pair(run_cli: RunCli) -> None:
    pytest.importorskip("timm")
    result = run_cli(
        "map",
        "timm:tf_mobilenetv3_small_100",
        "keras.applications:MobileNetV3Small",
        "--target-arg",
        "include_preprocessing=False",
        "--absorb-epsilon",
    )
    assert result.exit_code == 0, result.output
    assert "rows proven, 0 likely, 0 open\nOutputs: exact in float64" in result.output


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x = 1",
        "row = 3",
        "[[row]]\nsource = 'a'",
        "[[row]]\nsource = 'a'\ntarget = 'b'\nkind = 3",
        "[[row]]\nsource = 'a'\ntarget = 'b'\nkind = 'none'",
        "row = [1]",
        "\x00",
        "a = " + "[" * 5000,
    ],
)
def test_files_that_are_no_rows(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.toml"
    path.write_text(text)
    with pytest.raises(KeyMapError):
        read_rows(path)
    with pytest.raises(SourceError, match="no such file"):
        read_rows(tmp_path / "none.toml")


def test_rows_come_back_whatever_their_names(tmp_path: Path) -> None:
    rows = [
        KeyRule('a"b\\c\n', "x/y", "conv"),
        KeyRule("layer{s}.0", "b{s+1}", "dense:2x3x4"),
        KeyRule("ü\x1b", "z", "dense"),
    ]
    path = tmp_path / "rows.toml"
    path.write_text(rows_text(rows, ["a note\nof two lines"]))
    assert read_rows(path) == rows
