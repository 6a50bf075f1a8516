"""Plant known porting mistakes into a healthy port, one at a time, and print which are found and named.

\b
    python scripts/fault_study.py                  # the faults
    python scripts/fault_study.py --healthy 50     # only healthy ports: are there false alarms?

Every fault is checked like in `van-port check`: the layers in all views, then the settings, and, if the numbers with
ordinary weights do not reveal it, a stress run with small variances. Set TF_ENABLE_ONEDNN_OPTS to 0 or 1 beforehand to
try both.
"""

from __future__ import annotations

import math
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from porting.families.van import VanFamily
from porting.files.weights_file import assign_weights, variable_shapes
from porting.mapping.convert import convert
from porting.models.frameworks import start_tensorflow
from porting.models.synthetic import fill_with_synthetic_weights
from porting.parity.compare import check_parity
from porting.parity.report import EXACT, FLOAT32, Culprit, ParityReport
from porting.parity.stress import with_small_variances
from porting.references.van import VAN, build_van

CLASSES = 10
Plant = Callable[[Any], Any]


@dataclass(frozen=True)
class Fault:
    """A mistake. `plant` changes a Keras model in place or returns another; `culprits` are the correct names."""

    kind: str
    name: str
    plant: Plant
    culprits: tuple[str, ...]


def layer_at(model: Any, path: str) -> Any:
    top, _, rest = path.partition("/")
    layer = model.get_layer(top)
    for name in filter(None, rest.split("/")):
        layer = getattr(layer, name)
    return layer


def variable_at(model: Any, path: str) -> Any:
    return next(variable for variable in model.weights if variable.path == path)


