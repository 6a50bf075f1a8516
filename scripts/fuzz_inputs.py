"""Feed broken and hostile files to every reader, and count failures.

\b
    python scripts/fuzz_inputs.py                 # 2,400 cases
    python scripts/fuzz_inputs.py --cases 20000 --seed 7

Each case is a checkpoint (torch zip, nested dicts, old torch pickle, TorchScript, safetensors, index of shards), a
configuration beside one, a weights file (HDF5, .keras) or a report. It is damaged at random or by design, and read as
`van-port` reads it; a readable report is also rendered in every format. A case fails if it ends in anything other than
success or an error message, crashes the process, runs code, changes its input, leaves a file behind, or needs more
memory than its size plus `MEMORY_BOUND_MIB`. (A process with its own limit, 4 GiB of address space, first reads files
of Keras weights; see `porting.files.survey`.) Cases run in other processes, so that crashes are counted.
"""

from __future__ import annotations

import collections
import copy
import io
import json
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

MEMORY_BOUND_MIB = 256
_BATCH = 600
_SECONDS_A_BATCH = 600
_CANARY = "canary"

Case = tuple[str, str, bytes]  # the description, the file name, and the content


class _Call:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._reduced = function, arguments

    def __reduce__(self) -> Any:
        return self._reduced


def keras_model() -> Any:
    """Build the model whose weights files are damaged."""
    import keras

    inputs = keras.Input((4,))
    x = keras.layers.Dense(6, name="a")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="b")(keras.layers.BatchNormalization(name="norm")(x)))


def healthy() -> dict[str, bytes]:
    """One small intact file of each kind."""
    import safetensors.torch
    import torch

    from porting.files.weights_file import write_provenance, write_weights

    tensors = {f"layer{i}.weight": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4) + i for i in range(4)}
    files = {}
    for name, wrapped in (("zip.pth", {"state_dict": tensors, "epoch": 3}), ("plain.pth", tensors)):
        stream = io.BytesIO()
        torch.save(wrapped, stream)
        files[name] = stream.getvalue()
    stream = io.BytesIO()
    torch.save(tensors, stream, _use_new_zipfile_serialization=False)
    files["old.pth"] = stream.getvalue()
    files["x.safetensors"] = safetensors.torch.save(tensors)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": dict.fromkeys(tensors, "x.safetensors")}).encode()
    model = keras_model()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.h5")
        write_weights(path, model, {weight.path: weight.numpy() for weight in model.weights})
        model.save_weights(path.with_name("x.weights.h5"))
        model.save(path.with_name("x.keras"))
        for suffix in ("h5", "weights.h5", "keras"):
            own = path.with_name(f"x.{suffix}")
            write_provenance(own, {"family": "van"})
            files[own.name] = own.read_bytes()
    files["x.parity.json"] = a_report().encode()
    files["config.json"] = json.dumps(
        {"model_type": "van", "hidden_sizes": [32, 64, 160, 256], "layer_norm_eps": 1e-6, "hidden_act": "gelu"}
    ).encode()
    nested = {"hyper_parameters": {"width": 3}, "state_dict": {f"model.{n}": t for n, t in tensors.items()}}
    nested |= {"optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]}, "ema": tensors}
    stream = io.BytesIO()
    torch.save(nested, stream)
    files["nested.ckpt"] = stream.getvalue()
    stream = io.BytesIO()
    trace: Any = torch.jit.trace
    torch.jit.save(trace(torch.nn.Sequential(torch.nn.Linear(3, 2)), torch.ones(1, 3)), stream)
    files["script.pt"] = stream.getvalue()
    return files


def a_report() -> str:
    """The JSON report of a port with a mistake, in which no part is empty."""
    import keras
    import numpy as np
    import torch

    from porting.parity.compare import check_parity
    from porting.reports.document import to_json

    reference = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2)).eval()
    inputs = keras.Input((4,))
    x = keras.layers.ReLU(name="1")(keras.layers.Dense(5, name="0")(inputs))
    candidate = keras.Model(inputs, keras.layers.Dense(2, name="2")(x))
    for name in ("0", "2"):
        module: Any = reference[int(name)]
        candidate.get_layer(name).set_weights([module.weight.detach().numpy().T, module.bias.detach().numpy() * 2])
    return to_json(check_parity(reference, candidate, np.random.default_rng(0).normal(size=(3, 4)).astype("f4")))


