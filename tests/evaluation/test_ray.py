"""The same evaluation on a cluster of two nodes: when one node dies, and when workers are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from porting.errors import EngineError
from porting.evaluation.engines import run_on_ray
from porting.evaluation.items import Block
from porting.evaluation.result import Evaluation
from porting.families.van import VanFamily
from porting.progress import Progress
from porting.reports.evaluation import read_evaluation
from porting.tasks.evaluate import EvaluateOptions, evaluate
from porting.tasks.plan import Plan
from porting.tasks.port import port
from tests.evaluation.test_evaluate import same

COUNT = 300
pytestmark = [
    pytest.mark.slow,
    # Warnings of Ray itself, and resources that its daemons leave open.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def nano(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ported nano, and images in folders named by class number."""
    root = tmp_path_factory.mktemp("nano")
    weights, folder = root / "nano.h5", root / "data"
    port(VanFamily(), "nano", weights, checkpoint=checkpoint, check=False)
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        place = folder / str(number % 10)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 40, 3)).astype(np.uint8)).save(place / f"{number}.png")
    (folder / "0" / "empty.png").write_bytes(b"")
    return weights, folder


def run(checkpoint: Path, nano: tuple[Path, Path], progress: Progress | None = None, **options: Any) -> Evaluation:
    weights, folder = nano
    return evaluate(
        VanFamily(),
        "nano",
        weights,
        str(folder),
        checkpoint={"location": checkpoint},
        options=EvaluateOptions(batch_size=8, threads=1, engine="ray", **options),
        progress=progress or Progress(),
    )


def run_locally(checkpoint: Path, nano: tuple[Path, Path], report: Path) -> Evaluation:
    """Run in a separate process: in this one, TensorFlow has already fixed its number of threads."""
    weights, folder = nano
    command = [sys.executable, "-m", "porting.cli.main", "evaluate", "--variant", "nano", "--weights", str(weights)]
    command += ["--checkpoint", str(checkpoint), "--data", str(folder), "--batch-size", "8", "--threads", "1"]
    subprocess.run([*command, "--report", str(report)], check=True, capture_output=True)
    return read_evaluation(report)


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    yield made
    made.shutdown()


def processes(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_dead_node_and_killed_workers_lose_nothing(
    checkpoint: Path, nano: tuple[Path, Path], cluster: Any, tmp_path: Path
) -> None:
    second = cluster.add_node(num_cpus=4)
    cluster.wait_for_nodes()
    done: list[str] = []

    class Destroying(Progress):
        def __call__(self, description: str, samples: int = 0, total: int = 0) -> None:
            if description.startswith("evaluating") and samples >= COUNT // 6 and not done:
                actors = processes("_ArmOnRay")
                assert actors
                os.kill(actors[0].pid, signal.SIGKILL)
                done.append("a worker")
            if description.startswith("evaluating") and samples >= COUNT // 3 and done == ["a worker"]:
                cluster.remove_node(second, allow_graceful=False)
                done.append("a node")

    found = run(checkpoint, nano, Destroying(), ray_address=cluster.address, workers=(2, 2))
    assert done == ["a worker", "a node"]
    assert found.samples == COUNT
    assert found.refused == {"empty": 1}
    assert same(found, run_locally(checkpoint, nano, tmp_path / "local.json"))


def test_a_cluster_that_is_not_there(checkpoint: Path, nano: tuple[Path, Path]) -> None:
    with pytest.raises(EngineError, match="nothing answers at 127.0.0.1:1"):
        run(checkpoint, nano, ray_address="127.0.0.1:1")


def test_no_blocks_need_no_actor(checkpoint: Path, nano: tuple[Path, Path]) -> None:
    plan = Plan(VanFamily(), "nano", nano[0], {"location": checkpoint})
    blocks: list[Block] = []
    assert list(run_on_ray(plan, blocks)) == []
