"""Plant porting mistakes into healthy ports of several small models, and look for false alarms in healthy ones.

\b
    python scripts/model_study.py                    # every fault of every model, in a table by model and kind
    python scripts/model_study.py --sample 40        # 40 faults, drawn with the date as seed
    python scripts/model_study.py --healthy 100      # healthy ports in several styles
    python scripts/model_study.py --together 30      # two and three mistakes at once

Models and styles are those of `studied_models.py`. A fault counts as named if the first culprit is its layer, and its
cause counts as told if the report states it. A wrong cause that the report calls certain is counted separately.
"""

from __future__ import annotations

import datetime
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from porting.models.frameworks import start_tensorflow
from porting.parity.compare import check_parity
from porting.parity.report import EXACT, FLOAT32, Culprit, ParityReport

sys.path.insert(0, str(Path(__file__).parent))
from studied_models import MODELS, STYLES, WITHOUT, Studied

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Fault:
    """One mistake in one layer. The report should contain one of `causes`; if empty, the cause does not matter."""

    kind: str
    module: str
    plant: Callable[[Any], None]
    causes: tuple[str, ...] = ()


def weight(index: int, change: Callable[[Array], Array]) -> Callable[[Any], None]:
    def plant(layer: Any) -> None:
        variable = layer.weights[index]
        variable.assign(np.ascontiguousarray(change(np.array(variable))))

    return plant


def exchanged(one: int, other: int) -> Callable[[Any], None]:
    def plant(layer: Any) -> None:
        values = np.array(layer.weights[one]), np.array(layer.weights[other])
        layer.weights[one].assign(values[1])
        layer.weights[other].assign(values[0])

    return plant


