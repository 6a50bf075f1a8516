"""Check ports that others publish, and print a table: exact or not, and where the models diverge.

\b
    python scripts/audit_ports.py                          # every port
    python scripts/audit_ports.py --port timm/densenet121  # one of them

keras-hub converts checkpoints of timm and of transformers when it loads them. This script gives each PyTorch model
synthetic weights, saves it with its own package's function, and loads that folder with keras-hub's `from_preset`, as
users load a published checkpoint. facenet-pytorch and mtcnn contain the same three trained networks, one package for
each framework; their ports need both packages. Nothing is downloaded. This project takes no part in the port; it only
judges the result. Every port runs in a separate process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import click

# Small configurations of transformers' models.
_NARROW = {
    "vocab_size": 500,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
_GROUPED = {**_NARROW, "num_key_value_heads": 2, "head_dim": 16}
_IMAGES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 16,
}
_DISTILLED = {
    "vocab_size": 500,
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 128,
    "max_position_embeddings": 64,
}
_ROTARY = {
    **_NARROW,
    "pad_token_id": 1,
    "mask_token_id": 4,
    "position_embedding_type": "rotary",
    "layer_norm_eps": 1e-5,
}
_WINDOWED = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}


@dataclass(frozen=True)
class Port:
    """A transformers model without its head: its class, its configuration, and its image size, or 0 for tokens.

    `saved_as` is the class of published checkpoints, if the converter needs its names. `zeros` is a tensor that is zero
    in published checkpoints.
    """

    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    side: int = 0
    saved_as: str = ""
    zeros: str = ""


TIMM = (
    "resnet18",
    "resnet50",
    "resnetv2_50",
    "vgg16",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_lite0",
    "mobilenetv3_small_100",
    "cspdarknet53",
    "cspresnet50",
    "hgnetv2_b4",
)
TRANSFORMERS = {
    "bert": Port("BertModel", _NARROW, saved_as="BertForPreTraining"),
    "roberta": Port(
        "RobertaModel",
        {**_NARROW, "layer_norm_eps": 1e-5},
        saved_as="RobertaForMaskedLM",
        zeros="embeddings.token_type_embeddings.weight",
    ),
    "xlm-roberta": Port("XLMRobertaModel", {**_NARROW, "layer_norm_eps": 1e-5}, saved_as="XLMRobertaForMaskedLM"),
    "distilbert": Port("DistilBertModel", _DISTILLED, saved_as="DistilBertForMaskedLM"),
    "albert": Port("AlbertModel", {**_NARROW, "embedding_size": 32}, saved_as="AlbertForPreTraining"),
    "gpt2": Port("GPT2Model", {"vocab_size": 500, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": Port("LlamaModel", {**_GROUPED, "rms_norm_eps": 1e-5}, saved_as="LlamaForCausalLM"),
    "mistral": Port(
        "MistralModel", {**_GROUPED, "rms_norm_eps": 1e-5, "sliding_window": 8}, saved_as="MistralForCausalLM"
    ),
    "qwen2": Port("Qwen2Model", _GROUPED, saved_as="Qwen2ForCausalLM"),
    "qwen3": Port("Qwen3Model", _GROUPED, saved_as="Qwen3ForCausalLM"),
    "gemma": Port("GemmaModel", _GROUPED, saved_as="GemmaForCausalLM"),
    "esm": Port("EsmModel", _ROTARY, saved_as="EsmForMaskedLM"),
    "vit": Port("ViTModel", _IMAGES, 64, saved_as="ViTForImageClassification"),
    "deit": Port("DeiTModel", _IMAGES, 64, saved_as="DeiTForImageClassificationWithTeacher"),
    "dinov2": Port("Dinov2Model", {**_IMAGES, "mlp_ratio": 2}, 64),
    "swin": Port("SwinModel", _WINDOWED, 64),
}
# The networks that facenet-pytorch and mtcnn contain, and the sides of their images.
MTCNN = {"PNet": 64, "RNet": 24, "ONet": 48}
PORTS = (
    *(f"timm/{name}" for name in TIMM),
    *(f"transformers/{name}" for name in TRANSFORMERS),
    *(f"facenet-pytorch/{name}" for name in MTCNN),
)


def of_timm(name: str, folder: Path) -> tuple[Any, Any, Any]:
    """A timm classifier, and keras-hub's conversion of its folder."""
    import keras_hub
    import timm
    import torch

    from porting.models.synthetic import fill_with_synthetic_weights

    reference = timm.create_model(name, pretrained=False).eval()
    side = reference.default_cfg["input_size"][-1]
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    fill_with_synthetic_weights(reference, 0, run=lambda model: model(images))
    timm.models.save_for_hf(reference, folder, safe_serialization=True)
    if hasattr(reference, "head_hidden_size"):
        # Published configurations count the features after the head's first layer; later versions of timm do not.
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_features": reference.head_hidden_size}))
    return reference, keras_hub.models.ImageClassifier.from_preset(str(folder)), images[:1].permute(0, 2, 3, 1).numpy()


