"""A user's own two models on the command line: port, check, revert and export with a file of rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result

from porting.families.specs import build_model
from porting.models.synthetic import fill_with_synthetic_weights

RunCli = Callable[..., Result]
MODELS = """
import torch
from torch import nn
import keras
from keras import layers

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.points = nn.ModuleList(nn.Conv2d(6, 6, 1) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, images):
        x = torch.relu(self.norm(self.stem(images)))
        for point in self.points:
            x = torch.relu(point(x))
        return self.head(x.mean((2, 3)))

def candidate(epsilon=1e-5):
    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(6, 3, padding="same", name="first")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(epsilon=epsilon, name="first_norm")(x))
    for number in (1, 2, 3):
        x = layers.Conv2D(6, 1, activation="relu", name=f"point{number}")(x)
    return keras.Model(inputs, layers.Dense(4, name="out")(layers.GlobalAveragePooling2D()(x)))
"""
ROWS = """
[[row]]
source = "stem"
target = "first"
kind = "conv"
[[row]]
source = "norm"
target = "first_norm"
kind = "batch_norm"
[[row]]
source = "points.{s}"
target = "point{s+1}"
kind = "conv"
[[row]]
source = "head"
target = "out"
kind = "dense"
"""


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """The arguments that name both models. The checkpoint is in the same folder."""
    models, rows = tmp_path / "models.py", tmp_path / "rows.toml"
    models.write_text(MODELS)
    rows.write_text(ROWS)
    reference = build_model(f"{models}:Net", {})
    fill_with_synthetic_weights(reference, 1)
    torch.save(reference.state_dict(), tmp_path / "own.pth")
    return ["--source", f"{models}:Net", "--target", f"{models}:candidate", "--map", str(rows)]


def test_there_and_back(run_cli: RunCli, given: list[str], tmp_path: Path) -> None:
    checkpoint, weights, back = tmp_path / "own.pth", tmp_path / "own.h5", tmp_path / "back.pth"
    result = run_cli(*given, "--checkpoint", checkpoint, "--out", weights)
    assert result.exit_code == 0, result.output
    report = json.loads(weights.with_name("own.h5.parity.json").read_text())
    assert report["passed"]
    assert report["context"]["family"] == f"{given[1]} -> {given[3]}"
    assert run_cli("check", *given, "--weights", weights, "--checkpoint", checkpoint).exit_code == 0
    result = run_cli("revert", *given, "--weights", weights, "--out", back)
    assert result.exit_code == 0, result.output
    assert "without a head" not in result.output
    own, found = torch.load(checkpoint, weights_only=True), torch.load(back, weights_only=True)
    assert own.keys() == found.keys()
    assert all(torch.equal(own[name], found[name]) for name in own if "num_batches" not in name)


def test_a_wrong_number_and_another_epsilon_fail(run_cli: RunCli, given: list[str], tmp_path: Path) -> None:
    checkpoint, weights = tmp_path / "own.pth", tmp_path / "own.h5"
    result = run_cli(*given, "--target-arg", "epsilon=1e-3", "--checkpoint", checkpoint, "--out", weights)
    assert result.exit_code == 1, result.output
    assert not weights.exists()
    assert run_cli(*given, "--checkpoint", checkpoint, "--out", weights).exit_code == 0
    state = torch.load(checkpoint, weights_only=True)
    state["points.1.weight"][3, 2] *= 1.0001
    torch.save(state, checkpoint)
    result = run_cli("check", *given, "--weights", weights, "--checkpoint", checkpoint)
    assert result.exit_code == 1
    assert "points.1" in result.output


def test_another_number_of_classes_and_a_layout(run_cli: RunCli, given: list[str], tmp_path: Path) -> None:
    checkpoint, other = tmp_path / "own.pth", tmp_path / "other.pth"
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "head.weight": torch.ones(7, 6), "head.bias": torch.ones(7)}, other)
    result = run_cli(*given, "--checkpoint", other, "--out", tmp_path / "x.h5")
    assert result.exit_code == 4, result.output
    assert f"{other}: its tensors are not those of the model" in result.output
    assert "--source-arg and --target-arg" in " ".join(result.output.split())
    # The PyTorch model may be another than the checkpoint's, too.
    models = Path(given[1].rpartition(":")[0])
    models.write_text(
        MODELS.replace("def __init__(self):", "def __init__(self, classes=4):").replace("6, 4)", "6, classes)")
    )
    result = run_cli(*given, "--source-arg", "classes=5", "--checkpoint", checkpoint, "--out", tmp_path / "x.h5")
    assert result.exit_code == 4, result.output
    assert "head.weight: expected (5, 6), found (4, 6)" in result.output
    assert run_cli(*given, "--checkpoint", checkpoint, "--out", tmp_path / "x.h5").exit_code == 0
    result = run_cli(
        "revert", *given, "--source-arg", "classes=5", "--weights", tmp_path / "x.h5", "--out", tmp_path / "x.pth"
    )
    assert result.exit_code == 4, result.output
    for option in ("--layout", "--variant"):
        for arguments in ([*given, option, "foo"], [option, "foo", *given]):
            result = run_cli(*arguments, "--checkpoint", checkpoint, "--out", tmp_path / "x.h5")
            assert result.exit_code == 2, result.output
            assert "cannot be combined with --source" in " ".join(result.output.split())


def test_messages_name_the_file_of_rows(run_cli: RunCli, given: list[str], tmp_path: Path) -> None:
    checkpoint, rows, out = tmp_path / "own.pth", Path(given[5]), tmp_path / "x.h5"
    own = ROWS.replace("points.{s}", "points.0").replace("point{s+1}", "point1")
    for text, said in (
        (own, "no row takes this tensor of PyTorch's"),
        (ROWS.replace('"stem"', '"stm"'), "stm (nearest: stem)"),
        (ROWS.replace('"first"', '"furst"'), "the Keras model has no layer 'furst'"),
        (ROWS.replace('"batch_norm"', '"batchnorm"'), "there is no kind 'batchnorm'"),
        ("", "it has no [[row]]"),
        ("row = 3", "it has no [[row]]"),
    ):
        rows.write_text(text)
        result = run_cli(*given, "--checkpoint", checkpoint, "--out", out)
        said_in_one = " ".join(result.output.split())
        assert (result.exit_code, said in said_in_one, str(rows) in said_in_one) == (4, True, True), result.output
    rows.unlink()
    rows.mkdir()
    result = run_cli(*given, "--checkpoint", checkpoint, "--out", out)
    assert (result.exit_code, "is a folder" in result.output) == (5, True), result.output
    result = run_cli(*given[:4], "--checkpoint", checkpoint, "--out", out)
    assert "van-port map" in result.output
    assert run_cli(*given[:1], given[1].replace(":Net", ":Nett"), *given[2:]).exit_code == 5
    assert not out.exists()


def test_a_file_without_a_name_and_a_check_against_another_checkpoint(
    run_cli: RunCli, given: list[str], tmp_path: Path
) -> None:
    checkpoint, other, weights = tmp_path / "own.pth", tmp_path / "other.pth", tmp_path / "own.h5"
    assert run_cli(*given, "--checkpoint", checkpoint).exit_code == 2
    assert run_cli(*given, "--checkpoint", checkpoint, "--out", weights).exit_code == 0
    torch.save({**torch.load(checkpoint, weights_only=True), "head.bias": torch.ones(4)}, other)
    result = run_cli("check", *given, "--weights", weights, "--checkpoint", other)
    assert result.exit_code == 1
    assert "own.h5 was ported from own.pth, not from this checkpoint: its sha256" in " ".join(result.output.split())
    result = run_cli("check", *given, "--weights", weights)
    assert (result.exit_code, "published" in result.output) == (2, False), result.output
    report = weights.with_name("own.h5.parity.json")
    assert run_cli("check", "--from", report).exit_code == 0
    for option in ("--stress", "--strict-settings"):
        result = run_cli("check", "--from", report, option)
        assert (result.exit_code, f"{option} can change nothing" in " ".join(result.output.split())) == (2, True)
    result = run_cli("check", "--family", "vgg", "--variant", "vgg16", "--weights", weights, "--checkpoint", checkpoint)
    assert result.exit_code != 0


def test_export(run_cli: RunCli, given: list[str], tmp_path: Path) -> None:
    checkpoint, weights, out = tmp_path / "own.pth", tmp_path / "own.h5", tmp_path / "own.onnx"
    assert run_cli(*given, "--checkpoint", checkpoint, "--out", weights, "--no-check").exit_code == 0
    result = run_cli("export", *given, "--weights", weights, "--checkpoint", checkpoint, "--out", out)
    assert result.exit_code == 0, result.output
    assert out.exists()


def test_export_with_the_normalisation_that_the_user_states(run_cli: RunCli, given: list[str], tmp_path: Path) -> None:
    checkpoint, weights, out = tmp_path / "own.pth", tmp_path / "own.h5", tmp_path / "own.tflite"
    assert run_cli(*given, "--checkpoint", checkpoint, "--out", weights, "--no-check").exit_code == 0
    command = ["export", *given, "--weights", weights, "--checkpoint", checkpoint, "--out", out]
    stated = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]
    result = run_cli(*command, "--with-preprocessing")
    assert result.exit_code == 9, result.output
    assert "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225" in result.output
    for wrong, code, said in (
        (["--mean", "0.5"], 2, "give both --mean and --std"),
        (["--mean", "a,b", "--std", "1,1,1"], 2, "is no list of numbers"),
        (["--mean", "0.5", "--std", "0.5"], 9, "the images have 3 channels"),
        (["--mean", "0,0,0", "--std", "1,1,0"], 9, "not above 0"),
    ):
        result = run_cli(*command, *wrong)
        assert (result.exit_code, said in result.output) == (code, True), result.output
    assert not out.exists()
    result = run_cli(*command, "--with-preprocessing", *stated)
    assert result.exit_code == 0, result.output
    assert "1x32x32x3 float32" in result.output, result.output
    from ai_edge_litert.interpreter import Interpreter

    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.float32)
    run = Interpreter(str(out)).get_signature_runner()
    (name,) = run.get_input_details()
    (found,) = run(**{name: image}).values()
    reference = build_model(given[1], {})
    reference.load_state_dict(torch.load(checkpoint, weights_only=True))
    mean, std = (np.array([float(each) for each in text.split(",")]) for text in stated[1::2])
    ready = torch.from_numpy(((image / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        np.testing.assert_allclose(found, reference.eval()(ready).numpy(), rtol=0, atol=1e-4)
    result = run_cli(*command[:-1], tmp_path / "plain.tflite", *stated)
    assert result.exit_code == 0, result.output
    assert "(x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]" in result.output


TEXT = """
import keras
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(80, 8), nn.Linear(8, 5)

    def forward(self, token_ids, padding_mask):
        return self.out(self.table(token_ids)) * padding_mask[..., None]


