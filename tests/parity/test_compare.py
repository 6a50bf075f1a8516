"""The check must pass correct ports and fail wrong ones. Each fault below occurred in a real port."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import keras
import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import porting
import van_tf
from porting.families.van import VanFamily
from porting.files.weights_file import assign_weights, variable_shapes
from porting.mapping.convert import convert
from porting.models.synthetic import fill_with_synthetic_weights
from porting.models.traverse import named_layers, named_variables
from porting.parity.report import EXACT, FLOAT32, Limits, ParityReport
from porting.references.van import VAN
from tests.families.toy import ToyFamily

check_parity = porting.check_parity
FAMILY = ToyFamily()
SPEC = FAMILY.spec("large")


@pytest.fixture(scope="module")
def toy() -> nn.Module:
    """A model with three blocks of sixteen channels. Tests must not change it."""
    model = FAMILY.build_reference(SPEC)
    fill_with_synthetic_weights(model, seed=1)
    return model.eval()


def ported(reference: nn.Module) -> keras.Model:
    model = FAMILY.build_candidate(SPEC)
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    assign_weights(model, convert(tensors, FAMILY.key_map(SPEC), variable_shapes(model)).weights)
    return model


@pytest.fixture
def candidate(toy: nn.Module) -> keras.Model:
    return ported(toy)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 20, 16, 3)).astype(np.float32)


def run(toy: nn.Module, candidate: keras.Model, images: np.ndarray, **arguments: Any) -> ParityReport:
    pairs = {pair.source: pair.target for pair in FAMILY.key_map(SPEC).layers}
    return check_parity(toy, candidate, images, pairs=pairs, **arguments)


def test_a_faithful_port_is_exact_in_every_layer(toy: nn.Module, candidate: keras.Model, images: np.ndarray) -> None:
    report = run(toy, candidate, images, batch_size=2)
    assert report.passed, report.objections
    assert report.first_divergence is None
    assert report.culprits == ()
    assert report.worst_exact is not None
    assert report.worst_exact.relative_error < 4e-15
    assert report.worst.views[FLOAT32].ratio < 8
    assert report.logits is not None
    assert report.logits.top1_agreement == report.logits.top5_agreement == report.logits.samples == 3
    names = [layer.source for layer in report.layers]
    assert names[0] == "stem.conv"
    assert names[-2:] == ["head", "output"]
    assert all(layer.shape[0] == 3 for layer in report.layers)
    assert all({EXACT, FLOAT32} == layer.views.keys() for layer in report.layers)
    # A result without a PyTorch module pairs with the input of the next module.
    assert {"input of norm", "blocks.0.act", "blocks.2"} <= set(names)
    assert report.unpaired_target == ("stem_pad",)
    assert report.verified is not None
    assert report.verified.verified == report.verified.weights == 2101
    assert report.audit is not None
    assert report.audit.settings > 40
    assert report.audit.differences == ()
    assert report.loud is not None
    assert report.loud.passed


def test_names_are_not_needed(toy: nn.Module, candidate: keras.Model, images: np.ndarray) -> None:
    report = check_parity(toy, candidate, images)
    assert report.passed, report.objections
    with_names = run(toy, candidate, images)
    assert [layer.source for layer in report.layers] == [layer.source for layer in with_names.layers]


def test_a_van_is_exact(reference: VAN, family: VanFamily, state_dict: dict[str, np.ndarray]) -> None:
    model = van_tf.van_nano()
    assign_weights(model, convert(state_dict, family.key_map(family.spec("nano")), variable_shapes(model)).weights)
    images = np.random.default_rng(0).normal(size=(2, 48, 48, 3)).astype(np.float32)
    report = check_parity(reference, model, images)
    assert report.passed, report.objections
    assert report.worst_exact is not None
    assert report.worst_exact.relative_error < 1e-14
    assert len(report.layers) == 166
    assert set(report.unpaired_target) == {f"patch_embed{stage}/pad" for stage in (1, 2, 3, 4)}
    assert report.unpaired_source == ()


def test_statistics_of_a_layer(toy: nn.Module, candidate: keras.Model, images: np.ndarray) -> None:
    head = run(toy, candidate, images).layers[-1]
    batch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        expected, truth = toy(batch).numpy(), copy.deepcopy(toy).double()(batch.double()).numpy()
    actual = np.asarray(candidate(images))
    assert (head.kind, head.shape) == ("output", (3, 5))
    view, difference = head.views[FLOAT32], head.difference
    assert view.scale.rms == pytest.approx(np.sqrt((truth**2).mean()))
    assert view.expected_error.max == pytest.approx(np.abs(expected - truth).max(), rel=1e-4)
    assert view.actual_error.rms == pytest.approx(np.sqrt(((actual - truth) ** 2).mean()), rel=1e-4)
    gap = actual.astype(np.float64) - truth
    assert difference.max == pytest.approx(np.abs(gap).max())
    assert difference.mean == pytest.approx(np.abs(gap).mean())
    assert difference.sqnr_db == pytest.approx(10 * np.log10((truth**2).sum() / (gap**2).sum()), rel=1e-5)
    assert difference.cosine == pytest.approx(1.0)
    worst = np.unravel_index(np.abs(gap).argmax(), actual.shape)
    assert difference.worst_index == tuple(int(i) for i in worst)
    assert difference.worst_actual == actual[worst]
    assert sum(difference.ulp_histogram) == 15
    assert difference.share_over == 0.0


def test_batches_add_up(toy: nn.Module, candidate: keras.Model, images: np.ndarray) -> None:
    whole, parts = (run(toy, candidate, images, batch_size=size) for size in (3, 2))
    for one, other in zip(whole.layers, parts.layers, strict=True):
        scales = one.views[FLOAT32].scale, other.views[FLOAT32].scale
        assert scales[0].rms == pytest.approx(scales[1].rms)
        assert scales[0].max == pytest.approx(scales[1].max)
        assert one.shape == other.shape


def test_both_models_are_left_as_they_were(images: np.ndarray) -> None:
    reference = FAMILY.build_reference(SPEC)
    fill_with_synthetic_weights(reference, seed=2)
    reference.train()
    reference.get_submodule("norm").eval()
    model = ported(reference)
    model.get_layer("norm").trainable = False
    before = {name: np.array(variable).tobytes() for name, variable in named_variables(model).items()}
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    modes = {name: module.training for name, module in reference.named_modules()}
    calls = keras.layers.Layer.__call__
    change_value("block2_pw/kernel", lambda kernel: kernel)(model)
    for expected in (True, False):
        if not expected:
            model.get_layer("block2_bn").epsilon = 1e-3
        assert run(reference, model, images).passed is expected
        assert {name: np.array(variable).tobytes() for name, variable in named_variables(model).items()} == before
        assert {variable.dtype for variable in model.weights} == {"float32"}
        assert {str(layer.dtype_policy.name) for layer in named_layers(model).values()} == {"float32"}
        assert (keras.config.floatx(), keras.config.dtype_policy().name) == ("float32", "float32")
        assert not model.get_layer("norm").trainable
        assert keras.layers.Layer.__call__ is calls
        assert {name: module.training for name, module in reference.named_modules()} == modes
        assert all(torch.equal(tensor, state[name]) for name, tensor in reference.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in reference.modules())
    np.testing.assert_array_equal(model(images), model(images))


def change_value(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[keras.Model], None]:
    def apply(model: keras.Model) -> None:
        variable = named_variables(model)[name]
        variable.assign(change(variable.numpy()))

    return apply


def change_setting(layer: str, name: str, value: object) -> Callable[[keras.Model], None]:
    return lambda model: setattr(model.get_layer(layer), name, value)


def one_element(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.flat[3] *= 1.5
    return values


def swap(one: str, other: str) -> Callable[[keras.Model], None]:
    def apply(model: keras.Model) -> None:
        variables = named_variables(model)
        values = variables[one].numpy(), variables[other].numpy()
        variables[one].assign(values[1])
        variables[other].assign(values[0])

    return apply


def without_shortcut(model: keras.Model) -> None:
    layer = model.get_layer("block2_add")
    layer.call = types.MethodType(lambda self, inputs: inputs[1] * 1.0, layer)


def bumped(size: float) -> Callable[[Any], Any]:
    return lambda x: keras.activations.gelu(x, approximate=False) + size * keras.ops.exp(-keras.ops.square(x))


def rounded(bits: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        mantissa, exponent = np.frexp(values)
        return np.ldexp(np.round(mantissa * 2**bits) / 2**bits, exponent).astype(np.float32)

    return change


# Name of the fault: the change, the culprit, and the expected cause (None if any will do).
FAULTS: dict[str, tuple[Callable[[keras.Model], None], str, str | None]] = {
    "tanh GELU": (
        change_setting("block2_act", "activation", lambda x: keras.activations.gelu(x, approximate=True)),
        "blocks.1.act",
        "the tanh approximation of GELU",
    ),
    "BatchNorm epsilon of Keras": (
        change_setting("block1_bn", "epsilon", 1e-3),
        "blocks.0.bn",
        "an epsilon of 0.001 instead of 1e-05",
    ),
    "BatchNorm epsilon of keras.applications": (
        change_setting("block3_bn", "epsilon", 1.001e-5),
        "blocks.2.bn",
        "an epsilon of 1.001e-05 instead of 1e-05",
    ),
    "LayerNorm epsilon": (
        change_setting("norm", "epsilon", 1e-6),
        "norm",
        "an epsilon of 1e-06 instead of 1e-05",
    ),
    "gamma and beta exchanged": (
        swap("block1_bn/gamma", "block1_bn/beta"),
        "blocks.0.bn",
        "its scale (gamma) and shift (beta) are exchanged",
    ),
    "mean and variance exchanged": (
        swap("block1_bn/moving_mean", "block1_bn/moving_variance"),
        "blocks.0.bn",
        "its running_mean and running_var are exchanged",
    ),
    "depthwise height and width swapped": (
        change_value("block2_dw/kernel", lambda kernel: kernel.transpose(1, 0, 2, 3)),
        "blocks.1.dw",
        "the kernel's height and width are swapped",
    ),
    "kernel flipped": (
        change_value("stem_conv/kernel", lambda kernel: kernel[::-1, ::-1]),
        "stem.conv",
        "the kernel is flipped in height and width",
    ),
    "square projection not transposed": (
        change_value("block2_pw/kernel", lambda kernel: kernel.transpose(0, 1, 3, 2)),
        "blocks.1.pw",
        "the kernel's input and output channels are swapped",
    ),
    "bias lost": (change_value("block3_pw/bias", np.zeros_like), "blocks.2.pw", "the bias is lost"),
    "variance stored as standard deviation": (
        change_value("block3_bn/moving_variance", np.sqrt),
        "blocks.2.bn",
        "the running variance is stored as standard deviation",
    ),
    "classes permuted": (change_value("head/kernel", lambda kernel: kernel[:, ::-1]), "head", None),
    "shortcut lost": (without_shortcut, "blocks.1", None),
    "kernel in bfloat16": (
        change_value("block2_pw/kernel", lambda kernel: kernel.astype(ml_dtypes.bfloat16).astype(np.float32)),
        "blocks.1.pw",
        "its kernel is rounded to bfloat16",
    ),
    # Less than the rounding of float32.
    "a bump of 1e-6 in an activation": (change_setting("block2_act", "activation", bumped(1e-6)), "blocks.1.act", None),
    "a bump of 1e-7 in an activation": (change_setting("block2_act", "activation", bumped(1e-7)), "blocks.1.act", None),
    "weights rounded to 20 bits": (change_value("block2_pw/kernel", rounded(20)), "blocks.1.pw", None),
    "a weight off by one unit in the last place": (
        change_value("block2_pw/kernel", lambda kernel: np.nextafter(kernel, np.float32(9))),
        "blocks.1.pw",
        None,
    ),
}


@pytest.mark.parametrize("with_names", [True, False], ids=["names", "content alone"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_its_layer_named_and_its_cause_told(
    toy: nn.Module, candidate: keras.Model, images: np.ndarray, fault: str, with_names: bool
) -> None:
    plant, culprit, cause = FAULTS[fault]
    plant(candidate)
    report = run(toy, candidate, images[:2]) if with_names else check_parity(toy, candidate, images[:2])
    assert not report.passed
    assert [found.culprit for found in report.culprits] == [culprit]
    if cause is not None:
        assert report.diagnosis is not None
        assert (report.diagnosis.cause, report.diagnosis.pattern) == (cause, False)
        assert report.diagnosis.confidence in {"certain", "likely"}


def test_every_mistake_is_found_in_one_run(toy: nn.Module, candidate: keras.Model, images: np.ndarray) -> None:
    planted = ["kernel flipped", "BatchNorm epsilon of Keras", "bias lost", "classes permuted"]
    for fault in planted:
        FAULTS[fault][0](candidate)
    report = run(toy, candidate, images)
    assert [culprit.culprit for culprit in report.culprits] == [FAULTS[fault][1] for fault in planted]
    causes = [culprit.diagnosis.cause for culprit in report.culprits[:3] if culprit.diagnosis]
    assert causes == [FAULTS[fault][2] for fault in planted[:3]]
    few = run(toy, candidate, images, locate_culprits=False)
    assert few.culprits == ()
    assert not few.passed


def test_a_single_number_is_named(toy: nn.Module, candidate: keras.Model, images: np.ndarray) -> None:
    change_value("block2_pw/kernel", one_element)(candidate)
    report = run(toy, candidate, images)
    assert report.diagnosis is not None
    weight = toy.get_submodule("blocks.1.pw").weight
    assert isinstance(weight, torch.Tensor)
    value = float(weight.detach()[3, 0, 0, 0]) * 1.5
    assert report.diagnosis.cause == (
        f"output channel 3: blocks.1.pw.weight[3, 0, 0, 0] is {value:.9g}, 1.5 times what it should be, "
        f"{value / 1.5:.9g} (in Keras block2_pw/kernel[0, 0, 0, 3])"
    )
    assert report.diagnosis.confidence == "certain"


@pytest.mark.parametrize(
    ("layer", "name", "value", "line"),
    [
        (
            "block1_bn",
            "momentum",
            0.99,
            "blocks.0.bn: momentum is 0.99 (PyTorch's 0.01) in Keras, 0.1 in PyTorch (set 0.9 in Keras)",
        ),
    ],
    ids=["momentum"],
)
def test_settings_of_training_fail_where_they_count(
    toy: nn.Module, candidate: keras.Model, images: np.ndarray, layer: str, name: str, value: float, line: str
) -> None:
    change_setting(layer, name, value)(candidate)
    strict = functools.partial(run, toy, candidate, images[:1], strict_settings=True)
    report = strict()
    assert report.divergences == ()
    assert not report.passed
    assert report.audit is not None
    assert [str(difference) for difference in report.audit.differences] == [line]
    assert run(toy, candidate, images[:1]).passed  # a note, for a model of the user's own
    assert strict(waive=["blocks.0.bn"]).passed
    assert strict(waive=["blocks.0.bn:momentum"]).passed
    assert not strict(waive=["blocks.1.bn"]).passed


def test_limits_of_the_users_own(toy: nn.Module, candidate: keras.Model, images: np.ndarray) -> None:
    strict = run(toy, candidate, images[:1], limits=Limits(atol=1e-12))
    assert "(atol)" in str(strict.first_divergence)
    relative = run(toy, candidate, images[:1], limits=Limits(rtol=1e-12))
    assert "(rtol)" in str(relative.first_divergence)
    one = run(toy, candidate, images[:1], limits=Limits(per_layer={"norm": 1e-3}))
    assert {divergence.layer for divergence in one.divergences} == {"norm"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": {"stem.cnv": "stem_conv"}}, "pairs: 'stem.cnv' is no module of the PyTorch model; the nearest is"),
        ({"pairs": {"stem.conv": "stem"}}, "pairs: 'stem' is no layer of the Keras model"),
        ({"pairs": {"stem.conv": "norm", "stem.bn": "norm"}}, "pairs: two modules are paired with one layer: norm"),
        ({"pairs": {"stem.conv": 3}}, "pairs: 3 is neither a layer of the Keras model nor its name"),
        ({"limits": Limits(per_layer={"hed": 1.0})}, "limits: 'hed' is no module of the PyTorch model; the nearest is"),
        ({"waive": ["stem.b"]}, "waive: 'stem.b' is no module"),
        ({"input_axes": []}, "input_axes has 0 entries for 1 inputs"),
    ],
)
def test_unknown_names_are_errors(
    toy: nn.Module, candidate: keras.Model, images: np.ndarray, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_parity(toy, candidate, images, **arguments)


def test_nan_is_no_parity(toy: nn.Module, candidate: keras.Model, images: np.ndarray) -> None:
    change_value("head/bias", lambda bias: np.where(np.arange(len(bias)) == 0, np.nan, bias))(candidate)
    report = run(toy, candidate, images)
    assert [culprit.culprit for culprit in report.culprits] == ["head"]
    assert report.culprits[0].reason == "values that are not finite"
    assert report.layers[-1].difference.nonfinite_actual == 3


def test_nan_in_the_input_is_blamed_on_the_input(toy: nn.Module, candidate: keras.Model, images: np.ndarray) -> None:
    broken = images.copy()
    broken[0, 3, 3] = np.nan
    report = run(toy, candidate, broken)
    assert not report.passed
    assert report.problem == "input 0 holds 3 numbers that are not finite"


def test_another_shape_is_no_parity(toy: nn.Module, images: np.ndarray) -> None:
    report = check_parity(toy, FAMILY.build("large", 6), images)
    last = report.layers[-1]
    assert last.source == "output"
    assert last.views[EXACT].problem == "shape (3, 6) instead of (3, 5)"
    assert report.failed(last)


@pytest.mark.parametrize(("function", "name"), [(keras.ops.softmax, "softmax"), (keras.ops.sigmoid, "sigmoid")])
def test_a_function_after_the_last_layer_is_seen(
    toy: nn.Module, candidate: keras.Model, images: np.ndarray, function: Any, name: str
) -> None:
    report = run(toy, keras.Model(candidate.input, function(candidate.output)), images)
    assert [culprit.culprit for culprit in report.culprits] == ["output"]
    assert report.diagnosis is not None
    assert report.diagnosis.cause == f"{name} comes before the output in Keras alone"


def test_models_that_have_nothing_to_do_with_each_other(images: np.ndarray) -> None:
    inputs = keras.Input((4,))
    other = keras.Model(inputs, keras.layers.Dense(3, name="other")(inputs))
    report = check_parity(nn.Sequential(nn.Linear(4, 3)), other, np.ones((2, 4), np.float32))
    assert not report.passed


def test_no_images(toy: nn.Module, candidate: keras.Model) -> None:
    with pytest.raises(ValueError, match="at least one input"):
        check_parity(toy, candidate, np.zeros((0, 64, 64, 3), np.float32))


def test_few_numbers_do_not_tell_how_large_rounding_is() -> None:
    """PyTorch's own error of a few results may be almost 0 by chance, which must not count against Keras."""
    linear = nn.Linear(768, 2)
    reference = nn.Sequential(linear)
    candidate = keras.Sequential([keras.Input((768,)), keras.layers.Dense(2, name="0")])
    rng = np.random.default_rng(0)
    for _ in range(40):
        kernel, bias = rng.normal(size=(768, 2)).astype(np.float32), rng.normal(size=2).astype(np.float32)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(kernel.T))
            linear.bias.copy_(torch.from_numpy(bias))
        candidate.layers[-1].set_weights([kernel, bias])
        inputs = rng.normal(size=(1, 768)).astype(np.float32)
        report = check_parity(reference, candidate, inputs)
        assert report.passed, report.objections
        assert report.layers[0].ratio < 16
    candidate.layers[-1].set_weights([kernel, bias * 0])
    assert not check_parity(reference, candidate, inputs).passed


