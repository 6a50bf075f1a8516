"""Port every common kind of checkpoint, written by the library that usually writes it, and print a table.

\b
    python scripts/checkpoint_kinds.py            # the table, as Markdown
    python scripts/checkpoint_kinds.py --keep DIR # also keep the files

Each file holds the weights of VAN nano in the format of one library or tool, written by that library if it is
installed. The script ports it like `van-port --variant nano --checkpoint FILE --no-check`.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click

# The outcome of a file that is ported.
TAKEN = "ported"


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint. `make` writes the given model to a folder and returns the path.

    `needs` is the package that writes it. `arguments` are passed to `port`. `expected` is TAKEN, or part of the
    expected error message.
    """

    name: str
    make: Callable[[Path, Any], Path]
    expected: str = TAKEN
    needs: str = "torch"
    arguments: dict[str, Any] = field(default_factory=dict)


def build() -> Any:
    """Build VAN nano with weights that reveal mistakes."""
    from porting.models.synthetic import fill_with_synthetic_weights
    from porting.references.van import build_van

    model = build_van("nano", 10)
    fill_with_synthetic_weights(model, seed=1)
    return model.eval()


def wrapped(make: Callable[[Any], Any]) -> Callable[[Path, Any], Path]:
    """Save the result of `make` for a model with torch.save."""

    def write(folder: Path, model: Any) -> Path:
        import torch

        torch.save(make(model), folder / "x.pth")
        return folder / "x.pth"

    return write


def raw(name: str, content: bytes) -> Callable[[Path, Any], Path]:
    def write(folder: Path, model: Any) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def zeros(model: Any) -> dict[str, Any]:
    return {name: tensor * 0 for name, tensor in model.state_dict().items()}


def optimizer(model: Any) -> dict[str, Any]:
    import torch

    adam = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, 64, 64)).sum().backward()
    adam.step()
    model.zero_grad()
    return adam.state_dict()


def training_script(model: Any) -> dict[str, Any]:
    import argparse

    import torch

    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = optimizer(model)
    model.load_state_dict(weights)
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters()), 1).state_dict()
    arguments = argparse.Namespace(model="van_nano", lr=1e-3, bn_eps=None)
    return {"model": weights, "optimizer": state, "lr_scheduler": scheduler, "epoch": 3, "args": arguments}


def lightning(folder: Path, model: Any) -> Path:
    import logging

    import lightning as pl
    import torch

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = model
            self.criterion = torch.nn.CrossEntropyLoss()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.criterion(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = torch.utils.data.TensorDataset(torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.long))
    options = {"max_steps": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", enable_model_summary=False, default_root_dir=folder, **options)
    module = Module()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    model.load_state_dict(weights)
    trainer.save_checkpoint(folder / "x.ckpt")
    return folder / "x.ckpt"


def accelerate(folder: Path, model: Any) -> Path:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.save_model(accelerator.prepare(model), str(folder), max_shard_size="200KB")
    return folder


def accelerate_file(folder: Path, model: Any) -> Path:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.save(accelerator.get_state_dict(accelerator.prepare(model)), folder / "x.pth")
    return folder / "x.pth"


def counted(folder: Path, model: Any) -> Path:
    import copy

    import thop
    import torch

    model = copy.deepcopy(model)
    thop.profile(model, inputs=(torch.zeros(1, 3, 64, 64),), verbose=False)
    # thop removes its counters again, but scripts that save inside its hooks, and older versions, keep them.
    tensors = model.state_dict()
    for module, _ in model.named_modules():
        stem = f"{module}." if module else ""
        tensors |= {f"{stem}total_ops": torch.zeros(1), f"{stem}total_params": torch.zeros(1)}
    torch.save(tensors, folder / "x.pth")
    return folder / "x.pth"


def averaged(folder: Path, model: Any) -> Path:
    import torch

    torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), folder / "x.pth")
    return folder / "x.pth"


def traced(folder: Path, model: Any) -> Path:
    import torch

    trace: Any = torch.jit.trace
    trace(model, torch.zeros(1, 3, 64, 64)).save(str(folder / "x.pt"))
    return folder / "x.pt"


def frozen(folder: Path, model: Any) -> Path:
    import torch

    trace: Any = torch.jit.trace
    torch.jit.freeze(trace(model, torch.zeros(1, 3, 64, 64))).save(str(folder / "x.pt"))
    return folder / "x.pt"


def exported(folder: Path, model: Any) -> Path:
    import torch

    torch.export.save(torch.export.export(model, (torch.zeros(1, 3, 64, 64),)), folder / "x.pt2")
    return folder / "x.pt2"


