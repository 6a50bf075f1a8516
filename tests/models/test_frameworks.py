from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest

from porting.models import frameworks


def test_keras_own_retracing_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    frameworks.silence_retracing()
    logger = logging.getLogger("tensorflow")
    before = len(logger.filters)
    frameworks.silence_retracing()
    assert len(logger.filters) == before
    with caplog.at_level("WARNING"):
        caplog.handler.setLevel("WARNING")
        logger.addHandler(caplog.handler)
        logger.warning("5 out of the last 5 calls to <function conv.<locals>._conv_xla> triggered retracing")
        logger.warning("another warning")
        logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"another warning"}


def test_models_without_memory_are_not_filled() -> None:
    """Filling tensors of the meta device would load torch._dynamo, which takes a second."""
    program = (
        "import sys, torch\n"
        "from porting.models.frameworks import without_memory\n"
        "with without_memory():\n"
        "    layer = torch.nn.Linear(3, 4)\n"
        "    torch.nn.init.normal_(layer.weight, std=0.1)\n"
        "    layer.bias.data.normal_()\n"
        "    torch.nn.init.trunc_normal_(layer.weight)\n"
        "assert layer.weight.is_meta\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_garbage_is_collected_again_once_tensorflow_is_loaded() -> None:
    """A process that is ours alone postpones it; the process of somebody else is left as it was."""
    program = (
        "import gc\n"
        "from porting.models.frameworks import collecting_later, postpone_garbage_collection, start_tensorflow\n"
        "with collecting_later():\n"
        "    assert not gc.isenabled()\n"
        "assert gc.isenabled() and not gc.get_freeze_count()\n"
        "gc.disable()\n"
        "with collecting_later():\n"
        "    pass\n"
        "assert not gc.isenabled()\n"
        "postpone_garbage_collection()\n"
        "start_tensorflow()\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_filling_ends_and_fills_what_is_no_parameter() -> None:
    """PyTorch's truncated normal draws again until all numbers fit, which numbers that stay as they are never do."""
    import torch
    from torch.nn.init import trunc_normal_

    own = torch.nn.init.trunc_normal_
    parameter, buffer = torch.nn.Parameter(torch.full((4, 4), 9.0)), torch.zeros(3)
    with frameworks.without_filling():
        torch.nn.init.trunc_normal_(parameter, a=-1.0, b=1.0)
        torch.nn.init.kaiming_uniform_(parameter)
        torch.nn.init.constant_(buffer, 2.0)
        assert bool((parameter == 9.0).all())
        trunc_normal_(parameter, a=-1.0, b=1.0)  # imported before, so it runs as ever
    assert bool((parameter.abs() <= 1.0).all())
    assert bool((buffer == 2.0).all())
    assert torch.nn.init.trunc_normal_ is own


def test_without_random_weights_has_zeros_and_ends() -> None:
    keras = pytest.importorskip("keras")

    class Own(keras.initializers.RandomNormal):  # type: ignore[misc,name-defined]
        def __call__(self, shape: Any, dtype: Any = None) -> Any:
            return super().__call__(shape, dtype) + 1.0

    def weights(initializer: Any) -> Any:
        layer = keras.layers.Dense(3, kernel_initializer=initializer, bias_initializer="ones")
        layer.build((None, 4))
        return layer.get_weights()

    for name in ("glorot_uniform", "he_normal", "random_normal", "random_uniform", "truncated_normal", "orthogonal"):
        with frameworks.without_random_weights():
            kernel, bias = weights(name)
        assert kernel.shape == (4, 3)
        assert kernel.dtype == "float32"
        assert not kernel.any(), name
        assert bias.all(), "what is not random stays"
        assert weights(name)[0].all(), f"{name} draws again"
    with frameworks.without_random_weights():
        assert weights(Own())[0].all(), "a function of one's own runs"
