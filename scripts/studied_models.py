"""Small models of several kinds in both frameworks, for the studies. Each is implemented in several styles in Keras.

The style is that of the Keras model: `named` uses PyTorch's names, `renamed` uses meaningless names, and `folded` also
puts activations and norms into the layers before them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from porting.models.synthetic import fill_with_synthetic_weights

Array = np.ndarray[Any, Any]
STYLES = ("named", "renamed", "folded")
# Styles that a model does not have.
WITHOUT = {("van b0", "folded")}


@dataclass
class Studied:
    """Both models, their inputs, and the Keras layer of each PyTorch module."""

    name: str
    style: str
    reference: nn.Module
    candidate: Any
    inputs: Any
    layers: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)


class Writer:
    """A factory of Keras layers with the names of a style and the weights of PyTorch's modules."""

    def __init__(self, reference: nn.Module, style: str) -> None:
        self.reference, self.style = reference, style
        self.layers: dict[str, Any] = {}
        self._pending: list[tuple[Any, Callable[[], list[Array]]]] = []

    def name(self, module: str) -> str:
        return f"layer_{len(self.layers)}_of_keras" if self.style != "named" else module.replace(".", "_dot_")

    def keep(self, module: str, layer: Any, weights: Callable[[], list[Array]] | None = None) -> Any:
        self.layers[module] = layer
        if weights is not None:
            self._pending.append((layer, weights))
        return layer

    def module(self, name: str) -> Any:
        return self.reference.get_submodule(name)

    def conv(self, name: str, x: Any, activation: str | None = None, norm: str | None = None) -> Any:
        """A convolution with a separate padding layer, optionally with `norm` folded and the activation fused."""
        from keras import layers

        module = self.module(name)
        if any(module.padding):
            x = layers.ZeroPadding2D(module.padding)(x)
        layer = layers.Conv2D(
            module.out_channels,
            module.kernel_size,
            module.stride,
            groups=module.groups,
            use_bias=module.bias is not None or norm is not None,
            activation=activation,
            name=self.name(name),
        )

        def weights() -> list[Array]:
            kernel = module.weight.detach().double().numpy().transpose(2, 3, 1, 0)
            bias: Array = np.zeros(1) if module.bias is None else module.bias.detach().double().numpy()
            if norm is None:
                return [kernel] if module.bias is None else [kernel, bias]
            bn = self.module(norm)
            factor = (bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()).detach().numpy()
            shift = bn.bias.detach().double().numpy() - bn.running_mean.double().numpy() * factor
            return [kernel * factor, bias * factor + shift]

        return self.keep(name, layer, weights)(x)

    def batch_norm(self, name: str, x: Any) -> Any:
        from keras import layers

        module = self.module(name)
        layer = layers.BatchNormalization(epsilon=module.eps, momentum=1 - module.momentum, name=self.name(name))
        tensors = (module.weight, module.bias, module.running_mean, module.running_var)
        return self.keep(name, layer, lambda: [tensor.detach().numpy() for tensor in tensors])(x)

    def layer_norm(self, name: str, x: Any) -> Any:
        from keras import layers

        module = self.module(name)
        layer = layers.LayerNormalization(epsilon=module.eps, name=self.name(name))
        return self.keep(name, layer, lambda: [module.weight.detach().numpy(), module.bias.detach().numpy()])(x)

    def dense(self, name: str, x: Any, activation: str | None = None) -> Any:
        from keras import layers

        module = self.module(name)
        layer = layers.Dense(module.out_features, activation=activation, name=self.name(name))
        return self.keep(name, layer, lambda: [module.weight.detach().numpy().T, module.bias.detach().numpy()])(x)

    def activation(self, name: str, x: Any, function: Any) -> Any:
        from keras import layers

        return self.keep(name, layers.Activation(function, name=self.name(name)))(x)

    def conv_norm_act(self, prefix: str, x: Any, function: Any) -> Any:
        """`prefix`conv, `prefix`bn and, with a function, `prefix`act, in the current style."""
        conv, norm, act = (f"{prefix}{part}" for part in ("conv", "bn", "act"))
        if self.style == "folded":
            return self.conv(conv, x, activation=function, norm=norm)
        x = self.batch_norm(norm, self.conv(conv, x))
        return x if function is None else self.activation(act, x, function)

    def done(self, name: str, inputs: Any, outputs: Any, given: Any, **arguments: Any) -> Studied:
        import keras

        model = keras.Model(inputs, outputs)
        for layer, weights in self._pending:
            layer.set_weights([np.asarray(each, np.float32) for each in weights()])
        # In other styles than `named`, layers pair only by content.
        pairs = {module: layer.name for module, layer in self.layers.items()} if self.style == "named" else None
        return Studied(name, self.style, self.reference, model, given, self.layers, {"pairs": pairs, **arguments})


