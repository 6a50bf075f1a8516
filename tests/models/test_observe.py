from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import torch
from torch import Tensor, nn

import van_tf
from porting.models.observe import Replay, observe_layers, observe_modules, tensors_in
from porting.references.van import VAN


class Log:
    """Records every call and changes nothing."""

    watches_inputs = True

    def __init__(self) -> None:
        self.inputs: dict[str, list[tuple[int, ...]]] = {}
        self.outputs: dict[str, list[tuple[int, ...]]] = {}

    def before(self, name: str, inputs: list[Tensor]) -> Sequence[Tensor | None] | None:
        self.inputs[name] = [tuple(tensor.shape) for tensor in inputs]
        return None

    def after(self, name: str, outputs: list[Tensor]) -> Sequence[Tensor | None] | None:
        self.outputs[name] = [tuple(tensor.shape) for tensor in outputs]
        return None


class Steer(Log):
    """Replaces the input of one layer by ones, and its output by sevens."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.given: list[Tensor] = []

    def before(self, name: str, inputs: list[Tensor]) -> Sequence[Tensor | None] | None:
        super().before(name, inputs)
        return [torch.ones_like(tensor) for tensor in inputs] if name == self.name else None

    def after(self, name: str, outputs: list[Tensor]) -> Sequence[Tensor | None] | None:
        super().after(name, outputs)
        if name != self.name:
            return None
        self.given = outputs
        return [torch.full_like(tensor, 7.0) for tensor in outputs]


def test_modules_come_in_the_order_in_which_they_finish(reference: VAN) -> None:
    log = Log()
    with torch.no_grad(), observe_modules(reference, log):
        reference(torch.zeros(2, 3, 64, 96))
    names = list(log.outputs)
    assert names[:3] == ["patch_embed1.proj", "patch_embed1.norm", "patch_embed1"]
    assert names.index("block1.0.attn.proj_1") < names.index("block1.0.attn") < names.index("block1.0")
    assert log.outputs["patch_embed1"] == [(2, 32, 16, 24)]
    assert log.inputs["patch_embed1"] == [(2, 3, 64, 96)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in reference.modules())


class Branches(nn.Module):
    """Runs one layer twice and returns several tensors in a nested structure."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.split = Split()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.split(self.layer(self.layer(x)), scale=x)


class Split(nn.Module):
    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        return {"sum": x + scale, "product": x * scale}


def test_a_module_that_runs_twice_is_told_apart_and_structures_are_flattened() -> None:
    model, log = Branches(), Log()
    with observe_modules(model, log):
        result = model(torch.zeros(1, 2))
    assert list(log.outputs) == ["layer", "layer#1", "split"]
    assert log.inputs["split"] == log.outputs["split"] == [(1, 2), (1, 2)]
    assert [tuple(tensor.shape) for tensor in tensors_in(result)] == [(1, 2), (1, 2)]


def test_modules_can_be_steered_through_keywords_and_dicts() -> None:
    model, steer = Branches(), Steer("split")
    with torch.no_grad(), observe_modules(model, steer):
        result = model(torch.zeros(1, 2))
    assert [tensor.tolist() for tensor in steer.given] == [[[2.0, 2.0]], [[1.0, 1.0]]]
    assert result["sum"].tolist() == result["product"].tolist() == [[7.0, 7.0]]


def test_layers_at_any_depth_by_path() -> None:
    model, log = van_tf.van_nano(), Log()
    original = keras.layers.Layer.__call__
    with observe_layers(model, log):
        model(np.zeros((2, 64, 96, 3), np.float32))
    assert log.outputs["block1_0/attn/spatial_gating_unit/conv_spatial"] == [(2, 16, 24, 32)]
    assert log.inputs["patch_embed1/proj"] == [(2, 70, 102, 3)]
    assert log.outputs["pool"] == [(2, 96)]
    assert "van_nano" not in log.outputs
    assert keras.layers.Layer.__call__ is original


def test_layers_can_be_steered() -> None:
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Rescaling(3.0, name="triple")(inputs))
    steer = Steer("triple")
    with observe_layers(model, steer):
        result = model(np.zeros((1, 2), np.float32))
    assert steer.given[0].tolist() == [[3.0, 3.0]]
    assert np.asarray(result).tolist() == [[7.0, 7.0]]


def test_both_sides_see_the_same_layers(reference: VAN) -> None:
    modules, layers = Log(), Log()
    with torch.no_grad(), observe_modules(reference, modules):
        reference(torch.zeros(1, 3, 64, 64))
    model = van_tf.van_nano()
    with observe_layers(model, layers):
        model(np.zeros((1, 64, 64, 3), np.float32))
    names = {re.sub(r"^(block\d)_", r"\1.", name).replace("/", ".") for name in layers.outputs}
    assert modules.outputs.keys() - names == set()
    assert names - modules.outputs.keys() == {f"patch_embed{stage}.pad" for stage in (1, 2, 3, 4)} | {"pool"}


def test_a_recorded_run_stands_for_what_comes_before_a_layer() -> None:
    calls: list[str] = []

    class Inner(keras.layers.Layer):  # type: ignore[misc]
        def __init__(self, shared: Any, **options: Any) -> None:
            super().__init__(**options)
            self.shared = shared

        def call(self, x: Any) -> Any:
            return self.shared(self.shared(x))

    shared = keras.layers.Dense(4, name="shared")
    inputs = keras.Input((4,))
    x = Inner(shared, name="block")(keras.layers.Dense(4, name="first")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, name="last")(shared(x)))

    class Watching:
        watches_inputs = True

        def before(self, name: str, inputs: list[torch.Tensor]) -> None:
            calls.append(name)

        def after(self, name: str, outputs: list[torch.Tensor]) -> None:
            return None

    given = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    replay = Replay()
    replay.record()
    with observe_layers(model, Watching(), replay):
        whole = model(given, training=False)
    every = list(calls)
    assert "block/shared#2" in every
    calls.clear()
    replay.until("last")
    with observe_layers(model, Watching(), replay):
        np.testing.assert_array_equal(model(given, training=False), whole)
    assert calls == ["last"]
    calls.clear()
    # A layer that is called inside another begins with that one; later calls keep their numbers.
    replay.until("block/shared")
    with observe_layers(model, Watching(), replay):
        np.testing.assert_array_equal(model(given, training=False), whole)
    assert calls == [name for name in every if name != "first"]
    calls.clear()
    replay.clear()
    with observe_layers(model, Watching(), replay):
        model(given, training=False)
    assert calls == every
