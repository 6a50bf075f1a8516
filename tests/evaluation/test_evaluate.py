"""Whole evaluations of a toy model: what they find, and what they blame."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from porting.errors import FamilyError, ReportError, SourceError
from porting.evaluation.judge import Judge, ranks
from porting.evaluation.result import Evaluation, evaluation_of, explained, mcnemar, objections, share
from porting.evaluation.samples import Batch, Sample, prepare_own
from porting.evaluation.tally import Tally
from porting.families.given import GivenFamily
from porting.mapping.rules import KeyRule
from porting.progress import Progress
from porting.reports.evaluation import conclusion, from_json, to_html, to_json, to_markdown
from porting.tasks.evaluate import EvaluateOptions, evaluate
from porting.tasks.port import port
from tests.evaluation.conftest import CLASSES, COUNT, Toy


def run(toy: Toy, *, data: Path | str | None = None, weights: Path | None = None, **options: Any) -> Evaluation:
    return evaluate(
        toy.family,
        "small",
        weights or toy.weights,
        str(data or toy.folder),
        checkpoint={"location": toy.checkpoint},
        options=EvaluateOptions(**{"batch_size": 16, **options}),
    )


def same(one: Evaluation, other: Evaluation) -> bool:
    """Whether two evaluations are equal, leaving time and provenance aside."""

    def bare(found: Evaluation) -> Evaluation:
        arms = tuple(replace(arm, seconds=0.0) for arm in found.arms)
        return replace(found, arms=arms, seconds={}, context={})

    return to_json(bare(one)) == to_json(bare(other))


@pytest.fixture(scope="module")
def healthy(toy: Toy) -> Evaluation:
    return run(toy, own="none")


def with_head(toy: Toy, path: Path, order: list[int]) -> Path:
    """The port, with the classes of its head in another order."""
    path.write_bytes(toy.weights.read_bytes())
    with h5py.File(path, "r+") as file:
        found: list[h5py.Dataset] = []
        file["head"].visititems(lambda _, each: found.append(each) if isinstance(each, h5py.Dataset) else None)
        assert len(found) == 2
        for dataset in found:
            dataset[...] = dataset[...][..., order]
    return path


def test_a_healthy_port_changes_nothing(healthy: Evaluation) -> None:
    assert healthy.samples == healthy.labelled == COUNT
    assert [arm.top1.right for arm in healthy.arms] == [COUNT, COUNT]
    assert healthy.blame == "nothing"
    model = healthy.step("model")
    assert model is not None
    assert model.flips == 0
    assert model.kl is not None
    assert model.kl < 1e-9
    assert objections(healthy, max_flips=0, max_drop=0.0, earlier=healthy) == []


def test_the_batch_size_changes_no_count(toy: Toy, healthy: Evaluation) -> None:
    other = run(toy, own="none", batch_size=50)
    assert [arm.top1 for arm in other.arms] == [arm.top1 for arm in healthy.arms]
    assert other.steps[0].flips == 0


def test_preprocessing_is_blamed_for_what_it_does(toy: Toy) -> None:
    found = run(toy, own="tensorflow")
    assert found.blame == "the preprocessing"
    step = found.step("preprocessing")
    assert step is not None
    assert step.flips > 0
    assert step.points is not None
    assert step.points < 0
    assert found.step("model").flips == 0  # type: ignore[union-attr]
    flip = found.flips["preprocessing"][0]
    assert set(flip["pictures"]) == {"keras", "keras_own"}
    assert flip["margin"] > 64
    assert objections(found, max_flips=0) == []
    assert "own preprocessing" in objections(found, max_drop=0.5)[0]


def test_a_head_in_another_order_is_the_models_fault(toy: Toy, tmp_path: Path) -> None:
    found = run(toy, own="none", weights=with_head(toy, tmp_path / "other.h5", [0, 2, 1, 3, 4]))
    assert found.blame == "the model"
    step = found.step("model")
    assert step is not None
    assert step.exchanged == ((1, 2), (2, 1))
    assert step.flips == toy.labels.count(1) + toy.labels.count(2) == step.lost
    assert "1 becomes 2, 2 becomes 1" in " ".join(explained(found))
    assert "answers differ" in objections(found, max_flips=3)[0]
    assert found.label_advice is None


def test_labels_in_another_order_are_no_ones_fault(toy: Toy, tmp_path: Path) -> None:
    lines = [f"{path},{(int(path.parent.name) + 1) % CLASSES}" for path in toy.images]
    (tmp_path / "test.csv").write_text("\n".join(["image,label", *lines]))
    found = run(toy, data=tmp_path / "test.csv", own="none")
    assert found.blame == "nothing"
    advice = found.label_advice
    assert advice is not None
    assert advice.plain == 0.0
    assert advice.permuted == 1.0
    assert dict(advice.mapping) == {(label + 1) % CLASSES: label for label in range(CLASSES)}
    assert explained(found)[0].startswith("The labels: ")


def test_labels_off_by_one_are_called_so() -> None:
    judge, tally = Judge(8, 1e-7), Tally()
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 7, 200)
    logits = 5.0 * np.eye(8)[answers] + rng.normal(size=(200, 8))
    samples = [Sample(number, str(number), int(answer) + 1) for number, answer in enumerate(answers)]
    batch = Batch(0, np.ones(200, np.uint64), samples, logits, seconds={"pytorch": 1.0}, results={"pytorch": logits})
    tally.merge(judge.judge(batch))
    found = evaluation_of(tally, classes=8, names=(), noise=1e-7)
    assert found.label_advice is not None
    assert found.label_advice.shift == -1
    assert "off by" in explained(found)[0]


def test_few_samples_of_many_classes_suggest_no_permutation() -> None:
    judge, tally = Judge(300, 1e-7), Tally()
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(100, 300))
    samples = [Sample(number, str(number), int(rng.integers(300))) for number in range(100)]
    batch = Batch(0, np.ones(100, np.uint64), samples, logits, seconds={"pytorch": 1.0}, results={"pytorch": logits})
    tally.merge(judge.judge(batch))
    assert evaluation_of(tally, classes=300, names=(), noise=1e-7).label_advice is None


def test_a_tie_is_no_ones_fault() -> None:
    first = np.array([[1.0, 1.0 - 1e-6, 0.0], [1.0, 0.5, 0.0]])
    second = np.array([[1.0 - 1e-6, 1.0, 0.0], [0.4, 0.5, 0.0]])
    samples = [Sample(0, "tie", 0), Sample(1, "real", 0)]
    batch = Batch(
        0,
        np.ones(2, np.uint64),
        samples,
        first,
        seconds={"pytorch": 1.0, "keras": 1.0},
        results={"pytorch": first, "keras": second},
    )
    found = evaluation_of(Judge(3, 1e-7).judge(batch), classes=3, names=(), noise=1e-7)
    step = found.step("model")
    assert step is not None
    assert (step.flips, step.ties) == (2, 1)
    assert found.blame == "the model"
    assert [flip["tie"] for flip in found.flips["model"]] == [True, False]


def test_bad_data_is_named_and_counted(toy: Toy, tmp_path: Path) -> None:
    rows = []
    for number, path in enumerate(toy.images[:20]):
        data = path.read_bytes()
        if number == 3:
            data = b""
        if number == 7:
            data = data[:60]
        if number == 11:
            data = toy.images[2].read_bytes()
        (tmp_path / f"{number}.png").write_bytes(data)
        rows.append((f"{number}.png", 17 if number == 5 else int(path.parent.name)))
    Image.open(toy.images[8]).convert("L").save(tmp_path / "8.png")
    rows.append(("missing.png", 0))
    (tmp_path / "test.csv").write_text("\n".join(["image,label", *(f"{name},{label}" for name, label in rows)]))
    found = run(toy, data=tmp_path / "test.csv", own="none")
    assert found.refused == {"cannot be read": 1, "empty": 1, "truncated": 1}
    assert [each["sample"] for each in found.refused_samples] == ["3.png", "7.png", "missing.png"]
    assert found.samples == 18
    assert found.labelled == 17
    assert found.outside == [{"sample": "5.png", "label": 17}]
    assert found.remarked == {"grayscale": ["8.png"]}
    assert found.duplicates == 1
    assert found.duplicate_samples[0][0].startswith("2.png")
    text = " ".join(explained(found))
    for word in ("empty", "truncated", "outside the head", "Duplicate files", "grayscale"):
        assert word in text


def test_only_bad_data_is_said_at_once(toy: Toy, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"nothing")
    with pytest.raises(SourceError, match="none of the first samples can be read"):
        run(toy, data=tmp_path)


class StopError(Exception):
    pass


def test_what_was_interrupted_goes_on(toy: Toy, healthy: Evaluation, tmp_path: Path) -> None:
    kept = tmp_path / "progress.json"

    def stop(description: str, done: int = 0, total: int = 0) -> None:
        if done >= 48:
            raise StopError

    class Stopping(Progress):
        __call__ = staticmethod(stop)

    options = EvaluateOptions(batch_size=16, own="none", resume=kept)
    arguments: dict[str, Any] = {"checkpoint": {"location": toy.checkpoint}, "options": options}
    with pytest.raises(StopError):
        evaluate(toy.family, "small", toy.weights, str(toy.folder), **arguments, progress=Stopping())
    document = json.loads(kept.read_text())
    assert document["done"] == [[0, 2]]
    assert document["tally"]["counts"]["samples"] == 48
    with pytest.raises(ReportError, match="a different limit"):
        run(toy, own="none", resume=kept, limit=7)
    seen: list[int] = []

    class Watching(Progress):
        def __call__(self, description: str, done: int = 0, total: int = 0) -> None:
            if description.startswith("evaluating"):
                seen.append(done)

    again = evaluate(toy.family, "small", toy.weights, str(toy.folder), **arguments, progress=Watching())
    assert seen[0] == 48
    assert same(again, healthy)
    assert not kept.exists()


def test_a_progress_file_of_something_else_is_refused(toy: Toy, tmp_path: Path) -> None:
    kept = tmp_path / "progress.json"
    for text in ("", "[]", '{"identity": {}, "done": [[0, 99999999999]], "tally": {}}', "\x00"):
        kept.write_text(text)
        with pytest.raises(ReportError):
            run(toy, own="none", resume=kept)
        assert kept.read_text() == text


def test_reports_hold_what_was_found(toy: Toy) -> None:
    found = run(toy, own="tensorflow")
    again = from_json(to_json(found))
    assert to_json(again) == to_json(found)
    page, text = to_html(again), to_markdown(again)
    assert "data:image/jpeg;base64," in page
    assert conclusion(found) in page
    assert "McNemar" in text
    assert "Keras, own preprocessing" in text


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kind": "evaluation", "schema_version": 9}', '{"kind": "evaluation"']
)
def test_other_files_are_no_evaluations(text: str) -> None:
    with pytest.raises(ReportError):
        from_json(text)


def test_html_escapes_names(healthy: Evaluation) -> None:
    record = {"sample": "<script>alert(1)</script>", "pictures": {"keras": 'x" onerror="alert(1)'}, "margin": 1.0}
    page = to_html(replace(healthy, flips={"model": [record]}))
    assert "<script>" not in page
    assert "onerror" not in page


def test_intervals_and_tests_are_the_books() -> None:
    # From tables: Wilson's interval of 8 of 10, and the exact test of 1 against 9.
    assert share(8, 10).low == pytest.approx(0.4902, abs=1e-4)
    assert share(8, 10).high == pytest.approx(0.9433, abs=1e-4)
    assert mcnemar(1, 9) == pytest.approx(0.0215, abs=1e-4)
    assert mcnemar(0, 0) is None


def test_ranks_put_equal_scores_in_the_order_of_classes() -> None:
    scores = np.array([[3.0, 3.0, 1.0], [np.nan, 0.0, 1.0]])
    assert list(ranks(scores, np.array([1, 0]))) == [1, 3]


def test_a_model_that_gives_no_classes_is_refused(toy: Toy, tmp_path: Path) -> None:
    models = tmp_path / "models.py"
    models.write_text(
        "import keras\nfrom torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Conv2d(3, 4, 1))\n"
        "def candidate():\n    x = keras.Input((None, None, 3))\n"
        "    return keras.Model(x, keras.layers.Conv2D(4, 1, name='c')(x))\n"
    )
    family = GivenFamily(f"{models}:net", f"{models}:candidate", [KeyRule("0", "c", "conv")])
    checkpoint, weights = tmp_path / "a.pth", tmp_path / "a.h5"
    torch.save({"0.weight": torch.randn(4, 3, 1, 1), "0.bias": torch.randn(4)}, checkpoint)
    port(family, "given", weights, checkpoint=checkpoint, check=False)
    with pytest.raises(FamilyError, match="evaluate needs a classifier"):
        evaluate(family, "given", weights, str(toy.folder), checkpoint={"location": checkpoint})


LANGUAGE_MODELS = """
import torch
from torch import nn
import keras
from keras import layers

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30)

    def forward(self, token_ids, padding_mask=None):
        return self.head(torch.tanh(self.mix(self.table(token_ids))))