def retyped(rng: random.Random, content: bytes) -> bytes:
    """Replace a few random values of a JSON document with values of another type or size."""
    document = json.loads(content)
    others: list[Any] = [
        None,
        True,
        -1,
        0,
        1e308,
        2**70,
        "",
        "NaN",
        "Infinity",
        "\ud800",
        "[/x]",
        "\x1b[2J",
        [],
        {},
        [[]],
        {"": None},
    ]
    for _ in range(rng.choice([1, 1, 2, 8])):
        place, key = document, None
        while isinstance(place, (dict, list)) and place and (key is None or rng.random() < 0.8):
            parent, key = place, rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            place = parent[key]
        if key is not None:
            parent[key] = copy.deepcopy(rng.choice(others))
    return json.dumps(document).encode()


def damaged(rng: random.Random, content: bytes, other: bytes) -> tuple[str, bytes]:
    """Damage a file in one or several random ways."""
    data = bytearray(content)
    names = []
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        kind = rng.choice(["flip", "cut", "zero", "insert", "splice", "swap", "number"])
        names.append(kind)
        at = rng.randrange(len(data) + 1) if data else 0
        size = rng.choice([1, 8, 64, 512])
        if kind == "flip":
            for _ in range(rng.choice([1, 3, 20])):
                if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "zero":
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif kind == "insert":
            data[at:at] = rng.randbytes(size)
        elif kind == "splice":
            begin = rng.randrange(len(other) + 1)
            data[at : at + size] = other[begin : begin + size * rng.choice([1, 4])]
        elif kind == "swap":
            del data[at : at + size]
        else:
            number = rng.choice([0, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, -(2**63)])
            data[at : at + 8] = struct.pack("<q", number if number < 2**63 else 0)
    return "+".join(names), bytes(data)