def attribute(name: str, value: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda layer: setattr(layer, name, value(getattr(layer, name)))


def scaled(size: float) -> Callable[[Array], Array]:
    """Change the largest number by a relative `size`, but by at least one unit in the last place."""

    def change(values: Array) -> Array:
        values = values.copy()
        place = int(np.abs(values).argmax())
        new = np.float32(values.flat[place] * (1 + size))
        values.flat[place] = np.nextafter(new, np.float32(np.inf)) if new == values.flat[place] else new
        return values

    return change


def bumped(size: float) -> Callable[[Any], Any]:
    import keras

    def wrap(function: Any) -> Any:
        return lambda x: function(x) + size * keras.ops.exp(-keras.ops.square(x))

    return wrap


def gates(count: int, one: int, other: int) -> Callable[[Array], Array]:
    def change(values: Array) -> Array:
        parts = np.split(values, count, -1)
        parts[one], parts[other] = parts[other], parts[one]
        return np.concatenate(parts, -1)

    return change


def faults_of(studied: Studied) -> Iterator[Fault]:
    """The possible mistakes of each layer of a model, by its kind."""
    import keras

    for module, layer in studied.layers.items():
        kind = type(layer).__name__
        if kind in {"Conv2D", "Dense"}:
            for size in (1e-2, 1e-5, 1e-6, 1e-7):
                yield Fault(f"a weight off by {size:g}", module, weight(0, scaled(size)), (f"{module}.weight[",))
            yield Fault(
                "a kernel scaled", module, weight(0, lambda k: k * np.float32(1.0001)), ("times what it should",)
            )
            if kind == "Conv2D" and layer.kernel_size != (1, 1):
                yield Fault("height and width", module, weight(0, lambda k: k.swapaxes(0, 1)), ("are swapped",))
                yield Fault("flipped", module, weight(0, lambda k: k[::-1, ::-1]), ("flipped in height and width",))
            if layer.kernel.shape[-1] == layer.kernel.shape[-2] and kind == "Conv2D":
                swapped = ("input and output channels are swapped",)
                yield Fault("channels swapped", module, weight(0, lambda k: k.swapaxes(-1, -2)), swapped)
            if layer.use_bias:
                yield Fault("bias lost", module, weight(1, np.zeros_like), ("the bias is lost",))
        elif kind == "BatchNormalization":
            yield Fault("epsilon 1e-3", module, attribute("epsilon", lambda _: 1e-3), ("an epsilon of 0.001",))
            close = attribute("epsilon", lambda _: 1.001e-5)
            yield Fault("epsilon 1.001e-5", module, close, ("an epsilon of 1.001e-05",))
            yield Fault("epsilon off by 1e-6", module, attribute("epsilon", lambda eps: eps * (1 + 1e-6)))
            yield Fault("gamma, beta exchanged", module, exchanged(0, 1), ("are exchanged",))
            yield Fault("variance as deviation", module, weight(3, np.sqrt), ("stored as standard deviation",))
            yield Fault("mean lost", module, weight(2, np.zeros_like), ("the running mean is lost",))
            yield Fault("momentum", module, attribute("momentum", lambda _: 0.99), ("momentum is 0.99",))
        elif kind == "LayerNormalization":
            yield Fault("epsilon 1e-3", module, attribute("epsilon", lambda _: 1e-3), ("an epsilon of 0.001",))
            yield Fault("epsilon 1e-6", module, attribute("epsilon", lambda _: 1e-6), ("an epsilon of 1e-06",))
            yield Fault("beta lost", module, weight(1, np.zeros_like), ("its shift (beta) is lost",))
        elif kind == "Activation":
            for size in (1e-5, 1e-6, 1e-7):
                yield Fault(f"a bump of {size:g}", module, attribute("activation", bumped(size)))
            by_tanh = attribute("activation", lambda _: lambda x: keras.activations.gelu(x, approximate=True))
            if isinstance(studied.reference.get_submodule(module), __import__("torch").nn.GELU):
                yield Fault("GELU by tanh", module, by_tanh, ("the tanh approximation of GELU",))
            silu = attribute("activation", lambda _: keras.activations.elu)
            yield Fault("ELU instead", module, silu)
        elif kind == "MultiHeadAttention":
            yield Fault("q and k exchanged", module, exchanged(0, 2))
            yield Fault("heads split wrongly", module, weight(0, lambda k: k.swapaxes(1, 2).reshape(k.shape)))
            yield Fault("output off by 1e-6", module, weight(6, scaled(1e-6)))
        elif kind in {"LSTM", "GRU"}:
            count = 4 if kind == "LSTM" else 3
            for index in (0, 1):
                yield Fault("gates exchanged", module, weight(index, gates(count, 1, 2)))
            yield Fault("bias lost", module, weight(2, np.zeros_like))
            yield Fault("a weight off by 1e-6", module, weight(0, scaled(1e-6)))
        elif kind == "Embedding":
            yield Fault("rows off by one", module, weight(0, lambda table: np.roll(table, 1, 0)))
            yield Fault("a weight off by 1e-6", module, weight(0, lambda table: table * np.float32(1 + 1e-6)))


def check(studied: Studied) -> ParityReport:
    return check_parity(studied.reference, studied.candidate, studied.inputs, strict_settings=True, **studied.arguments)


def who(report: ParityReport) -> list[str]:
    """The names of the culprits, or the layers whose settings differ if there are no culprits."""
    if report.culprits:
        return [culprit.culprit for culprit in report.culprits]
    return [difference.layer for difference in report.audit.failures] if report.audit else []


def told(report: ParityReport) -> list[Any]:
    return [culprit.diagnosis for culprit in report.culprits if isinstance(culprit, Culprit) and culprit.diagnosis]


def study(models: Sequence[str], sample: int, seed: int) -> int:
    cases = []
    rng = np.random.default_rng(seed)
    for number, name in enumerate(models):
        own = []
        for style in STYLES:
            if (name, style) not in WITHOUT:
                count = len(list(faults_of(MODELS[name](0, style))))
                own += [(name, style, index) for index in range(count)]
        if sample:  # as many of each model, whatever its size
            share = len(range(number, sample, len(models)))
            own = [own[index] for index in sorted(rng.permutation(len(own))[:share])]
        cases += own
    rows: dict[str, Counter[str]] = {}
    wrong = []
    for name, style, index in track(cases, "faults", transient=True):
        studied = MODELS[name](0, style)
        fault = list(faults_of(studied))[index]
        fault.plant(studied.layers[fault.module])
        report = check(studied)
        row = rows.setdefault(f"{name}, {style}", Counter())
        row["planted"] += 1
        row["found"] += not report.passed
        named = who(report)[:1] == [fault.module]
        row["named"] += named
        causes = told(report)
        said = " ".join(
            [each.cause for each in causes] + [str(each) for each in (report.audit.failures if report.audit else ())]
        )
        if fault.causes:
            row["asked"] += 1
            right = any(cause in said for cause in fault.causes)
            row["told"] += right
            certain = any(each.confidence == "certain" for each in causes)
            row["wrong, certain"] += certain and not right
        if report.passed or not named:
            wrong.append(
                f"{name}, {style}: {fault.kind} in {fault.module}: passed {report.passed}, named {who(report)[:3]}"
            )
    table = Table("model", "planted", "found", "named", "cause asked", "cause told", "wrong but certain")
    total: Counter[str] = sum(rows.values(), Counter())
    for label, row in [*rows.items(), ("all", total)]:
        keys = ("planted", "found", "named", "asked", "told", "wrong, certain")
        table.add_row(label, *(str(row[key]) for key in keys))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for line in wrong:
        click.echo(line)
    return total["planted"] - total["found"]


def together(models: Sequence[str], count: int, seed: int) -> int:
    """Plant two or three mistakes at once in different layers, and count how often all of them are named."""
    rng = np.random.default_rng(seed)
    named = found = 0
    for number in track(range(count), "mistakes together", transient=True):
        name = models[number % len(models)]
        studied = MODELS[name](0, STYLES[number % 2])
        faults = [fault for fault in faults_of(studied) if fault.kind != "momentum"]
        chosen: dict[str, Fault] = {}
        for index in rng.permutation(len(faults)):
            chosen.setdefault(faults[index].module, faults[index])
            if len(chosen) == 2 + number % 2:
                break
        for fault in chosen.values():
            fault.plant(studied.layers[fault.module])
        report = check(studied)
        found += not report.passed
        all_named = set(who(report)) == set(chosen)
        named += all_named
        if not all_named:
            planted = ", ".join(f"{fault.kind} in {module}" for module, fault in chosen.items())
            click.echo(f"{name}: {planted}; named {who(report)}")
    click.echo(f"{count} ports with two or three mistakes: {found} found, all mistakes named in {named}")
    return count - found


def healthy(models: Sequence[str], count: int, seed: int) -> int:
    alarms, exact, rounding = 0, (0.0, ""), (0.0, "")
    for number in track(range(count), "healthy ports", transient=True):
        name, style = models[number % len(models)], STYLES[number // len(models) % len(STYLES)]
        report = check(MODELS[name](seed + number, style))
        alarms += not report.passed
        label = f"{name}, {style}, seed {seed + number}"
        if not report.passed:
            click.echo(f"false alarm: {label}: {report.objections[0]}")
        results = [layer.views[EXACT].ratio for layer in report.layers if layer.is_output]
        rounded = [layer.views[FLOAT32].ratio for layer in report.layers if FLOAT32 in layer.views]
        exact = max(exact, (max(results, default=0.0), label))
        rounding = max(rounding, (max(rounded, default=0.0), label))
    click.echo(f"{count} healthy ports: {alarms} false alarms")
    click.echo(f"largest exact ratio of the outputs: {exact[0]:.1f} ({exact[1]})")
    click.echo(f"largest ratio in float32: {rounding[0]:.1f} ({rounding[1]})")
    return alarms


@click.command(help=__doc__)
@click.option("--sample", default=0, help="Study this many faults, drawn with --seed.")
@click.option("--healthy", "healthy_count", default=0, help="Check this many healthy ports instead.")
@click.option("--together", "together_count", default=0, help="Plant two or three mistakes at once, this many times.")
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), help="Only these.  [default: all]")
@click.option("--seed", default=int(datetime.date.today().strftime("%Y%m%d")), help="[default: the date]")
def main(sample: int, healthy_count: int, together_count: int, models: tuple[str, ...], seed: int) -> None:
    models = models or tuple(MODELS)
    start_tensorflow()
    warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # Keras under NumPy 2
    if healthy_count:
        sys.exit(min(healthy(models, healthy_count, seed), 1))
    if together_count:
        sys.exit(min(together(models, together_count, seed), 1))
    sys.exit(min(study(models, sample, seed), 1))


if __name__ == "__main__":
    main()