def value(path: str, change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """Change the numbers of a weight."""

    def plant(model: Any) -> None:
        variable = variable_at(model, path)
        variable.assign(np.ascontiguousarray(change(variable.numpy())))

    return plant


def swap(*pairs: tuple[str, str]) -> Plant:
    """Exchange weights."""

    def plant(model: Any) -> None:
        for pair in pairs:
            one, other = (variable_at(model, path) for path in pair)
            first, second = one.numpy(), other.numpy()
            one.assign(second)
            other.assign(first)

    return plant


def setting(path: str, **changes: Any) -> Plant:
    """Set attributes of a layer."""

    def plant(model: Any) -> None:
        for name, new in changes.items():
            setattr(layer_at(model, path), name, new)

    return plant


def calls(path: str, call: Callable[..., Any]) -> Plant:
    """Replace the `call` of a layer."""

    def plant(model: Any) -> None:
        layer = layer_at(model, path)
        layer.call = types.MethodType(call, layer)

    return plant


def together(*plants: Plant) -> Plant:
    def plant(model: Any) -> None:
        for each in plants:
            each(model)

    return plant


def same_padding(stage: int) -> Plant:
    return together(
        setting(f"patch_embed{stage}/pad", padding=((0, 0), (0, 0))),
        setting(f"patch_embed{stage}/proj", padding="same"),
    )


def rounded(bits: int) -> Callable[[Any], Any]:
    """Round float32 values to `bits` bits of mantissa after the point."""

    def to_nearest(x: Any) -> Any:
        mantissa, exponent = np.frexp(np.asarray(x, np.float64))
        scale = 2.0 ** (bits + 1)
        return np.ldexp(np.round(mantissa * scale) / scale, exponent).astype(np.float32)

    return to_nearest


def computes_in(path: str, bits: int) -> Plant:
    """Round a layer's kernel and inputs, like hardware with short mantissas."""

    def plant(model: Any) -> None:
        layer = layer_at(model, path)
        original = layer.call
        value(f"{layer.path}/kernel", rounded(bits))(model)
        layer.call = lambda x, **_: original(rounded(bits)(x))

    return plant


def result_in(path: str, bits: int) -> Plant:
    def plant(model: Any) -> None:
        layer = layer_at(model, path)
        original = layer.call

        def call(x: Any, **_: Any) -> Any:
            import keras

            return keras.ops.convert_to_tensor(rounded(bits)(original(x)))

        layer.call = call

    return plant


def live_dropout(path: str) -> Plant:
    def plant(model: Any) -> None:
        import keras

        layer = layer_at(model, path)
        shape = layer.noise_shape

        def call(self: Any, x: Any, training: Any = None) -> Any:
            sides = None if shape is None else tuple(x.shape[i] if n is None else n for i, n in enumerate(shape))
            return keras.random.dropout(x, 0.5, noise_shape=sides, seed=1)

        layer.call = types.MethodType(call, layer)

    return plant


def rewired(build: Callable[[Any, Any], Any]) -> Plant:
    """Build another functional model from the same layers."""

    def plant(model: Any) -> Any:
        import keras

        return keras.Model(model.input, build(model, keras))

    return plant


def pool_before_norm(model: Any, keras: Any) -> Any:
    norm = keras.layers.LayerNormalization(epsilon=1e-6, name="norm4")
    x = norm(model.get_layer("pool")(model.get_layer("block4_0").output))
    norm.set_weights(model.get_layer("norm4").get_weights())
    return model.get_layer("head")(x)


def norm_skipped(model: Any, keras: Any) -> Any:
    x = model.get_layer("block2_1").output
    for name in ("patch_embed3", "block3_0", "block3_1", "norm3", "patch_embed4", "block4_0", "norm4", "pool", "head"):
        x = model.get_layer(name)(x)
    return x


def greatest_pooled(model: Any, keras: Any) -> Any:
    x = keras.layers.GlobalMaxPooling2D(name="pool")(model.get_layer("norm4").output)
    return model.get_layer("head")(x)


def softmax_added(model: Any, keras: Any) -> Any:
    return keras.layers.Softmax(name="probabilities")(model.output)


def blocks_exchanged(model: Any) -> None:
    names = [v.path.removeprefix("block3_0/") for v in model.weights if v.path.startswith("block3_0/")]
    swap(*((f"block3_0/{name}", f"block3_1/{name}") for name in names))(model)


def block_call(attention: Callable[[Any, Any], Any] | None = None, **wrong: bool) -> Callable[..., Any]:
    """The `call` of a block with one mistake in its wiring."""

    def call(self: Any, x: Any, training: Any = None) -> Any:
        u = self.norm1(x)
        a = self.attn(u) if attention is None else attention(self, u)
        if wrong.get("unnormalised"):
            a = a - u + x
        first = x + self.drop_path(a if wrong.get("unscaled") else self.layer_scale_1 * a)
        m = self.mlp(self.norm2(x if wrong.get("parallel") else first))
        if wrong.get("no_second_shortcut"):
            return self.drop_path(self.layer_scale_2 * m)
        return (x if wrong.get("parallel_sum") else first) + self.drop_path(self.layer_scale_2 * m)

    return call


def fault_list() -> list[Fault]:
    import keras

    lka = "attn/spatial_gating_unit"
    ops = keras.ops

    def element(k: np.ndarray) -> np.ndarray:
        k = k.copy()
        k.flat[3] *= 1.01
        return k

    def two_channels(k: np.ndarray) -> np.ndarray:
        order = np.arange(k.shape[-1])
        order[[0, 1]] = [1, 0]
        return k[..., order]

    def as_plain(k: np.ndarray) -> np.ndarray:
        return k.transpose(0, 1, 3, 2).reshape(k.shape) if k.shape[2] == 1 else k.transpose(2, 0, 1, 3).reshape(k.shape)

    def unshuffled(k: np.ndarray) -> np.ndarray:
        return k.T.reshape(k.shape)

    def lka_call(gate: bool, order: bool) -> Callable[..., Any]:
        def call(self: Any, x: Any) -> Any:
            parts = (self.conv_spatial, self.conv0) if order else (self.conv0, self.conv_spatial)
            y = self.conv1(parts[1](parts[0](x)))
            return x * y if gate else y

        return call

    weights = [
        ("a convolution's bias lost", value("patch_embed3/proj/bias", np.zeros_like), "patch_embed3.proj"),
        ("the head's bias lost", value("head/bias", np.zeros_like), "head"),
        ("one element changed by 1%", value("block2_0/mlp/fc2/kernel", element), "block2.0.mlp.fc2"),
        ("two channels exchanged", value("block1_1/attn/proj_2/kernel", two_channels), "block1.1.attn.proj_2"),
        ("all channels reversed", value("block2_1/mlp/fc1/kernel", lambda k: k[..., ::-1]), "block2.1.mlp.fc1"),
        ("a kernel scaled by 1.0001", value(f"block3_0/{lka}/conv1/kernel", lambda k: k * np.float32(1.0001)),
         "block3.0.attn.spatial_gating_unit.conv1"),
        ("a kernel's sign flipped", value(f"block1_0/{lka}/conv1/kernel", np.negative),
         "block1.0.attn.spatial_gating_unit.conv1"),
        ("layer scale at its initial value", value("block1_0/layer_scale_1", lambda s: np.full_like(s, 0.01)),
         "block1.0"),
        ("layer scales exchanged", swap(("block2_0/layer_scale_1", "block2_0/layer_scale_2")), "block2.0"),
        ("BatchNorm gamma lost", value("block1_0/norm2/gamma", np.ones_like), "block1.0.norm2"),
        ("BatchNorm beta lost", value("patch_embed2/norm/beta", np.zeros_like), "patch_embed2.norm"),
        ("gamma and beta exchanged", swap(("block3_1/norm1/gamma", "block3_1/norm1/beta")), "block3.1.norm1"),
        ("running mean lost", value("block2_0/norm1/moving_mean", np.zeros_like), "block2.0.norm1"),
        ("stale running statistics", together(value("block4_0/norm1/moving_mean", np.zeros_like),
         value("block4_0/norm1/moving_variance", np.ones_like)), "block4.0.norm1"),
        ("variance stored as standard deviation", value("block4_0/norm2/moving_variance", np.sqrt), "block4.0.norm2"),
        ("LayerNorm gamma lost", value("norm3/gamma", np.ones_like), "norm3"),
        ("LayerNorm beta lost", value("norm1/beta", np.zeros_like), "norm1"),
        ("two projections exchanged", swap(*((f"block1_0/attn/proj_1/{n}", f"block1_0/attn/proj_2/{n}")
         for n in ("kernel", "bias"))), "block1.0.attn.proj_1"),
        ("two blocks of a stage exchanged", blocks_exchanged, "block3.0.norm1"),
    ]  # fmt: skip
    layout = [
        ("depthwise height and width swapped", value("block1_1/mlp/dwconv/dwconv/kernel",
         lambda k: k.transpose(1, 0, 2, 3)), "block1.1.mlp.dwconv.dwconv"),
        ("dilated kernel's height and width swapped", value(f"block2_0/{lka}/conv_spatial/kernel",
         lambda k: k.transpose(1, 0, 2, 3)), "block2.0.attn.spatial_gating_unit.conv_spatial"),
        ("kernel flipped", value(f"block3_0/{lka}/conv0/kernel", lambda k: k[::-1, ::-1]),
         "block3.0.attn.spatial_gating_unit.conv0"),
        ("kernel flipped in height", value("patch_embed2/proj/kernel", lambda k: k[::-1]), "patch_embed2.proj"),
        ("kernel flipped in width", value("patch_embed4/proj/kernel", lambda k: k[:, ::-1]), "patch_embed4.proj"),
        ("depthwise reshaped like a plain kernel", value("block4_0/mlp/dwconv/dwconv/kernel", as_plain),
         "block4.0.mlp.dwconv.dwconv"),
        ("square projection not transposed", value("block2_1/attn/proj_1/kernel", lambda k: k.transpose(0, 1, 3, 2)),
         "block2.1.attn.proj_1"),
        ("dense kernel reshaped, not transposed", value("head/kernel", unshuffled), "head"),
        ("colours reversed in the first kernel", value("patch_embed1/proj/kernel", lambda k: k[:, :, ::-1]),
         "patch_embed1.proj"),
        ("first kernel's height and width swapped", value("patch_embed1/proj/kernel",
         lambda k: k.transpose(1, 0, 2, 3)), "patch_embed1.proj"),
    ]  # fmt: skip
    settings = [
        ("BatchNorm epsilon 1e-3", setting("block1_0/norm1", epsilon=1e-3), "block1.0.norm1"),
        ("BatchNorm epsilon 1.001e-5", setting("block1_1/norm1", epsilon=1.001e-5), "block1.1.norm1"),
        ("LayerNorm epsilon 1e-3", setting("norm2", epsilon=1e-3), "norm2"),
        ("LayerNorm epsilon 1e-5", setting("norm3", epsilon=1e-5), "norm3"),
        ("BatchNorm momentum 0.99", setting("block2_0/norm2", momentum=0.99), "block2.0.norm2"),
        ("drop path rate 0.1 instead of 0", setting("block3_0/drop_path", rate=0.1), "block3.0.drop_path"),
        ("tanh GELU", setting("block2_0/mlp/act", activation=lambda x: keras.activations.gelu(x, approximate=True)),
         "block2.0.mlp.act"),
        ("ReLU instead of GELU", setting("block1_0/attn/activation", activation=keras.activations.relu),
         "block1.0.attn.activation"),
        ("SiLU instead of GELU", setting("block4_0/mlp/act", activation=keras.activations.silu), "block4.0.mlp.act"),
        ("dilation lost", setting(f"block1_0/{lka}/conv_spatial", dilation_rate=(1, 1)),
         "block1.0.attn.spatial_gating_unit.conv_spatial"),
        *((f"\"same\" padding in patch_embed{s}", same_padding(s), f"patch_embed{s}.proj") for s in (1, 2, 3, 4)),
        ("BatchNorm in training mode", calls("block2_1/norm1", lambda self, x, training=None, mask=None:
         type(self).call(self, x, training=True)), "block2.1.norm1"),
        ("drop path live at inference", live_dropout("block2_0/drop_path"), "block2.0.drop_path"),
        ("dropout live at inference", live_dropout("block1_1/mlp/drop"), "block1.1.mlp.drop"),
    ]  # fmt: skip
    wiring = [
        ("shortcut taken before the norm", calls("block3_0", block_call(unnormalised=True)), "block3.0"),
        ("layer scale not applied", calls("block2_1", block_call(unscaled=True)), "block2.1"),
        ("MLP beside the attention, not after it", calls("block1_0", block_call(parallel=True)), "block1.0"),
        ("second shortcut around the whole block", calls("block1_1", block_call(parallel_sum=True)), "block1.1"),
        ("second shortcut lost", calls("block4_0", block_call(no_second_shortcut=True)), "block4.0"),
        ("attention's shortcut lost", calls("block2_0/attn", lambda self, u:
         self.proj_2(self.spatial_gating_unit(self.activation(self.proj_1(u))))), "block2.0.attn"),
        ("activation after the gating unit", calls("block3_1/attn", lambda self, u:
         self.proj_2(self.activation(self.spatial_gating_unit(self.proj_1(u)))) + u), "block3.1.attn"),
        ("gate added, not multiplied", calls(f"block1_0/{lka}", lambda self, x:
         x + self.conv1(self.conv_spatial(self.conv0(x)))), "block1.0.attn.spatial_gating_unit"),
        ("gate left out", calls(f"block3_0/{lka}", lka_call(gate=False, order=False)),
         "block3.0.attn.spatial_gating_unit"),
        ("depthwise convolutions in the other order", calls(f"block2_0/{lka}", lka_call(gate=True, order=True)),
         "block2.0.attn.spatial_gating_unit"),
        ("activation before the depthwise convolution", calls("block2_1/mlp", lambda self, x, training=None:
         self.drop(self.fc2(self.drop(self.dwconv(self.act(self.fc1(x))))))), "block2.1.mlp"),
        ("pooled before the last norm", rewired(pool_before_norm), ("", "norm4")),
        ("a stage's norm skipped", rewired(norm_skipped), ("",)),
        ("greatest value pooled, not the mean", rewired(greatest_pooled), ("",)),
        ("softmax after the head", rewired(softmax_added), ("output",)),
        ("norm before the patch embedding's convolution", calls("patch_embed2", lambda self, x, training=None:
         self.proj(self.pad(x)) * ops.ones(())), "patch_embed2"),
    ]  # fmt: skip
    precision = [
        ("one kernel rounded to bfloat16", value("block2_0/mlp/fc2/kernel", rounded(7)), "block2.0.mlp.fc2"),
        ("one kernel rounded to float16", value("block1_1/attn/proj_2/kernel", rounded(10)), "block1.1.attn.proj_2"),
        ("one layer computing in bfloat16", computes_in("block3_0/mlp/fc1", 7), "block3.0.mlp.fc1"),
        ("one layer computing in TF32", computes_in("block1_0/mlp/fc1", 10), "block1.0.mlp.fc1"),
        ("one result rounded to float16", result_in("block2_1/attn/proj_1", 10), "block2.1.attn.proj_1"),
        ("the head's result rounded to bfloat16", result_in("head", 7), "head"),
    ]  # fmt: skip
    groups = (
        ("weights", weights),
        ("layout", layout),
        ("settings", settings),
        ("wiring", wiring),
        ("precision", precision),
    )
    return [
        Fault(kind, name, plant, (culprit,) if isinstance(culprit, str) else tuple(culprit))
        for kind, faults in groups
        for name, plant, culprit in faults
    ]


def make_candidate(family: VanFamily, variant: str, reference: VAN) -> Any:
    candidate = family.build(variant, reference.num_classes)
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    weights = convert(tensors, family.key_map(family.spec(variant)), variable_shapes(candidate)).weights
    assign_weights(candidate, weights)
    return candidate


@dataclass(frozen=True)
class Finding:
    """How a fault was found ("" if not), which layer the check names, and which cause it reports."""

    by: str
    culprit: str = ""
    cause: str = ""


def study(family: VanFamily, reference: VAN, small: VAN, images: np.ndarray, fault: Fault) -> Finding:
    report = run(family, reference, images, fault)
    by = "numbers"
    if not report.divergences:
        settings = report.audit.differences if report.audit else ()
        stressed = run(family, small, images, fault)
        if settings:
            by = "setting, stress" if stressed.divergences else "setting"
            return Finding(by, settings[0].layer, str(settings[0]).partition(": ")[2])
        report, by = stressed, "stress"
    first = report.first_divergence
    if first is None:
        return Finding("")
    who = first.culprit if isinstance(first, Culprit) else first.layer
    return Finding(by, who, report.diagnosis.cause if report.diagnosis else "")


def run(family: VanFamily, reference: VAN, images: np.ndarray, fault: Fault) -> ParityReport:
    candidate = make_candidate(family, "nano", reference)
    replaced = fault.plant(candidate)
    return check_parity(reference, candidate if replaced is None else replaced, images, strict_settings=True)


def check_healthy(family: VanFamily, count: int) -> int:
    """Check healthy ports over seeds, variants and input sizes; print the largest ratios and count false alarms."""
    rng = np.random.default_rng(0)
    alarms, worst, exact, greatest = 0, (0.0, ""), (0.0, ""), 0.0
    for seed in track(range(count), "healthy ports", transient=True):
        variant = ("nano", "nano", "nano", "b0")[seed % 4]
        torch.manual_seed(seed)
        reference = build_van(variant, CLASSES)
        fill_with_synthetic_weights(reference, seed)
        height, width = (int(side) for side in rng.integers(32, 130, 2))
        images = rng.normal(size=(int(rng.integers(1, 4)), height, width, 3)).astype(np.float32)
        report = check_parity(reference.eval(), make_candidate(family, variant, reference), images)
        alarms += not report.passed
        label = f"{variant}, seed {seed}, {height}x{width}, {report.worst.source}"
        worst = max(worst, (report.worst.views[FLOAT32].ratio, label))
        exact = max(exact, (report.worst_exact.ratio if report.worst_exact else math.inf, label))
        greatest = max(greatest, max(layer.views[EXACT].ratio for layer in report.layers))
    onednn = os.environ.get("TF_ENABLE_ONEDNN_OPTS", "unset")
    click.echo(f"{count} healthy ports, TF_ENABLE_ONEDNN_OPTS {onednn}: {alarms} false alarms")
    click.echo(f"largest ratio in float32: {worst[0]:.2f} ({worst[1]})")
    click.echo(f"largest exact ratio of the outputs: {exact[0]:.2f} ({exact[1]}); of any tensor: {greatest:.2f}")
    return alarms


@click.command(help=__doc__)
@click.option("--healthy", default=0, help="Check this many healthy ports instead.")
@click.option("--only", default="", help="Study only faults whose name contains this.")
def main(healthy: int, only: str) -> None:
    start_tensorflow()
    family = VanFamily()
    if healthy:
        sys.exit(1 if check_healthy(family, healthy) else 0)
    reference = build_van("nano", CLASSES)
    fill_with_synthetic_weights(reference, seed=0)
    images = np.random.default_rng(0).normal(size=(2, 48, 48, 3)).astype(np.float32)
    small = with_small_variances(reference.eval(), images, family.shrinkable)
    assert isinstance(small, VAN)  # a copy of the reference
    faults = [fault for fault in fault_list() if only in fault.name]
    table = Table()
    for heading in ("kind", "fault", "found by", "named", "reported cause"):
        table.add_column(heading, overflow="fold")
    found = named = 0
    for fault in track(faults, "faults", transient=True):
        finding = study(family, reference, small, images, fault)
        right = bool(finding.by) and finding.culprit in fault.culprits
        found += bool(finding.by)
        named += right
        label = (finding.culprit or "the model") if finding.by else "-"
        table.add_row(
            fault.kind, fault.name, finding.by or "NOT FOUND", label if right else f"WRONG: {label}", finding.cause
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    click.echo(f"{len(faults)} faults: {found} found, {named} named at the exact layer")
    sys.exit(0 if found == len(faults) else 1)


if __name__ == "__main__":
    main()