def filled(model: nn.Module, seed: int, *inputs: torch.Tensor) -> nn.Module:
    torch.manual_seed(seed)
    fill_with_synthetic_weights(model, seed, run=lambda own: own(*inputs))
    return model.eval()


class _ConvNormAct(nn.Module):
    def __init__(self, given: int, made: int, size: int, stride: int, act: nn.Module | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(given, made, size, stride, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(made)
        self.act = act

    def forward(self, x: torch.Tensor) -> Any:
        x = self.bn(self.conv(x))
        return x if self.act is None else self.act(x)


class _Residual(nn.Module):
    def __init__(self, given: int, made: int, stride: int) -> None:
        super().__init__()
        self.one = _ConvNormAct(given, made, 3, stride, nn.ReLU())
        self.two = _ConvNormAct(made, made, 3, 1, None)
        self.down = _ConvNormAct(given, made, 1, stride, None) if stride > 1 else None
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> Any:
        shortcut = x if self.down is None else self.down(x)
        return self.act(self.two(self.one(x)) + shortcut)


class ResNet(nn.Module):
    """A stem, three residual blocks in two stages, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _ConvNormAct(3, 16, 7, 2, nn.ReLU())
        self.blocks = nn.Sequential(_Residual(16, 16, 1), _Residual(16, 32, 2), _Residual(32, 32, 1))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def resnet(seed: int, style: str) -> Studied:
    import keras
    from keras import layers

    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(24, 49, 2))
    reference = filled(ResNet(), seed, torch.randn(4, 3, 48, 48))
    write = Writer(reference, style)
    inputs = keras.Input((None, None, 3))
    x = write.conv_norm_act("stem.", inputs, "relu")
    for index in range(3):
        shortcut = x
        y = write.conv_norm_act(f"blocks.{index}.one.", x, "relu")
        y = write.conv_norm_act(f"blocks.{index}.two.", y, None)
        if index == 1:
            shortcut = write.conv_norm_act(f"blocks.{index}.down.", x, None)
        x = write.activation(f"blocks.{index}.act", layers.Add()([y, shortcut]), "relu")
    outputs = write.dense("fc", layers.GlobalAveragePooling2D()(x))
    given = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    return write.done("resnet", inputs, outputs, given)


class _EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """Tokens, two encoder layers, and a head over their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 24)
        self.layers = nn.Sequential(_EncoderLayer(24, 4), _EncoderLayer(24, 4))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 6)

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.head(self.norm(self.layers(self.embedding(tokens))).mean(1))


def transformer(seed: int, style: str) -> Studied:
    import keras
    from keras import layers

    rng = np.random.default_rng(seed)
    count = int(rng.integers(5, 30))
    given = rng.integers(0, 40, (3, count))
    reference = filled(Transformer(), seed, torch.from_numpy(given))
    write = Writer(reference, style)
    inputs = keras.Input((None,), dtype="int32")
    embedding = layers.Embedding(40, 24, name=write.name("embedding"))
    x = write.keep("embedding", embedding, lambda: [write.module("embedding").weight.detach().numpy()])(inputs)
    for index in range(2):
        prefix = f"layers.{index}."
        y = write.layer_norm(f"{prefix}norm1", x)
        attention = layers.MultiHeadAttention(4, 6, name=write.name(f"{prefix}attn"))
        mha = write.module(f"{prefix}attn")

        def weights(mha: Any = mha) -> list[Array]:
            found = []
            kernels, biases = mha.in_proj_weight.detach().chunk(3), mha.in_proj_bias.detach().chunk(3)
            for kernel, bias in zip(kernels, biases, strict=True):
                found += [kernel.numpy().T.reshape(24, 4, 6), bias.numpy().reshape(4, 6)]
            last = mha.out_proj
            return [*found, last.weight.detach().numpy().T.reshape(4, 6, 24), last.bias.detach().numpy()]

        x = layers.Add()([x, write.keep(f"{prefix}attn", attention, weights)(y, y)])
        y = write.layer_norm(f"{prefix}norm2", x)
        if style == "folded":
            y = write.dense(f"{prefix}fc1", y, "gelu")
        else:
            y = write.activation(f"{prefix}act", write.dense(f"{prefix}fc1", y), "gelu")
        x = layers.Add()([x, write.dense(f"{prefix}fc2", y)])
    outputs = write.dense("head", layers.GlobalAveragePooling1D()(write.layer_norm("norm", x)))
    return write.done("transformer", inputs, outputs, given)