def torch_zip(
    pickled: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED, *, script: bool = False
) -> bytes:
    """Wrap a pickle in an archive of torch.save, or of torch.jit.save with `script`."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        if script:
            archive.writestr("archive/constants.pkl", pickle.dumps(()))
        for name, data in storages.items():
            archive.writestr(f"archive/data/{name}", data)
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def pickled_tensor(size: Any, stride: Any, offset: Any = 0, numel: Any = 4, dtype: str = "FloatStorage") -> bytes:
    """Pickle a state_dict with one tensor of any shape that the format can express."""
    import torch

    class Storage:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, Storage):
                return ("storage", getattr(torch, dtype), "0", "cpu", numel)
            return None

    stream = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    call = _Call(rebuild, Storage(), offset, size, stride, False, collections.OrderedDict())
    Pickler(stream, 2).dump({"layer.weight": call})
    return stream.getvalue()


def hostile_calls(canary: Path) -> list[tuple[str, bytes]]:
    """Pickles that call a function in each way that the format allows."""
    import builtins
    import os

    import torch

    command = f"touch {canary}"
    calls = [
        ("os.system", _Call(os.system, command)),
        ("eval", _Call(builtins.eval, f"__import__('os').system({command!r})")),
        ("exec", _Call(builtins.exec, f"open({str(canary)!r}, 'w')")),
        ("open", _Call(open, str(canary), "w")),
        ("subprocess", _Call(subprocess.run, ["touch", str(canary)])),
        ("getattr", _Call(getattr, "x", "upper")),
        ("import", _Call(__import__, "antigravity")),
        ("torch.load", _Call(torch.load, str(canary))),
        ("bytearray", _Call(bytearray, 10**12)),
        ("bytearray, real", _Call(bytearray, 3 * 10**9)),
    ]
    made = [(name, pickle.dumps({"a": call}, protocol)) for name, call in calls for protocol in (0, 2, 4)]
    text = command.encode()
    made += [
        ("INST", b"(S'" + text + b"'\nios\nsystem\n."),
        ("OBJ", b"(cos\nsystem\nS'" + text + b"'\no."),
        ("NEWOBJ", b"\x80\x02cos\nsystem\nS'" + text + b"'\n\x85\x81."),
        ("NEWOBJ_EX", b"\x80\x04cos\nsystem\nS'" + text + b"'\n\x85}\x92."),
        ("STACK_GLOBAL", b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(text)]) + text + b"\x85R."),
        ("BUILD", b"\x80\x02cargparse\nNamespace\n)\x81}X\x08\x00\x00\x00__dict__cos\nsystem\nsb."),
        ("EXT1", b"\x80\x02\x82\x01."),
        ("EXT4", b"\x80\x02\x84\x01\x00\x00\x00."),
        ("PERSID", b"Pfile:///etc/passwd\n."),
        ("BINPERSID", b"\x80\x02X\x01\x00\x00\x00aQ."),
        ("recursion", b"\x80\x02" + b"(" * 100_000 + b"."),
        ("deep lists", b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."),
        ("memo", b"\x80\x02h\xff."),
        ("long", b"\x80\x02\x8b\xff\xff\xff\x7f."),
        ("long text", b"\x80\x02X\xff\xff\xff\x7f."),
        ("long bytes", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f."),
        ("frame", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f."),
    ]
    return made


def hostile(canary: Path) -> list[Case]:
    """Files that are invalid by design."""
    storage = {"0": struct.pack("<4f", 1, 2, float("nan"), float("inf"))}
    cases: list[Case] = []
    for name, code in hostile_calls(canary):
        cases.append((f"pickle {name}", "x.pth", torch_zip(code, storage)))
        cases.append((f"script {name}", "x.pth", torch_zip(code, storage, script=True)))
        if code[:1] == b"\x80":
            cases.append((f"old pickle {name}", "x.pth", code))
    numbers: list[Any] = [-1, 0, 3, 5, 2**31, 2**40, 2**62, 2**63 - 1, 2**64, -(2**63), 1.5, "a", None, True]
    for number in numbers:
        for label, code in (
            ("size", pickled_tensor((number,), (1,))),
            ("size, stride 0", pickled_tensor((number,), (0,))),
            ("two sizes", pickled_tensor((number, number), (0, 0))),
            ("stride", pickled_tensor((2, 2), (number, 1))),
            ("offset", pickled_tensor((2,), (1,), offset=number)),
            ("numel", pickled_tensor((2,), (1,), numel=number)),
        ):
            cases.append((f"{label} {number}", "x.pth", torch_zip(code, storage)))
            cases.append((f"script {label} {number}", "x.pth", torch_zip(code, storage, script=True)))
    for dtype in ("DoubleStorage", "HalfStorage", "BoolStorage", "ComplexFloatStorage", "QInt8Storage", "LongStorage"):
        cases.append((dtype, "x.pth", torch_zip(pickled_tensor((2,), (1,), dtype=dtype), storage)))
    good = pickled_tensor((4,), (1,))
    bomb = {"0": bytes(200_000_000)}
    cases.append(("zip bomb", "x.pth", torch_zip(good, bomb, zipfile.ZIP_DEFLATED)))
    huge = pickled_tensor((50_000_000,), (1,), numel=50_000_000)
    cases.append(("zip bomb, used", "x.pth", torch_zip(huge, bomb, zipfile.ZIP_DEFLATED)))
    cases.append(("script, zip bomb", "x.pth", torch_zip(huge, bomb, zipfile.ZIP_DEFLATED, script=True)))
    for name in ("../../canary", "/tmp/canary", "0/../../x", "a" * 60_000):
        cases.append((f"member {name[:20]}", "x.pth", torch_zip(good, {**storage, name: b"x"})))
    with_twice = io.BytesIO(torch_zip(good, storage))
    import warnings

    with zipfile.ZipFile(with_twice, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("archive/data.pkl", pickle.dumps({"b": 1}))
    cases.append(("member twice", "x.pth", with_twice.getvalue()))
    cases.append(("no data.pkl", "x.pth", torch_zip(b"", {})))
    for label, header in _safetensors_headers():
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        cases.append((f"safetensors {label}", "x.safetensors", struct.pack("<Q", len(text)) + text + bytes(16)))
    for length in (0, 1, 2**32, 2**63, 2**64 - 1):
        cases.append((f"safetensors length {length}", "x.safetensors", struct.pack("<Q", length) + b"{}" + bytes(16)))
    for line in ("[" * 100_000, '{"a":' * 100_000, '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": 3}'):
        cases.append(("index", "m.index.json", line.encode()))
        cases.append(("report", "x.parity.json", line.encode()))
    return cases


def _safetensors_headers() -> list[tuple[str, Any]]:
    def one(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
        return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}

    cases: list[tuple[str, Any]] = [
        ("list", [1]),
        ("deep", b'{"a":' * 10_000),
        (
            "twice",
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        ),
        ("overlap", {**one(shape=(2,), offsets=(0, 8)), "b": one(shape=(2,), offsets=(4, 12))["a"]}),
        ("no dtype", {"a": {"shape": [4], "data_offsets": [0, 16]}}),
        ("metadata", {"__metadata__": {"x": 3}, **one()}),
        ("not utf-8", b'{"\xff":1}'),
    ]
    for shape in ([-4], [2**63], [2**32, 2**32], [0, 2**63], [1.5], "x", [], [4, 0]):
        cases.append((f"shape {shape}", one(shape=shape)))
    for offsets in ([16, 0], [-16, 0], [0, 2**63], [0, 15], [8, 24], [0], "x"):
        cases.append((f"offsets {offsets}", one(offsets=offsets)))
    for dtype in ("F64", "BF16", "F8_E4M3", "I8", "BOOL", "C64", "X", 3):
        cases.append((f"dtype {dtype}", one(dtype=dtype)))
    return cases


def make_case(number: int, seed: int, files: dict[str, bytes], fixed: list[Case]) -> Case:
    """Make the case with this number: first those by design, then random damage."""
    if number < len(fixed):
        return fixed[number]
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(sorted(files))
    if name.endswith(".json") and rng.random() < 0.7:
        return f"{name} retyped", name, retyped(rng, files[name])
    kind, content = damaged(rng, files[name], files[rng.choice(sorted(files))])
    return f"{name} {kind}", name, content


def read(path: Path) -> None:
    """Read a file with all readers that apply to its name."""
    from porting.families.registry import get_family
    from porting.files.checkpoint import read_checkpoint
    from porting.files.inspection import inspect_file
    from porting.files.weights_file import load_model
    from porting.mapping.convert import refuse_non_finite
    from porting.reports.document import read_report

    if path.name.endswith(".parity.json"):
        show(read_report(path), path)
        return
    if path.name == "config.json":
        path = path.with_name("model.safetensors")
    if path.suffix in {".h5", ".keras"}:
        inspect_file(path)
        load_model(path, keras_model)
        return
    checkpoint = read_checkpoint(path, fit=lambda names: float("layer1.weight" in names))
    checkpoint.remarks()
    get_family("van").stated_settings("nano", checkpoint.facts)
    state_dict = checkpoint.state_dict
    for array in state_dict.values():
        array.sum()
    refuse_non_finite({name: array for name, array in state_dict.items() if array.dtype.kind == "f"})


def show(report: Any, path: Path) -> None:
    """Render a report in every format, and compare it with the file beside it."""
    from rich.console import Console

    from porting.reports import FORMATS, render
    from porting.reports.document import file_beside
    from porting.reports.terminal import print_report

    file_beside(report, path)
    print_report(report, Console(file=io.StringIO(), markup=False), all_layers=True)
    for form in FORMATS:
        if form != "terminal":
            render(report, form).encode("utf-8")


def work(first: int, last: int, seed: int, folder: Path) -> None:
    """Run cases and write JSON lines: one with the number before each case, and one with its outcome after it."""
    from porting.errors import PortingError
    from porting.models.frameworks import start_tensorflow

    start_tensorflow()
    import torch  # noqa: F401  # import both before measuring memory

    files = healthy()
    canary = folder / _CANARY
    fixed = hostile(canary)
    log = (folder / "log").open("a", buffering=1)
    used = folder / "files"
    for number in range(first, last):
        shutil.rmtree(used, ignore_errors=True)
        used.mkdir()
        what, name, content = make_case(number, seed, files, fixed)
        (used / "x.safetensors").write_bytes(files["x.safetensors"])
        if name == "config.json":
            (used / "model.safetensors").write_bytes(files["x.safetensors"])
        (used / name).write_bytes(content)
        before = sorted(path.name for path in used.iterdir())
        log.write(json.dumps({"number": number, "what": what}) + "\n")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome = "read"
        try:
            read(used / name)
        except PortingError as error:
            outcome = f"refused: {type(error).__name__}"
        except BaseException as error:
            outcome = f"TRACEBACK: {type(error).__name__}: {str(error)[:200]}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 2**10
        if grown > MEMORY_BOUND_MIB + len(content) / 2**20:
            outcome = f"MEMORY: {grown:.0f} MiB for {len(content):,} bytes"
        if canary.exists():
            outcome = "CODE WAS RUN"
            canary.unlink()
        if sorted(path.name for path in used.iterdir()) != before:
            outcome = "LITTER"
        elif (used / name).read_bytes() != content:
            outcome = "INPUT CHANGED"
        log.write(json.dumps({"number": number, "what": what, "outcome": outcome}) + "\n")


def run_batch(first: int, last: int, seed: int, report: Callable[[dict[str, Any]], None]) -> None:
    """Run cases in a process. A case that crashes it is a failure, and a new process continues with the next case."""
    while first < last:
        with tempfile.TemporaryDirectory() as place:
            command = [
                sys.executable,
                __file__,
                "--worker",
                str(first),
                str(last),
                "--seed",
                str(seed),
                "--folder",
                place,
            ]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_A_BATCH)
                ended = f"exit code {done.returncode}: {done.stderr[-300:]}"
            except subprocess.TimeoutExpired:
                ended = f"not done in {_SECONDS_A_BATCH} s"
            log = Path(place, "log")
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        for line in lines:
            if "outcome" in line:
                report(line)
                first = line["number"] + 1
        if first < last:
            if not lines:
                raise click.ClickException(f"the worker process does not start: {ended}")
            what = lines[-1]["what"]
            report({"number": first, "what": what, "outcome": f"CRASH: {ended}"})
            first += 1


@click.command(help=__doc__)
@click.option("--cases", default=2400, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Seed of the random damage.")
@click.option("--worker", type=int, nargs=2, hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(cases: int, seed: int, worker: tuple[int, int] | None, folder: Path | None) -> None:
    if worker is not None and folder is not None:
        work(*worker, seed, folder)
        return
    from rich.progress import track

    outcomes: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, Any]] = []

    def report(line: dict[str, Any]) -> None:
        outcome = line["outcome"]
        bad = not outcome.startswith(("read", "refused"))
        outcomes["failures" if bad else outcome] += 1
        if bad:
            failures.append(line)

    for first in track(range(0, cases, _BATCH), "fuzzing", transient=True, disable=not sys.stdout.isatty()):
        run_batch(first, min(first + _BATCH, cases), seed, report)
    for line in failures:
        click.echo(f"case {line['number']} ({line['what']}): {line['outcome']}")
    click.echo("; ".join(f"{name}: {count}" for name, count in sorted(outcomes.items())))
    click.echo(f"{sum(outcomes.values())} cases, {len(failures)} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