def candidate():
    ids = keras.Input((None,), dtype="int32", name="token_ids")
    mask = keras.Input((None,), dtype="int32", name="padding_mask")
    x = layers.Dense(8, activation="tanh", name="mix")(layers.Embedding(30, 8, name="table")(ids))
    return keras.Model({"token_ids": ids, "padding_mask": mask}, layers.Dense(30, name="head")(x))
"""


def test_language_models_are_compared_by_their_next_tokens(tmp_path: Path) -> None:
    models = tmp_path / "models.py"
    models.write_text(LANGUAGE_MODELS)
    rows = [KeyRule("table", "table", "embedding"), KeyRule("mix", "mix", "dense"), KeyRule("head", "head", "dense")]
    family = GivenFamily(f"{models}:Net", f"{models}:candidate", rows)
    checkpoint, weights = tmp_path / "a.pth", tmp_path / "a.h5"
    rng = np.random.default_rng(0)
    shapes = {
        "table.weight": (30, 8),
        "mix.weight": (8, 8),
        "mix.bias": (8,),
        "head.weight": (30, 8),
        "head.bias": (30,),
    }
    state = {name: torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}
    torch.save(state, checkpoint)
    port(family, "given", weights, checkpoint=checkpoint, check=False)
    texts = [{"token_ids": rng.integers(0, 30, rng.integers(3, 12)).tolist()} for _ in range(20)]
    texts[4] = {"token_ids": [1, 99]}
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    options = EvaluateOptions(batch_size=6)
    found = evaluate(
        family, "given", weights, str(tmp_path / "texts.jsonl"), checkpoint={"location": checkpoint}, options=options
    )
    tokens = sum(len(text["token_ids"]) for text in texts) - 2
    assert (found.samples, found.tokens, found.refused) == (19, tokens, {"unknown token": 1})
    pytorch, keras = found.arms
    assert found.blame == "nothing"
    nll, count = 0.0, 0
    for number, text in enumerate(texts):
        if number == 4:
            continue
        ids = text["token_ids"]
        hidden = np.tanh(state["table.weight"].numpy()[ids] @ state["mix.weight"].numpy().T + state["mix.bias"].numpy())
        logits = hidden @ state["head.weight"].numpy().T + state["head.bias"].numpy()
        scores = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        nll -= sum(scores[place, ids[place + 1]] for place in range(len(ids) - 1))
        count += len(ids) - 1
    assert pytorch.perplexity == pytest.approx(np.exp(nll / count), rel=1e-5)
    assert keras.perplexity == pytest.approx(pytorch.perplexity, rel=1e-6)
    assert "perplexity" in to_markdown(found)


def batch_of(results: dict[str, np.ndarray], labels: list[int | None]) -> Batch:
    samples = [Sample(number, str(number), label) for number, label in enumerate(labels)]
    seconds = dict.fromkeys(results, 1.0)
    return Batch(0, np.ones(len(labels), np.uint64), samples, results["pytorch"], seconds=seconds, results=results)


def test_results_that_are_not_finite_pass_no_gate() -> None:
    first = np.eye(3) * 4
    second = np.where(np.arange(3)[:, None] == 1, np.nan, first)
    tally = Judge(3, 1e-7).judge(batch_of({"pytorch": first, "keras": second}, [0, 1, 2]))
    found = evaluation_of(
        Tally.from_document(json.loads(json.dumps(tally.to_document()))), classes=3, names=(), noise=1e-7
    )
    assert found.arms[1].not_finite == 1
    assert found.steps[0].kl == np.inf
    assert "NaN or infinite" in " ".join(explained(found))
    assert "NaN or infinite" in " ".join(objections(found))
    assert to_json(from_json(to_json(found))) == to_json(found)


def test_one_bad_row_changes_no_other() -> None:
    from porting.evaluation.judge import log_probabilities

    rows = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    bad = np.vstack([rows, [np.nan] * 3])
    np.testing.assert_array_equal(log_probabilities(bad)[:2], log_probabilities(rows))


def test_gates_need_something_to_measure() -> None:
    first = np.eye(3) * 4
    found = evaluation_of(
        Judge(3, 1e-7).judge(batch_of({"pytorch": first, "keras": first}, [None, 99, 2**70])),
        classes=3,
        names=(),
        noise=1e-7,
    )
    assert found.outside_the_head == 2
    assert "--max-drop cannot be applied" in objections(found, max_drop=0.0)[0]
    assert objections(found, max_flips=0) == []
    other = replace(found, samples=7)
    assert "the baseline used different data" in objections(found, earlier=other)[0]


def test_a_function_that_fails_on_an_image_leaves_it_out(toy: Toy, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "import numpy as np\n"
        "def some(image):\n    if image.shape[0] % 2:\n        raise ValueError('odd')\n"
        "    return np.zeros((16, 16, 3))\n"
        "def sizes(image):\n    return np.zeros((*image.shape[:2], 3))\n"
    )
    found = run(toy, own=f"{own}:some")
    assert found.refused["cannot be prepared"] + found.samples == COUNT
    with pytest.raises(SourceError, match="several shapes"):
        run(toy, own=f"{own}:sizes")


def test_what_is_left_out_late_has_no_results_either() -> None:
    """On Ray, Keras prepares its own images after PyTorch has run."""
    batch = batch_of({"pytorch": np.eye(3)}, [0, 1, 2])
    batch.same, batch.pixels = np.zeros((3, 2, 2, 3)), [Image.new("RGB", (2 + n, 2)) for n in range(3)]

    def prepare(image: Image.Image) -> np.ndarray:
        if image.width == 3:
            raise ValueError("odd")
        return np.ones((2, 2, 3))

    prepare_own(batch, prepare)
    assert [sample.number for sample in batch.samples] == [0, 2]
    np.testing.assert_array_equal(batch.results["pytorch"], np.eye(3)[[0, 2]])
    assert batch.same.shape == (2, 2, 2, 3)
    assert [cause for _, _, cause, _ in batch.refused] == ["cannot be prepared"]


def test_bad_files_first_end_nothing(toy: Toy, tmp_path: Path) -> None:
    rows = []
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(b"broken")
        rows.append(f"{number}.png,0")
    rows += [f"{path},{path.parent.name}" for path in toy.images[:10]]
    (tmp_path / "test.csv").write_text("\n".join(["image,label", *rows]))
    found = run(toy, data=tmp_path / "test.csv", own="none")
    assert found.samples == 10
    assert found.refused == {"not an image": 40}


def test_other_content_under_the_same_name_does_not_go_on(toy: Toy, tmp_path: Path) -> None:
    table, kept = tmp_path / "test.csv", tmp_path / "progress.json"
    rows = [f"{path},{path.parent.name}" for path in toy.images]
    table.write_text("\n".join(["image,label", *rows]))

    class Stopping(Progress):
        def __call__(self, description: str, done: int = 0, total: int = 0) -> None:
            if done >= 48:
                raise StopError

    options = EvaluateOptions(batch_size=16, own="none", resume=kept)
    with pytest.raises(StopError):
        evaluate(
            toy.family,
            "small",
            toy.weights,
            str(table),
            checkpoint={"location": toy.checkpoint},
            options=options,
            progress=Stopping(),
        )
    table.write_text("\n".join(["image,label", *reversed(rows)]))
    with pytest.raises(ReportError, match="a different content of the data"):
        run(toy, data=table, own="none", resume=kept)


@pytest.mark.parametrize(
    "change",
    [
        {"flips": {"model": [{"sample": "x", "answers": [1, 2], "margin": 1.0}]}},
        {"flips": {"model": [{"sample": "x", "answers": {}, "margin": "wide"}]}},
        {"per_class": [{"number": 0, "samples": 0, "right": {}}]},
        {"duplicate_samples": [["a", "b", "c"]]},
    ],
)
def test_hostile_evaluations_are_refused(healthy: Evaluation, change: dict[str, Any]) -> None:
    with pytest.raises(ReportError):
        from_json(json.dumps({**json.loads(to_json(healthy)), **change}))