def candidate():
    tokens, mask = (keras.Input((None,), name=name, dtype="int32") for name in ("token_ids", "padding_mask"))
    features = keras.layers.Dense(5, name="out")(keras.layers.Embedding(80, 8, name="table")(tokens))
    seen = keras.ops.cast(mask, "float32")[..., None]
    return keras.Model({"token_ids": tokens, "padding_mask": mask}, features * seen)
"""
TEXT_ROWS = """
[[row]]
source = "table"
target = "table"
kind = "embedding"

[[row]]
source = "out"
target = "out"
kind = "dense"
"""


def test_export_of_tokens(run_cli: RunCli, tmp_path: Path) -> None:
    models, rows = tmp_path / "models.py", tmp_path / "rows.toml"
    models.write_text(TEXT)
    rows.write_text(TEXT_ROWS)
    checkpoint, weights, out = tmp_path / "own.pth", tmp_path / "own.h5", tmp_path / "own.tflite"
    torch.save(build_model(f"{models}:Net", {}).state_dict(), checkpoint)
    given = ["--source", f"{models}:Net", "--target", f"{models}:candidate", "--map", str(rows)]
    result = run_cli(*given, "--checkpoint", checkpoint, "--out", weights)
    assert result.exit_code == 0, result.output
    files = ["--weights", weights, "--checkpoint", checkpoint, "--out", out]
    result = run_cli("export", *given, *files, "--input-size", "24")
    assert result.exit_code == 0, result.output
    assert "input token_ids 1x24 int32" in result.output
    assert "input padding_mask 1x24 int32" in result.output
    assert "output output_0" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--source", "timm:resnet18"], 2, "--target, --map is missing"),
        (["--source-arg", "a=1", "--variant", "nano"], 2, "need --source and --target"),
    ],
)
def test_half_of_it_is_wrong_usage(run_cli: RunCli, arguments: list[str], code: int, message: str) -> None:
    result = run_cli(*arguments)
    assert result.exit_code == code
    assert message in result.output


def test_errors_say_what_to_do(run_cli: RunCli, given: list[str], tmp_path: Path) -> None:
    result = run_cli(*given, "--variant", "nano")
    assert result.exit_code == 2
    result = run_cli(*given, "--out", tmp_path / "x.h5")
    assert result.exit_code == 5
    assert "--checkpoint FILE" in result.output
    Path(given[5]).write_text(ROWS.replace('"out"', '"aut"'))
    result = run_cli(*given, "--checkpoint", tmp_path / "own.pth", "--out", tmp_path / "x.h5")
    assert result.exit_code == 4
    assert "the Keras model has no layer 'aut'" in result.output


SUBCLASSED = """