def of_transformers(name: str, folder: Path) -> tuple[Any, Any, Any]:
    """A transformers model without its head, and keras-hub's backbone converted from its folder."""
    import keras_hub
    import numpy as np
    import torch
    import transformers

    from porting.families.builders import text_inputs, transformers_model
    from porting.models.synthetic import fill_with_synthetic_weights

    port = TRANSFORMERS[name]
    reference = transformers_model(port.model, port.config).eval()
    if port.side:
        given: Any = np.random.default_rng(1).normal(size=(1, port.side, port.side, 3)).astype(np.float32)
        images = torch.from_numpy(given).permute(0, 3, 1, 2)
        fill_with_synthetic_weights(reference, 0, run=lambda model: model(images))
    else:
        given = text_inputs(port.config["vocab_size"])
        given["token_ids"] = np.maximum(given["token_ids"], 5)  # avoid special tokens
        tokens = torch.from_numpy(given["token_ids"])
        fill_with_synthetic_weights(reference, 0, run=lambda model: model(input_ids=tokens))
    if port.zeros:
        reference.get_parameter(port.zeros).data.zero_()
    plain = getattr(transformers, port.saved_as or port.model)(
        reference.config
    )  # the class name is stored in the folder
    body = getattr(plain, plain.base_model_prefix) if port.saved_as else plain
    state = reference.state_dict()
    body.load_state_dict({name: state[name] for name in body.state_dict()})  # some lack the pooler
    plain.save_pretrained(folder)
    backbone = keras_hub.models.Backbone.from_preset(str(folder))
    if isinstance(given, dict):
        if "segment_ids" in backbone.input:
            given["segment_ids"] = np.zeros_like(given["token_ids"])
        given = {key: given[key] for key in backbone.input}
    return reference, backbone, given


def of_facenet_pytorch(name: str, folder: Path) -> tuple[Any, Any, Any]:
    """A trained network of facenet-pytorch, and that of mtcnn."""
    import numpy as np

    # Not among this project's extras: facenet-pytorch asks for an old version of torch, though it runs with any.
    theirs, ours = import_module("facenet_pytorch.models.mtcnn"), import_module("mtcnn.stages")
    images = np.random.default_rng(1).uniform(-1.0, 1.0, (4, MTCNN[name], MTCNN[name], 3)).astype(np.float32)
    return getattr(theirs, name)(), getattr(ours, f"Stage{name}")().model, images


_MAKERS = {"timm": of_timm, "transformers": of_transformers, "facenet-pytorch": of_facenet_pytorch}


def judge(port: str) -> dict[str, Any]:
    """Check one port."""
    from porting.models.frameworks import start_tensorflow

    start_tensorflow()
    import porting

    package, _, name = port.partition("/")
    with tempfile.TemporaryDirectory() as folder:
        try:
            reference, candidate, inputs = _MAKERS[package](name, Path(folder))
        except Exception as error:  # packages raise anything for unsupported models
            lines = str(error).strip().splitlines()
            return {"failed": f"{type(error).__name__}: {lines[0] if lines else ''}"}
    report = porting.check_parity(reference, candidate, inputs, strict_settings=False)
    said = [
        f"{culprit.layer}: {culprit.diagnosis.cause}" if culprit.diagnosis is not None else str(culprit)
        for culprit in report.culprits
    ]
    if not (report.passed or said):
        said = [str(report.first_divergence or "")]
    output = report.worst_exact
    ratios = [layer.views["float32"].ratio for layer in report.layers if layer.is_output and "float32" in layer.views]
    return {
        "ratio": max(ratios, default=None),
        "passed": report.passed,
        "output": None if output is None else output.relative_error,
        "said": said,
    }


def _row(port: str, found: Mapping[str, Any]) -> str:
    if "failed" in found:
        cells = ["not converted", "-", "-", found["failed"]]
    else:
        output = "-" if found["output"] is None else f"{found['output']:.1e}"
        more = f" ({len(found['said']) - 1} more)" if len(found["said"]) > 1 else ""
        ratio = "-" if found["ratio"] is None else f"{found['ratio']:.1f}"
        cells = ["exact" if found["passed"] else "**differs**", output, ratio, "".join(found["said"][:1]) + more]
    return f"| {port} | " + " | ".join(cell.replace("|", "/").replace("\n", " ")[:300] for cell in cells) + " |"


@click.command(help=__doc__)
@click.option("--port", "wanted", multiple=True, type=click.Choice(PORTS), help="Port to check.  [default: all]")
@click.option("--one", hidden=True)
def main(wanted: tuple[str, ...], one: str | None) -> None:
    if one:
        print(json.dumps(judge(one)))
        return
    click.echo("| port | verdict | error of the outputs | in units of float32's rounding | where the models diverge |")
    click.echo("|---|---|---|---|---|")
    for port in wanted or PORTS:
        run = subprocess.run([sys.executable, __file__, "--one", port], capture_output=True, text=True)
        lines = run.stdout.strip().splitlines()
        if run.returncode or not lines:
            last = run.stderr.strip().splitlines()
            raise SystemExit(f"{port}: the check itself failed: {last[-1] if last else run.returncode}")
        click.echo(_row(port, json.loads(lines[-1])))


if __name__ == "__main__":
    main()
