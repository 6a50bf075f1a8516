from __future__ import annotations

import keras
import numpy as np
import torch
from torch import nn

import van_tf
from porting.activations import record_layers, record_modules
from porting.references.van import VAN


def test_modules_come_in_the_order_in_which_they_finish_and_channels_last(reference: VAN) -> None:
    seen: dict[str, tuple[int, ...]] = {}
    with torch.inference_mode(), record_modules(reference, lambda name, array: seen.update({name: array.shape})):
        reference(torch.zeros(2, 3, 64, 96))
    names = list(seen)
    assert names[:3] == ["patch_embed1.proj", "patch_embed1.norm", "patch_embed1"]
    assert names.index("block1.0.attn.proj_1") < names.index("block1.0.attn") < names.index("block1.0")
    assert seen["patch_embed1"] == seen["norm1"] == (2, 16, 24, 32)
    assert seen["head"] == (2, 10)


def test_a_module_that_runs_twice_is_told_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    names: list[str] = []
    with record_modules(Twice(), lambda name, _: names.append(name)):
        Twice()  # another model's calls are not recorded
    model = Twice()
    with record_modules(model, lambda name, _: names.append(name)):
        model(torch.zeros(1, 2))
    assert names == ["layer", "layer#1"]


def test_hooks_are_gone_afterwards(reference: VAN) -> None:
    with record_modules(reference, lambda *_: None):
        pass
    assert not any(module._forward_hooks for module in reference.modules())


def test_layers_at_any_depth_by_path() -> None:
    model = van_tf.van_nano()
    seen: dict[str, tuple[int, ...]] = {}
    original = keras.layers.Layer.__call__
    with record_layers(model, lambda name, array: seen.update({name: array.shape})):
        model(np.zeros((2, 64, 96, 3), np.float32))
    assert seen["block1.0/attn/spatial_gating_unit/conv_spatial"] == (2, 16, 24, 32)
    assert seen["pool"] == (2, 96)
    assert "van_nano" not in seen
    assert keras.layers.Layer.__call__ is original


def test_both_sides_see_the_same_layers(reference: VAN) -> None:
    modules: set[str] = set()
    layers: set[str] = set()
    with torch.inference_mode(), record_modules(reference, lambda name, _: modules.add(name)):
        reference(torch.zeros(1, 3, 64, 64))
    model = van_tf.van_nano()
    with record_layers(model, lambda name, _: layers.add(name.replace("/", "."))):
        model(np.zeros((1, 64, 64, 3), np.float32))
    assert modules - layers == set()
    assert layers - modules == {f"patch_embed{stage}.pad" for stage in (1, 2, 3, 4)} | {"pool"}