class Candidate(keras.Model):
    def __init__(self):
        super().__init__()
        self.table = keras.layers.Embedding(80, 8, name="table")
        self.out = keras.layers.Dense(5, name="out")

    def call(self, inputs):
        mask = keras.ops.cast(inputs["padding_mask"], self.compute_dtype)
        return self.out(self.table(inputs["token_ids"])) * mask[..., None]


def subclassed():
    model = Candidate()
    model({name: keras.ops.ones((1, 4), "int32") for name in ("token_ids", "padding_mask")})
    return model
"""


def test_a_subclassed_model_is_checked_and_its_export_is_one_message(run_cli: RunCli, tmp_path: Path) -> None:
    models, rows, inputs = tmp_path / "models.py", tmp_path / "rows.toml", tmp_path / "inputs.npz"
    models.write_text(TEXT + SUBCLASSED)
    rows.write_text(TEXT_ROWS)
    tokens = np.random.default_rng(0).integers(0, 80, (2, 6)).astype(np.int32)
    np.savez(inputs, token_ids=tokens, padding_mask=np.ones_like(tokens))
    checkpoint, weights = tmp_path / "own.pth", tmp_path / "own.h5"
    torch.save(build_model(f"{models}:Net", {}).state_dict(), checkpoint)
    given = ["--source", f"{models}:Net", "--target", f"{models}:subclassed", "--map", str(rows)]
    given += ["--inputs", str(inputs)]
    result = run_cli(*given, "--checkpoint", checkpoint, "--out", weights)
    assert result.exit_code == 0, result.output
    files = ["--weights", weights, "--checkpoint", checkpoint, "--out", tmp_path / "x.onnx"]
    result = run_cli("export", *given, *files)
    assert result.exit_code == 9, result.output
    assert "a subclassed Keras model, which does not declare its inputs" in result.output
    assert not (tmp_path / "x.onnx").exists()