def distributed(folder: Path, model: Any) -> Path:
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({"model": model.state_dict()}, checkpoint_id=folder / "dcp")
    return folder / "dcp"


def quantised(folder: Path, model: Any) -> Path:
    import torch

    quantise: Any = torch.ao.quantization.quantize_dynamic
    layer = quantise(torch.nn.Sequential(torch.nn.Linear(4, 4)), {torch.nn.Linear}, dtype=torch.qint8)
    torch.save(layer.state_dict(), folder / "x.pth")
    return folder / "x.pth"


def quantised_tensor(folder: Path, model: Any) -> Path:
    import torch

    tensors = dict(model.state_dict())
    tensors["head.weight"] = torch.quantize_per_tensor(tensors["head.weight"], 0.1, 0, torch.qint8)
    torch.save(tensors, folder / "x.pth")
    return folder / "x.pth"


def zipped(folder: Path, model: Any) -> Path:
    stream = io.BytesIO()
    import torch

    torch.save(model.state_dict(), stream)
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.writestr("weights/van.pth", stream.getvalue())
    return folder / "x.zip"


def tarred(folder: Path, model: Any) -> Path:
    import torch

    torch.save(model.state_dict(), folder / "x.pth")
    with tarfile.open(folder / "x.tar", "w") as archive:
        archive.add(folder / "x.pth", "x.pth")
    return folder / "x.tar"


def onnx(folder: Path, model: Any) -> Path:
    import torch

    options: dict[str, Any] = {"dynamo": False, "verbose": False}
    torch.onnx.export(model, (torch.zeros(1, 3, 64, 64),), str(folder / "x.onnx"), **options)
    return folder / "x.onnx"


def tensorflow_checkpoint(folder: Path, model: Any) -> Path:
    import tensorflow as tf

    tf.train.Checkpoint(v=tf.Variable(1.0)).save(str(folder / "ckpt" / "model"))
    return folder / "ckpt"


def saved_model(folder: Path, model: Any) -> Path:
    import tensorflow as tf

    tf.saved_model.save(tf.Module(), str(folder / "saved"))
    return folder / "saved"


def safetensors_file(folder: Path, model: Any) -> Path:
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / "x.safetensors")
    return folder / "x.safetensors"


def distributed_parts(folder: Path, model: Any) -> Path:
    (folder / "ds").mkdir()
    (folder / "ds" / "zero_to_fp32.py").write_text("")
    return folder / "ds"


def gguf() -> bytes:
    return b"GGUF" + (3).to_bytes(4, "little") + bytes(100)


