from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import van_tf
from porting.errors import (
    FailedParityError,
    KeyMapError,
    OutputError,
    ParityError,
    SourceError,
    WeightsFileError,
)
from porting.families.base import by_path
from porting.families.van import NAMINGS, VanFamily
from porting.files.checkpoint import read_checkpoint
from porting.files.weights_file import weight_shapes, write_h5, write_provenance
from porting.mapping.convert import convert, invert
from porting.mapping.naming import Naming, naming_called
from porting.models.traverse import named_variables
from porting.references.van import VAN, VARIANTS, VanShape
from porting.sources.table import Source
from porting.tasks import revert as module
from porting.tasks.case import open_case
from porting.tasks.options import CheckOptions
from porting.tasks.port import port
from porting.tasks.revert import DTYPES, revert
from tests.mapping.test_naming import transformers_model

Cli = Callable[..., Result]
ONE = CheckOptions(samples=1)
os.umask(UMASK := os.umask(0))


@pytest.fixture(scope="module")
def ported(family: VanFamily, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ported") / "nano.h5"
    port(family, "nano", out, checkpoint=checkpoint, check=False)
    return out


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_port_comes_back_bit_by_bit(family: VanFamily, ported: Path, reference: VAN, tmp_path: Path) -> None:
    out = tmp_path / "back.pth"
    result = revert(family, "nano", ported, out, options=ONE)
    assert result.report is not None
    assert result.report.passed
    assert names_in(tmp_path) == ["back.pth", "back.pth.parity.json"]
    back = torch.load(out, weights_only=True)
    assert back.keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(back[name], tensor), name
    # The official class loads it unchanged.
    type(reference)(**VARIANTS["nano"]._asdict(), num_classes=10).load_state_dict(back, strict=True)


def test_a_fine_tuned_model_goes_to_the_class_of_transformers(family: VanFamily, tmp_path: Path) -> None:
    model = van_tf.van_nano(classes=7)
    rng = np.random.default_rng(0)
    for variable in model.weights:
        spread = rng.normal(scale=0.1, size=variable.shape) + ("gamma" in variable.path or "scale" in variable.path)
        variable.assign(np.abs(spread) if "variance" in variable.path else spread)
    weights, out = tmp_path / "tuned.weights.h5", tmp_path / "model.safetensors"
    model.save_weights(weights)
    result = revert(family, "nano", weights, out, layout="transformers", options=ONE)
    assert (result.spec.naming.name, result.spec.num_classes) == ("transformers", 7)
    theirs = transformers_model("nano", 7)
    theirs.load_state_dict(load_file(out), strict=True)
    images = rng.normal(size=(2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits
    np.testing.assert_allclose(model(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@st.composite
def shapes(draw: st.DrawFn) -> VanShape:
    dims, depths, ratios = (tuple(draw(st.integers(1, most)) for _ in range(4)) for most in (6, 3, 3))
    return VanShape(dims, depths, ratios)


@given(
    shape=shapes(),
    classes=st.integers(0, 3),
    dtype=st.sampled_from(sorted(DTYPES)),
    layout=st.sampled_from([naming.name for naming in NAMINGS]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_tensor_survives_the_round_trip(
    family: VanFamily,
    tmp_path_factory: pytest.TempPathFactory,
    shape: VanShape,
    classes: int,
    dtype: str,
    layout: str,
    seed: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "drawn", shape)
        chosen = naming_called(NAMINGS, layout)
        family = VanFamily()  # a family caches the names of a variant
        patch.setattr(family, "table", (Source("van", "drawn", "none"),), raising=False)
        spec = family.spec("drawn", classes if chosen.head else 0, chosen)
        key_map, layers = family.key_map(spec), family.weight_shapes(spec)
        targets = by_path(layers)
        rng = np.random.default_rng(seed)
        # Any bits that form a finite number of the type.
        state_dict = {}
        for entry in key_map.entries:
            source_shapes = entry.transform.source_shapes([targets[entry.targets[0]]])
            assert source_shapes is not None
            drawn = rng.integers(0, 2**16, source_shapes[0], dtype=np.uint16)
            array = drawn.view(DTYPES[dtype]) if dtype != "float32" else rng.normal(size=drawn.shape).astype(np.float32)
            state_dict[entry.sources[0]] = np.where(np.isfinite(array.astype(np.float32)), array, array.dtype.type(0))
        weights = convert(state_dict, key_map, targets).weights
        path = tmp_path_factory.mktemp("drawn") / "x.h5"
        write_h5(path, layers, weights)
        with h5py.File(path) as file:
            read = {target: file[target][()] for target in targets}
        back = invert(read, key_map)
    assert back.keys() == state_dict.keys()
    for name, array in state_dict.items():
        assert back[name].astype(array.dtype).tobytes() == array.tobytes(), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(family: VanFamily, ported: Path, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "half.safetensors"
    revert(family, "nano", ported, out, dtype=dtype, check=False)
    kernel = read_checkpoint(out).state_dict["head.weight"]
    assert kernel.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    with h5py.File(ported) as file:
        np.testing.assert_array_equal(kernel, file["head/kernel"][()].T.astype(kernel.dtype))


def test_a_number_that_the_type_cannot_hold(family: VanFamily, tmp_path: Path) -> None:
    model = van_tf.van_nano()
    model.get_layer("head").bias.assign(np.full(10, 1e6, np.float32))
    model.save_weights(tmp_path / "x.weights.h5")
    with pytest.raises(OutputError, match="head.bias has values that float16 cannot hold"):
        revert(family, "nano", tmp_path / "x.weights.h5", tmp_path / "x.pth", dtype="float16")
    assert names_in(tmp_path) == ["x.weights.h5"]


@pytest.mark.slow
@pytest.mark.parametrize("classes", [pytest.param(10, id="with a head"), pytest.param(0, id="without")])
@pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: naming.name)
def test_every_naming_is_written_with_and_without_a_head(
    family: VanFamily, tmp_path: Path, naming: Naming, classes: int
) -> None:
    epsilon = naming.settings["layer_norm_eps"]
    top: dict[str, object] = {"classes": classes} if classes else {"include_top": False}
    model = van_tf.van_nano(layer_norm_epsilon=epsilon, **top)
    weights = tmp_path / "x.weights.h5"
    model.save_weights(weights)
    write_provenance(weights, {"layout": naming.name, "settings": {"layer_norm_eps": epsilon}})
    if classes and not naming.head:
        for check in (True, False):
            with pytest.raises(KeyMapError, match="has a head of 10 classes, but segmentation names include no head"):
                revert(family, "nano", weights, tmp_path / "x.pth", layout=naming.name, check=check)
        return
    for suffix, check in ((".pth", True), (".safetensors", False), (".bin", False)):
        out = tmp_path / f"x{suffix}"
        result = revert(family, "nano", weights, out, layout=naming.name, check=check, options=ONE)
        assert result.notes == ("Keras does not keep num_batches_tracked: 18 tensors of that name set to 0.",)
        case = open_case(family, "nano", out, layout=naming.name)
        assert (case.naming.name, case.num_classes) == (naming.name, classes)
        assert out.stat().st_mode & 0o777 == 0o666 & ~UMASK
    for wrong in (3, 10 - classes):
        error, message = (
            (KeyMapError, "classes were requested") if classes else (WeightsFileError, "2 arrays missing, of")
        )
        with pytest.raises(error, match=message):
            revert(family, "nano", weights, tmp_path / "y.pth", layout=naming.name, num_classes=wrong, check=False)


def test_a_replaced_file_keeps_its_mode(family: VanFamily, ported: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    out.touch(mode=0o640)
    out.chmod(0o640)
    revert(family, "nano", ported, out, check=False)
    assert out.stat().st_mode & 0o777 == 0o640


def test_the_weights_of_another_variant_are_refused_without_a_check_too(family: VanFamily, tmp_path: Path) -> None:
    model = van_tf.van_b0(classes=10)
    model.save(tmp_path / "x.keras")
    model.save_weights(tmp_path / "x.weights.h5")
    values = {name: np.asarray(variable) for name, variable in named_variables(model).items()}
    write_h5(tmp_path / "x.h5", weight_shapes(model), values)
    for weights in tmp_path.glob("x.*"):
        with pytest.raises(WeightsFileError, match="van_tf.van_nano"):
            revert(family, "nano", weights, tmp_path / "x.pth", num_classes=10, check=False)


def test_names_for_another_epsilon_are_refused(family: VanFamily, ported: Path, tmp_path: Path) -> None:
    """OpenMMLab's code has another epsilon, so the same weights make a different model there."""
    with pytest.raises(FailedParityError, match=r"eps is 1e-06 in Keras, 1e-05 in PyTorch|not at parity"):
        revert(family, "nano", ported, tmp_path / "x.pth", layout="mmpretrain", options=ONE)
    assert names_in(tmp_path) == []


def test_what_is_read_back_must_be_what_was_written(
    family: VanFamily, ported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = module._save

    def save_wrongly(path: Path, state_dict: dict[str, np.ndarray]) -> None:
        save(path, {**state_dict, "head.bias": state_dict["head.bias"] + np.float32(1e-6)})

    monkeypatch.setattr(module, "_save", save_wrongly)
    with pytest.raises(ParityError, match="read back from the file, 1 tensor not as written; the first is head.b"):
        revert(family, "nano", ported, tmp_path / "x.pth", check=False)
    assert names_in(tmp_path) == []


def test_errors(family: VanFamily, ported: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        revert(family, "nano", tmp_path / "none.h5", tmp_path / "x.pth")
    with pytest.raises(OutputError, match="the suffix does not name a format"):
        revert(family, "nano", ported, tmp_path / "x.h5")
    with pytest.raises(KeyMapError, match="there is no layout 'caffe'"):
        revert(family, "nano", ported, tmp_path / "x.pth", layout="caffe")


def test_the_command(run_cli: Cli, ported: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.pth.tar"
    result = run_cli("revert", "--variant", "nano", "--weights", ported, "--out", out, "--samples", 1)
    assert result.exit_code == 0, result.output
    assert "AT PARITY" in result.output
    assert f"{len(read_checkpoint(out).state_dict)} tensors in float32: official names" in result.output
    again = run_cli("check", "--variant", "nano", "--weights", ported, "--checkpoint", out, "--samples", 1)
    assert again.exit_code == 0, again.output