class Recurrent(nn.Module):
    """An LSTM, a GRU and a head over the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(9, 12, batch_first=True), nn.GRU(12, 10, batch_first=True)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(self.gru(self.lstm(x)[0])[0][:, -1])


def recurrent(seed: int, style: str) -> Studied:
    import keras
    from keras import layers

    rng = np.random.default_rng(seed)
    given = rng.normal(size=(3, int(rng.integers(4, 16)), 9)).astype(np.float32)
    reference = filled(Recurrent(), seed, torch.from_numpy(given))
    write = Writer(reference, style)
    inputs = keras.Input((None, 9))

    def weights(name: str, order: tuple[int, ...], together: bool) -> Callable[[], list[Array]]:
        def make() -> list[Array]:
            module = write.module(name)
            gates = {
                leaf: np.concatenate(
                    [np.split(getattr(module, f"{leaf}_l0").detach().numpy(), len(order))[index] for index in order]
                )
                for leaf in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            }
            biases = [gates["bias_ih"], gates["bias_hh"]]
            return [gates["weight_ih"].T, gates["weight_hh"].T, biases[0] + biases[1] if together else np.stack(biases)]

        return make

    lstm = layers.LSTM(12, return_sequences=True, name=write.name("lstm"))
    x = write.keep("lstm", lstm, weights("lstm", (0, 1, 2, 3), True))(inputs)
    gru = layers.GRU(10, name=write.name("gru"))
    x = write.keep("gru", gru, weights("gru", (1, 0, 2), False))(x)
    return write.done("recurrent", inputs, write.dense("fc", x), given)


class Detector(nn.Module):
    """A small backbone with three feature maps, and one head that is called on each."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = (_ConvNormAct(given, 12, 3, 2, nn.SiLU()) for given in (3, 12, 12))
        self.tower, self.predict = _ConvNormAct(12, 12, 3, 1, nn.SiLU()), nn.Conv2d(12, 7, 1)

    def forward(self, x: torch.Tensor) -> Any:
        first = self.c1(x)
        second = self.c2(first)
        return [self.predict(self.tower(level)) for level in (first, second, self.c3(second))]


def detector(seed: int, style: str) -> Studied:
    import keras
    from keras import layers

    rng = np.random.default_rng(seed)
    side = int(rng.integers(24, 49))
    reference = filled(Detector(), seed, torch.randn(4, 3, 48, 48))
    write = Writer(reference, style)
    inputs = keras.Input((None, None, 3))
    maps, x = [], inputs
    for level in ("c1.", "c2.", "c3."):
        x = write.conv_norm_act(level, x, "silu")
        maps.append(x)
    # One head for all maps: a separate model, called in another order than in PyTorch.
    within = keras.Input((None, None, 12))
    head = keras.Model(within, write.conv("predict", write.conv_norm_act("tower.", within, "silu")), name="head")
    last, middle, first = (head(each) for each in reversed(maps))
    outputs = [layers.Identity()(each) for each in (first, middle, last)]
    given = rng.normal(size=(2, side, side, 3)).astype(np.float32)
    return write.done("detector", inputs, outputs, given)


def van_b0(seed: int, style: str) -> Studied:
    """VAN-B0 with ten classes, under its own names or under others. It has no folded form."""
    from porting.families.van import VanFamily
    from porting.files.weights_file import assign_weights, variable_shapes
    from porting.mapping.convert import convert
    from porting.models.traverse import named_layers
    from porting.references.van import build_van

    torch.manual_seed(seed)
    reference, family = build_van("b0", 10), VanFamily()
    fill_with_synthetic_weights(reference, seed)
    reference.eval()
    candidate, key_map = family.build("b0", 10), family.key_map(family.spec("b0"))
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    assign_weights(candidate, convert(tensors, key_map, variable_shapes(candidate)).weights)
    own = named_layers(candidate)
    layers = {source: own[target] for source, target in key_map.one_to_one.items()}
    given = np.random.default_rng(seed).normal(size=(1, 64, 64, 3)).astype(np.float32)
    arguments: dict[str, Any] = {"key_map": key_map}
    if style != "named":
        arguments = {}
        for number, layer in enumerate(own.values()):
            layer.name = f"layer_{number}_of_keras"
    return Studied("van b0", style, reference, candidate, given, layers, arguments)


MODELS: dict[str, Callable[[int, str], Studied]] = {
    "resnet": resnet,
    "transformer": transformer,
    "recurrent": recurrent,
    "detector": detector,
    "van b0": van_b0,
}