def prefixed(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def kinds() -> list[Kind]:
    """All kinds of the table, the most common first."""
    made = [
        Kind("a state_dict", wrapped(lambda m: m.state_dict())),
        Kind("safetensors", safetensors_file),
        Kind("old format of torch.save", old_format),
        Kind("training script: model, optimizer, scheduler, args", wrapped(training_script)),
        Kind("Lightning .ckpt", lightning, needs="lightning"),
        Kind("accelerate, sharded safetensors", accelerate, needs="accelerate"),
        Kind("accelerate, one file", accelerate_file, needs="accelerate"),
        Kind("thop's counters in every module", counted, needs="thop"),
        Kind("AveragedModel (SWA, EMA)", averaged),
        Kind("DataParallel", wrapped(lambda m: prefixed("module.", m.state_dict()))),
        Kind("torch.compile", wrapped(lambda m: prefixed("_orig_mod.", m.state_dict()))),
        Kind("FSDP, consolidated", wrapped(fsdp)),
        Kind(
            "DeepSpeed, module beside the optimizer", wrapped(lambda m: {"module": m.state_dict(), "dp_world_size": 1})
        ),
        Kind("a prefix of any name", wrapped(lambda m: prefixed("student.net.", m.state_dict()))),
        Kind("GAN-like: two models, one fits", wrapped(two_models)),
        Kind(
            "two models that both fit",
            wrapped(lambda m: {"a": m.state_dict(), "b": zeros(m)}),
            "several dicts of tensors",
        ),
        Kind(
            "two models that both fit, with --key",
            wrapped(lambda m: {"a": m.state_dict(), "b": zeros(m)}),
            arguments={"key": "a"},
        ),
        Kind(
            "several modules in one dict, with --prefix",
            wrapped(lambda m: prefixed("student.", m.state_dict()) | prefixed("teacher.", zeros(m))),
            arguments={"prefix": "student"},
        ),
        Kind("averages beside plain weights", wrapped(lambda m: {"model": m.state_dict(), "model_ema": zeros(m)})),
        Kind(
            "averages in a dict of their own, with --ema",
            wrapped(lambda m: {"net": zeros(m), "ema": {"module": m.state_dict(), "decay": 0.99}}),
            arguments={"ema": True},
        ),
        Kind("TorchScript, traced", traced),
        Kind("TorchScript, frozen", frozen, "without named weights"),
        Kind("torch.export (.pt2)", exported, "a program of torch.export"),
        Kind("distributed checkpoint, a folder", distributed, "a distributed checkpoint of PyTorch, in parts"),
        Kind("DeepSpeed folder, in parts", distributed_parts, "a DeepSpeed checkpoint, in parts"),
        Kind("quantised modules (torch.ao)", quantised, "quantised"),
        Kind("a quantised tensor", quantised_tensor, "quantised"),
        Kind("a zip with a .pth in it", zipped, "a zip archive that holds weights/van.pth"),
        Kind("a tar with a .pth in it", tarred, "a tar archive"),
        Kind("gzip", raw("x.pth", gzip.compress(b"x" * 1000)), "a gzip archive"),
        Kind("GGUF", raw("x.gguf", gguf()), "a GGUF file"),
        Kind("ONNX", onnx, "an ONNX model", needs="onnx"),
        Kind("TensorFlow checkpoint", tensorflow_checkpoint, "a TensorFlow checkpoint", needs="tensorflow"),
        Kind("TensorFlow SavedModel", saved_model, "a TensorFlow SavedModel", needs="tensorflow"),
        Kind("a whole pickled model", wrapped(lambda m: m), "refused: the file asks to run or build"),
    ]
    keys = ("state_dict", "model_state_dict", "params", "net", "network", "weights", "generator", "params_ema")
    return made + [Kind(f"under {key!r}", wrapped(partial(under, key))) for key in keys]


def under(key: str, model: Any) -> dict[str, Any]:
    return {key: model.state_dict(), "epoch": 1}


def old_format(folder: Path, model: Any) -> Path:
    import torch

    torch.save(model.state_dict(), folder / "x.pth", _use_new_zipfile_serialization=False)
    return folder / "x.pth"


def fsdp(model: Any) -> dict[str, Any]:
    """The names of a model whose modules FSDP has wrapped."""
    tensors = model.state_dict().items()
    return {
        "model": {f"_fsdp_wrapped_module.{name.replace('.0.', '.0._fsdp_wrapped_module.')}": t for name, t in tensors}
    }


def two_models(model: Any) -> dict[str, Any]:
    import torch

    return {"generator": model.state_dict(), "discriminator": torch.nn.Linear(3, 3).state_dict()}


def outcome(kind: Kind, folder: Path, model: Any) -> str:
    """TAKEN if the ported weights equal those of the model, else the error message of the port."""
    from porting.errors import PortingError
    from porting.families.registry import get_family
    from porting.tasks.port import port

    path = kind.make(folder, model)
    with tempfile.TemporaryDirectory() as place:
        try:
            result = port(
                get_family("van"), "nano", Path(place, "x.h5"), checkpoint=path, check=False, **kind.arguments
            )
        except PortingError as error:
            return error.message.replace(f"{folder}/", "")
    own = model.state_dict()
    for entry in result.case.key_map.entries:
        for name in entry.sources:
            if not (result.case.state_dict[name] == own[name].numpy()).all():
                return f"OTHER WEIGHTS: {name}"
    return TAKEN


@click.command(help=__doc__)
@click.option("--keep", type=click.Path(path_type=Path), help="Keep the files in this folder.")
def main(keep: Path | None) -> None:
    rows, wrong = [], []
    model = build()
    with tempfile.TemporaryDirectory() as place:
        for number, kind in enumerate(kinds()):
            if importlib.util.find_spec(kind.needs) is None:
                rows.append((kind.name, f"not tried: {kind.needs} is not installed"))
                continue
            folder = (keep or Path(place)) / f"{number:02}"
            folder.mkdir(parents=True)
            found = outcome(kind, folder, model)
            if kind.expected not in found:
                wrong.append(kind.name)
            rows.append((kind.name, found.partition("\n")[0]))
    click.echo("| checkpoint | outcome |\n|---|---|")
    for name, found in rows:
        click.echo(f"| {name} | {found} |")
    click.echo(
        f"\n{len(rows)} kinds, {len(wrong)} with an unexpected outcome{': ' if wrong else ''}{json.dumps(wrong)}"
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
