"""Run an evaluation in this process or on Ray. Both judge the same blocks and produce the same tally."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from porting.errors import EngineError, PortingError
from porting.evaluation.items import Block
from porting.evaluation.judge import PYTORCH, SAME
from porting.evaluation.samples import Batch
from porting.evaluation.tally import Tally
from porting.models.frameworks import holding_back_stderr

ENGINES = ("local", "ray")
# The number of blocks in preparation while Keras runs another.
_AHEAD = 2
_CPUS_TO_LOAD = 0.5
# The maximum number of parts into which Ray divides a data set.
_MOST_PARTS = 2000
# CPUs of a local cluster, as counted by Ray, in addition to those of one process per model.
_CPUS_TO_READ = 2


class Arm(Protocol):
    """One model. `prepare` computes inputs that only this model takes; a call stores its results in the batch."""

    def prepare(self, batch: Batch, pool: Executor | None = None) -> None: ...

    def __call__(self, batch: Batch) -> None: ...


class Plan(Protocol):
    """What to run. Ray's processes get a pickled copy."""

    def load(self, block: Block, pool: Executor | None = None) -> Batch: ...

    def arm(self, name: str) -> contextlib.AbstractContextManager[Arm]: ...

    def judge(self, batch: Batch) -> Tally: ...


def run_local(plan: Plan, blocks: Iterable[Block]) -> Iterator[tuple[int, Tally]]:
    """Run all blocks in this process, and yield the number and tally of each, in order.

    While Keras runs one block, PyTorch runs the next, and later ones are read and prepared.
    """
    with contextlib.ExitStack() as stack:
        pytorch, keras = [stack.enter_context(plan.arm(name)) for name in (PYTORCH, SAME)]
        pool = stack.enter_context(ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)))
        loading, running = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(2)]

        def load(block: Block) -> Batch:
            batch = plan.load(block, pool)
            keras.prepare(batch, pool)
            return batch

        def run_pytorch(loaded: Future[Batch]) -> Batch:
            batch = loaded.result()
            pytorch(batch)
            return batch

        waiting: deque[Future[Batch]] = deque()
        try:
            for block in _then_none(blocks):
                if block is not None:
                    waiting.append(running.submit(run_pytorch, loading.submit(load, block)))
                while waiting and (block is None or len(waiting) > _AHEAD):
                    batch = waiting.popleft().result()
                    keras(batch)
                    yield batch.block, plan.judge(batch)
        finally:
            for executor in (running, loading):
                executor.shutdown(wait=False, cancel_futures=True)


def _then_none(blocks: Iterable[Block]) -> Iterator[Block | None]:
    yield from blocks
    yield None


def run_on_ray(
    plan: Plan, blocks: Iterable[Block], *, address: str = "", workers: tuple[int, int] = (1, 1), threads: int = 1
) -> Iterator[tuple[int, Tally]]:
    """Run all blocks on Ray Data, and yield the number and tally of each once, in order of completion.

    Reading and decoding are tasks. Each model has a pool of actors, from one to the number in `workers`. Each actor is
    a separate process that counts as `threads` CPUs. Ray restarts what fails. `address` is that of a running cluster;
    without it, one starts on this machine and ends with the run.

    Raises EngineError if Ray is missing or cannot be reached, or if a block cannot be run.
    """
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # do not send usage data
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray, data = import_module("ray"), import_module("ray.data")
    own_cluster = not ray.is_initialized()
    if own_cluster:
        _start(ray, address, 2 * threads + _CPUS_TO_READ)
    try:
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = False
        rows = [{"block": pickle.dumps(block)} for block in blocks]
        if not rows:
            return
        shared = pickle.dumps(plan)
        found = data.from_items(rows, override_num_blocks=min(len(rows), _MOST_PARTS)).map(
            partial(_load, shared), num_cpus=_CPUS_TO_LOAD
        )
        for name, count in zip((PYTORCH, SAME), workers, strict=True):
            found = found.map(
                _ArmOnRay,
                fn_constructor_args=(shared, name),
                num_cpus=threads,
                compute=data.ActorPoolStrategy(min_size=1, max_size=count),
            )
        done: set[int] = set()
        for row in found.iter_rows():
            number, tally = pickle.loads(row["tally"])
            if number not in done:  # blocks that were run again after a failure may arrive twice
                done.add(number)
                yield number, tally
    except PortingError:
        raise
    except ray.exceptions.RayError as error:
        raise EngineError(f"Ray: {_last_line(error)}") from None
    finally:
        if own_cluster:
            ray.shutdown()


def require_ray() -> None:
    """Raise EngineError if Ray is not installed."""
    if any(find_spec(name) is None for name in ("ray", "pyarrow", "pandas")):
        raise EngineError("--engine ray needs Ray", hint="Install it: pip install 'van-port[ray]'.")


def _start(ray: Any, address: str, cpus: int) -> None:
    _require_reachable(address)
    options: dict[str, Any] = {"address": address} if address else {"num_cpus": max(os.cpu_count() or 1, cpus)}
    if not address:
        options["include_dashboard"] = False
    try:
        with holding_back_stderr():
            ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise EngineError(
            f"Ray: {_last_line(error)}", hint="Check --ray-address, or omit it to start Ray on this machine."
        ) from None


def _require_reachable(address: str) -> None:
    """Raise EngineError if nothing answers at the address. Ray itself would retry for minutes and end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"Ray: nothing answers at {address}: {error}",
            hint="Check --ray-address, or omit it to start Ray on this machine.",
        ) from None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


@lru_cache(maxsize=1)
def _plan_of(shared: bytes) -> Plan:
    made: Plan = pickle.loads(shared)
    return made


def _load(shared: bytes, row: Mapping[str, Any]) -> dict[str, Any]:
    return {"batch": pickle.dumps(_plan_of(shared).load(pickle.loads(row["block"])))}


class _ArmOnRay:
    """One model in a separate process. The last model also judges, so that only tallies are sent on."""

    def __init__(self, shared: bytes, name: str) -> None:
        self._plan = _plan_of(shared)
        self._last = name == SAME
        self._stack = contextlib.ExitStack()
        self._arm = self._stack.enter_context(self._plan.arm(name))

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        batch: Batch = pickle.loads(row["batch"])
        self._arm.prepare(batch)
        self._arm(batch)
        if self._last:
            return {"tally": pickle.dumps((batch.block, self._plan.judge(batch)))}
        return {"batch": pickle.dumps(batch)}