@pytest.mark.parametrize("name", ["fc", "output", "output[0]"])
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_a_module_that_is_called_as_results_are(name: str, dtype: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(6, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.get_submodule(name)(x), -1)

    torch.manual_seed(0)
    reference, inputs = Named().eval(), keras.Input((6,))
    dense = keras.layers.Dense(5, name="dense")
    candidate = keras.Model(inputs, keras.layers.Softmax(dtype=dtype)(dense(inputs)))
    values = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    report = porting.port_weights(reference, candidate, [porting.KeyRule(name, "dense", "dense")], inputs=values).report
    assert report is not None
    assert report.passed is (dtype == "float32")
    assert [(layer.source, layer.kind, layer.is_output) for layer in report.layers] == [
        (name, "Linear", False),
        ("output", "output", True),
    ]
    assert "float32" in report.layers[-1].views


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"limits": {"max_ratio": 3}}, TypeError, "limits must be porting.Limits"),
        ({"waive": "fc"}, TypeError, "waive must be a list of names"),
        ({"pairs": [("fc", "dense")]}, TypeError, "pairs must be a dict"),
        ({"precision": "fp8"}, ValueError, "precision must be float16 or bfloat16"),
        ({"waive": ["nothing:eps"]}, ValueError, "nothing"),
    ],
)
def test_options_of_a_wrong_type_raise_before_anything_runs(options: Any, error: type[Exception], said: str) -> None:
    reference, inputs = nn.Sequential(nn.Linear(4, 3)), keras.Input((4,))
    candidate = keras.Model(inputs, keras.layers.Dense(3, name="dense")(inputs))
    before = candidate.get_weights()[0].copy()
    values = np.ones((2, 4), np.float32)
    with pytest.raises(error, match=said):
        porting.check_parity(reference, candidate, values, **options)
    with pytest.raises(error, match=said):
        porting.port_weights(reference, candidate, [porting.KeyRule("0", "dense", "dense")], inputs=values, **options)
    np.testing.assert_array_equal(candidate.get_weights()[0], before)


def test_rows_are_a_key_map_and_a_dict_has_keras_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    reference, photo = Net().eval(), keras.Input((4,), name="photo")
    candidate = keras.Model(photo, keras.layers.Dense(3, name="dense")(photo))
    rows, values = [porting.KeyRule("fc", "dense", "dense")], np.ones((2, 4), np.float32)
    porting.port_weights(reference, candidate, rows)
    report = porting.check_parity(reference, candidate, {"photo": values}, key_map=rows)
    assert report.passed, str(report)
    assert report.verified is not None
    assert report.verified.compared_bits == 2


def test_a_subclassed_model_that_has_not_run_is_built() -> None:
    class Own(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.fc = keras.layers.Dense(3)

        def call(self, x: Any) -> Any:
            return self.fc(x)

    values = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    assert porting.port_weights(nn.Sequential(nn.Linear(4, 3)).eval(), Own(), inputs=values).require_parity()
