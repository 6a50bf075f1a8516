"""Ports every layout to every format and back: at parity at each step, and equal bit for bit at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from porting.families.van import VanFamily
from porting.files.checkpoint import read_checkpoint
from porting.models.synthetic import fill_with_synthetic_weights
from porting.references.van import build_van
from porting.tasks.options import CheckOptions
from porting.tasks.port import port
from porting.tasks.revert import revert
from tests.mapping.test_naming import Tensors, body, mmpretrain, transformers_model

ONE = CheckOptions(samples=1)
LAYOUTS: dict[str, tuple[float, Callable[[Tensors], Tensors]]] = {
    "official": (1e-6, dict),
    "transformers": (1e-6, lambda _: transformers_model("nano", 10).state_dict()),
    "mmpretrain": (1e-5, mmpretrain),
    "mmpretrain backbone": (1e-5, lambda tensors: mmpretrain(body(tensors))),
    "segmentation": (1e-5, body),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "suffix"),
    # All fifteen pairs take minutes, so each format and each layout is tried at least once.
    [*((layout, ".h5") for layout in LAYOUTS), ("transformers", ".weights.h5"), ("segmentation", ".keras")],
)
def test_there_and_back(family: VanFamily, tmp_path: Path, layout: str, suffix: str) -> None:
    epsilon, renamed = LAYOUTS[layout]
    model = build_van("nano", 10, layer_norm_eps=epsilon)
    fill_with_synthetic_weights(model, seed=2)
    tensors = renamed(model.eval().state_dict())
    prefix = "backbone." if layout == "mmpretrain backbone" else ""
    first, keras_file = tmp_path / "x.pth", tmp_path / f"x{suffix}"
    torch.save(tensors, first)
    # Two publishers use the same names for a body without a head.
    stated = layout if layout == "segmentation" else None
    ported = port(family, "nano", keras_file, checkpoint=first, layout=stated, options=ONE)
    assert ported.report is not None
    assert ported.report.passed
    for back_suffix in (".pth", ".safetensors"):
        back = tmp_path / f"back{back_suffix}"
        result = revert(family, "nano", keras_file, back, options=ONE)
        assert result.report is not None
        assert result.report.passed
        found = read_checkpoint(back).state_dict
        unused = {name for name in tensors if name.endswith("num_batches_tracked") or name.startswith("van.layernorm.")}
        # Without a head, the result is a body saved alone.
        wanted = {name.removeprefix(prefix): tensors[name] for name in tensors.keys() - unused}
        assert found.keys() - {name.removeprefix(prefix) for name in unused} == wanted.keys()
        for name, tensor in wanted.items():
            np.testing.assert_array_equal(found[name], tensor.numpy())
