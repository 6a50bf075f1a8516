"""All formats of a data set give the same images and labels."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from porting.errors import OptionError, SourceError
from porting.evaluation.items import Block, Item, blocks_of
from porting.evaluation.labels import Labels, read_labels, usual_labels
from porting.evaluation.readers import open_data
from porting.evaluation.samples import load_images

NAMES = ("cat", "dog", "fish")
LABELS = Labels(3, tuple((name,) for name in NAMES))
WANTED = [0, 0, 1, 2, 2]


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(number) for number in range(len(WANTED))]


def class_folders(root: Path, names: tuple[str, ...] = NAMES) -> str:
    for number, label in enumerate(WANTED):
        folder = root / names[label]
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.png").write_bytes(PICTURES[number])
    return str(root)


def numbered_folders(root: Path) -> str:
    return class_folders(root, ("0", "1", "2"))


def plain_files(root: Path) -> list[str]:
    for number, data in enumerate(PICTURES):
        (root / f"{number}.png").write_bytes(data)
    return [f"{number}.png" for number in range(len(PICTURES))]


def csv_table(root: Path) -> str:
    with (root / "test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label"])
        writer.writerows((name, NAMES[label]) for name, label in zip(plain_files(root), WANTED, strict=True))
    return str(root / "test.csv")


def json_lines(root: Path) -> str:
    lines = [{"path": name, "class": label} for name, label in zip(plain_files(root), WANTED, strict=True)]
    (root / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(root / "test.jsonl")


def shards(root: Path) -> str:
    for shard in range(2):
        with tarfile.open(root / f"part-{shard:02}.tar", "w") as tar:
            for number in range(shard * 3, min(shard * 3 + 3, len(WANTED))):
                for ending, data in (("cls", str(WANTED[number]).encode()), ("png", PICTURES[number])):
                    info = tarfile.TarInfo(f"{number:05}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(root / "part-{00..01}.tar")


def shards_by_pattern(root: Path) -> str:
    shards(root)
    return str(root / "part-*.tar")


def parquet(root: Path) -> str:
    import pyarrow
    from pyarrow import parquet as files

    images = [{"bytes": data, "path": None} for data in PICTURES]
    files.write_table(pyarrow.table({"image": images, "label": WANTED}), root / "test.parquet")
    return str(root / "test.parquet")


def hugging_face(root: Path) -> str:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES[::-1]))})
    rows = {"image": [{"bytes": data} for data in PICTURES], "label": [2 - label for label in WANTED]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(root / "saved")
    return str(root / "saved")


FORMS = [class_folders, numbered_folders, csv_table, json_lines, shards, shards_by_pattern, parquet, hugging_face]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("write", FORMS, ids=lambda write: write.__name__)
def test_every_form_gives_the_same_samples(write: Callable[[Path], str], tmp_path: Path) -> None:
    found = open_data(write(tmp_path), LABELS)
    items = list(found.items())
    assert [item.label for item in items] == WANTED
    assert [item.read() for item in items] == PICTURES
    assert found.total in {None, len(WANTED)}
    assert list(found.items()) == items


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_data_of_tensorflow_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from porting.models.frameworks import start_tensorflow

    start_tensorflow()
    import tensorflow_datasets as tfds

    class Pictures(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.ClassLabel(names=NAMES)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: object) -> dict[str, object]:
            return {"test": self._generate_examples()}

        def _generate_examples(self) -> object:
            for number, (data, label) in enumerate(zip(PICTURES, WANTED, strict=True)):
                yield number, {"image": io.BytesIO(data), "label": label}

    builder = Pictures(data_dir=tmp_path)
    builder.download_and_prepare()
    monkeypatch.setattr(tfds, "builder", lambda name: builder)
    found = open_data("tfds:pictures", LABELS)
    items = list(found.items())
    assert found.total == len(WANTED)
    assert sorted((item.label, item.read()) for item in items) == sorted(zip(WANTED, PICTURES, strict=True))


def test_object_storage_is_read_by_address() -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for number, label in enumerate(WANTED):
        with store.open(f"/bucket/{NAMES[label]}/{number}.png", "wb") as file:
            file.write(PICTURES[number])
    items = list(open_data("memory://bucket", LABELS).items())
    assert [item.label for item in items] == WANTED
    assert [item.read() for item in items] == PICTURES


def test_images_alone_have_no_labels(tmp_path: Path) -> None:
    plain_files(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    items = list(open_data(str(tmp_path), LABELS).items())
    assert [item.label for item in items] == [None] * len(WANTED)


def test_folders_in_sorted_order_are_said(tmp_path: Path) -> None:
    found = open_data(class_folders(tmp_path), Labels(3))
    assert [item.label for item in found.items()] == WANTED
    assert "sorted order" in found.notes[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "picture,label\na.png,1\n", "no column of images"),
        ("a.jsonl", "[1, 2]\n", "line 1 is not an object"),
        ("a.jsonl", '{"image": ', "cannot be read"),
        ("a.csv", "image,label\na.png,bird\n", "'bird' is not one of the model's 3 classes"),
        ("a.jsonl", '{"token_ids": [1, -2]}', "non-negative integers"),
        ("a.jsonl", '{"text": "hello"}', "contains texts"),
        ("a.csv", "", "contains no samples"),
        ("a.parquet", "no such thing", "not a Parquet file"),
        ("a.tar", "no such thing", "not a complete tar file"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SourceError, match=message):
        list(blocks_of(open_data(str(path), LABELS).items(), 2))


def test_unknown_folders_are_refused(tmp_path: Path) -> None:
    for name in ("cat", "cow"):
        (tmp_path / name).mkdir()
    with pytest.raises(SourceError, match="'cow' is not one of the model's 3 classes") as caught:
        open_data(str(tmp_path), LABELS)
    assert "--labels" in caught.value.hint


def test_no_such_data(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        open_data(str(tmp_path / "nothing"), LABELS)
    with pytest.raises(SourceError, match="nowhere://"):
        open_data("nowhere://bucket/a.csv", LABELS)


def test_a_size_that_a_tar_states_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("0.png")
    info.size = 1 << 40
    path.write_bytes(info.tobuf() + PICTURES[0])
    with pytest.raises((SourceError, ValueError, OSError)):
        [item.read() for item in open_data(str(path), LABELS).items()]


def test_labels_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    labels = read_labels(path, 2)
    assert labels.of_folders(["n01443537", "n01440764"]) == {"n01443537": 1, "n01440764": 0}
    assert labels.number("Goldfish") == 1
    with pytest.raises(OptionError, match="lists 2 classes, but the model has 3"):
        read_labels(path, 3)
    with pytest.raises(SourceError, match=r"nix.txt: no such file"):
        read_labels(tmp_path / "nix.txt", 3)


def test_imagenet_synsets_are_known() -> None:
    labels = usual_labels(1000, ())
    assert labels.number("n01440764") == 0
    assert labels.name(0) == "tench"


def test_blocks_are_the_same_whatever_takes_them() -> None:
    items = [Item(str(number)) for number in range(10)]
    blocks = list(blocks_of(items, 4, limit=9))
    assert [(block.number, block.start, len(block.items)) for block in blocks] == [(0, 0, 4), (1, 4, 4), (2, 8, 1)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """An HTTP server for the files in a folder, in place of object storage."""
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Storage(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            """Serve ranges of bytes, as object storage does."""
            path = tmp_path / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data, stated = path.read_bytes(), self.headers.get("Range", "")
            first, last = 0, len(data) - 1
            if stated:
                start, _, stop = stated.removeprefix("bytes=").partition("-")
                first, last = int(start), min(int(stop or last), last)
            self.send_response(206 if stated else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(last + 1 - first))
            if stated:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.end_headers()
            self.wfile.write(data[first : last + 1])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), partial(Storage, directory=str(tmp_path)))
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("write", [csv_table, json_lines, shards], ids=lambda write: write.__name__)
def test_storage_behind_http(write: Callable[[Path], str], tmp_path: Path, server: str) -> None:
    spec = f"{server}/{Path(write(tmp_path)).name}"
    items = list(open_data(spec, LABELS).items())
    assert [item.label for item in items] == WANTED
    assert [item.read() for item in items] == PICTURES


def test_storage_that_fails_leaves_a_sample_out(tmp_path: Path, server: str) -> None:
    path = Path(csv_table(tmp_path))
    (tmp_path / "2.png").unlink()
    items = tuple(open_data(f"{server}/{path.name}", LABELS).items())
    batch = load_images(Block(0, 0, items), lambda image: np.asarray(image, np.float32))
    assert [(number, cause) for number, _, cause, _ in batch.refused] == [(2, "cannot be read")]
    assert len(batch.samples) == len(WANTED) - 1


def test_names_with_characters_of_patterns(tmp_path: Path) -> None:
    for number, name in enumerate(("a[1].png", "b*.png", "c#d?.png", "e::f.png")):
        (tmp_path / name).write_bytes(PICTURES[number])
    items = list(open_data(str(tmp_path), LABELS).items())
    assert [item.read() for item in items] == PICTURES[:4]


def test_a_table_that_a_spreadsheet_wrote(tmp_path: Path) -> None:
    plain_files(tmp_path)
    (tmp_path / "test.csv").write_bytes(b"\xef\xbb\xbfimage,label\r\n0.png,cat\r\n1.png,\r\n")
    items = list(open_data(str(tmp_path / "test.csv"), LABELS).items())
    assert [item.label for item in items] == [0, None]
    assert items[0].read() == PICTURES[0]


def test_a_shard_with_masks_beside_the_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("x/0.JPEG", PICTURES[0]), ("x/0.mask.png", PICTURES[1]), ("x/0.cls", b"2")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    items = list(open_data(str(tmp_path / "a.tar"), LABELS).items())
    assert [(item.label, item.read()) for item in items] == [(2, PICTURES[0])]


def test_a_pipe_among_the_images_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    os.mkfifo(tmp_path / "b.png")
    items = tuple(open_data(str(tmp_path), LABELS).items())
    batch = load_images(Block(0, 0, items), lambda image: np.asarray(image, np.float32))
    assert len(batch.samples) == 1


def test_links_are_what_they_point_to(tmp_path: Path) -> None:
    data, root = tmp_path / "data", tmp_path / "links"
    data.mkdir()
    root.mkdir()
    class_folders(data)
    (root / "cat").symlink_to(data / "cat")
    (root / "dog").mkdir()
    (root / "dog" / "2.png").symlink_to(data / "dog" / "2.png")
    items = list(open_data(str(root), LABELS).items())
    assert [(item.label, item.read()) for item in items] == [(0, PICTURES[0]), (0, PICTURES[1]), (1, PICTURES[2])]


def test_a_folder_of_another_name_does_not_renumber_the_rest(tmp_path: Path) -> None:
    for name in ("cat", "dog", "kitty"):
        (tmp_path / name).mkdir()
    with pytest.raises(SourceError, match="'kitty' is not one of the model's 3 classes"):
        open_data(str(tmp_path), LABELS)


@pytest.mark.parametrize(
    ("stated", "number"), [("-1", -1), ("2.0", 2), (2.0, 2), (" Dog ", 1), (None, None), ("", None)]
)
def test_numbers_of_classes_as_tables_write_them(stated: Any, number: int | None) -> None:
    assert LABELS.number(stated) == number


def test_a_name_of_two_classes_tells_neither() -> None:
    labels = Labels(3, (("n1", "crane, bird", "crane"), ("n2", "crane"), ("n3", "tench", "tench")))
    assert labels.number("crane, bird") == 0
    assert labels.number("crane") == 1
    assert labels.number("tench") == 2
    imagenet = usual_labels(1000, ())
    assert imagenet.number("n02012849") == 134


@pytest.mark.parametrize(
    ("files", "label"),
    [
        ((("0.cls", b"2"), ("0.jpg", PICTURES[0]), ("0.json", b'{"width": 3}'), ("0.txt", b"a photo of a cat")), 2),
        ((("0.jpg", PICTURES[0]), ("0.txt", b"a photo of a cat")), None),
        ((("0.json", b'{"label": 1}'), ("0.png", PICTURES[0])), 1),
        ((("0.png", PICTURES[0]), ("0.txt", b"dog")), 1),
    ],
)
def test_what_a_shard_says_of_the_label(tmp_path: Path, files: Any, label: int | None) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (item,) = open_data(str(tmp_path / "a.tar"), LABELS).items()
    assert item.label == label
