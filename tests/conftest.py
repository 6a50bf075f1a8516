"""Fixtures for all tests: a synthetic nano checkpoint, its parts, and a way to run the command line."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
# Parallel processes share the cores. With a thread per core in each process, they would wait for each other.
if (processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    for library in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        os.environ.setdefault(library, str(max(1, (os.cpu_count() or 1) // processes)))

from porting.models.frameworks import load_triton

load_triton()

import hypothesis  # noqa: F401 - it looks for who refers to its generators, which it cannot see once they are frozen
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from porting.families.van import VanFamily
from porting.models.synthetic import fill_with_synthetic_weights
from porting.references.van import VAN, build_van

CLASSES = 10


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every search for garbage, which takes a sixth of the tests' time."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Leave what remains out of the search at exit."""
    gc.freeze()


@pytest.fixture(scope="session")
def family() -> VanFamily:
    return VanFamily()


@pytest.fixture(scope="session")
def reference() -> VAN:
    """A nano with synthetic weights in every tensor. Tests must not change it."""
    model = build_van("nano", CLASSES)
    fill_with_synthetic_weights(model, seed=1)
    return model.eval()


@pytest.fixture(scope="session")
def state_dict(reference: VAN) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in reference.state_dict().items()}


@pytest.fixture(scope="session")
def checkpoint(reference: VAN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "nano.pth.tar"
    torch.save({"state_dict": reference.state_dict()}, path)
    return path


@pytest.fixture
def run_cli() -> Callable[..., Result]:
    """Run `van-port` in this process. The `output` of the result has both streams, as on a terminal."""
    from porting.cli.main import cli

    def run(*args: Any) -> Result:
        return CliRunner().invoke(cli, [str(arg) for arg in args])

    return run
