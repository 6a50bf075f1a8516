"""Tests the table of sources, and fetches from a local stand-in for the hub.

huggingface_hub reads its settings when it is imported, so each fetch runs in its own process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from porting.errors import SourceError
from porting.families.van import VanFamily
from porting.files.checkpoint import verify_container
from porting.sources.fetch import fetch
from porting.sources.table import embedded_table, read_table
from tests.hub import Hub, serve_hub

family = VanFamily()

B0 = "/Visual-Attention-Network/VAN-Tiny-original/resolve/main/van_tiny_754.pth.tar"
FETCH = """
from porting.errors import SourceError
from porting.families.van import VanFamily
from porting.files.checkpoint import verify_container
from porting.sources.fetch import fetch
try:
    print(fetch(VanFamily().source_of("b0"), verify=verify_container))
except SourceError as error:
    print("SourceError:", error.message)
    print("hint:", error.hint)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        yield hub


def run_fetch(endpoint: str, cache: Path, **environment: str) -> str:
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", FETCH], env={**os.environ, **settings}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_table_is_complete() -> None:
    assert family.variants == ("nano", "b0", "b1", "b2", "b3", "b4", "b5", "b6")
    for source in family.table:
        assert source.kind in {"embedded", "huggingface", "url", "none"}
        assert bool(source.file) == (source.kind != "none")
        assert bool(source.repo) == (source.kind == "huggingface")
        assert bool(source.note) == (source.kind == "none")
        assert source.kind == "none" or source.license == "Apache-2.0"


def test_a_family_brings_a_table_and_files_of_its_own(tmp_path: Path) -> None:
    table = tmp_path / "sources.toml"
    table.write_text('[[source]]\nfamily = "toy"\nvariant = "s"\nkind = "embedded"\nfile = "s.pth"\nclasses = 3\n')
    (tmp_path / "s.pth").write_bytes(b"weights")
    (source,) = read_table(table, "toy")
    assert source.classes == 3
    assert fetch(source, verify=verify_container) == tmp_path / "s.pth"
    assert read_table(embedded_table(), "toy") == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[[source", ""), ("x = 1", "source"), ('[[source]]\nfamily = "toy"\nsize = 3', "unknown keys: size")],
    ids=["no TOML", "no rows", "an unknown key"],
)
def test_a_table_that_is_none_is_refused_by_name(tmp_path: Path, text: str, reason: str) -> None:
    table = tmp_path / "sources.toml"
    table.write_text(text)
    with pytest.raises(SourceError, match=rf"sources.toml: not a table of sources: .*{reason}"):
        read_table(table, "toy")


def test_embedded_weights_are_a_file() -> None:
    source = family.source_of("nano")
    assert fetch(source, verify=verify_container).is_file()
    assert source.label == "van_nano.pth.tar"


@pytest.mark.parametrize("variant", ["b5", "b6"])
def test_variants_without_an_official_file_say_what_is_known(variant: str) -> None:
    with pytest.raises(SourceError) as caught:
        fetch(family.source_of(variant), verify=verify_container)
    assert f"no official checkpoint of van {variant} is known" in caught.value.message
    assert "VAN-Segmentation publishes" in caught.value.message
    assert "--checkpoint FILE" in caught.value.hint


def test_openmmlab_names_the_beginning_of_the_hash() -> None:
    source = family.source_of("b4")
    assert source.kind == "url"
    assert source.file.endswith(f"-{source.sha256}.pth")


def test_a_variant_that_does_not_exist() -> None:
    with pytest.raises(SourceError, match="van has no variant 'b9'") as caught:
        family.source_of("b9")
    assert caught.value.hint == "Choose from nano, b0, b1, b2, b3, b4, b5, b6."


def test_fetched_once_and_found_again_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.files[B0] = b"weights" * 1000
    path = Path(run_fetch(hub.url, tmp_path))
    assert path.read_bytes() == hub.files[B0]
    assert path.name == "van_tiny_754.pth.tar"
    assert f"GET {B0}" in hub.requests

    hub.requests.clear()
    assert run_fetch(hub.url, tmp_path, HF_HUB_OFFLINE="1") == str(path)
    assert hub.requests == []


def test_no_network_says_what_was_wanted_and_how_to_give_it(tmp_path: Path) -> None:
    output = run_fetch("http://127.0.0.1:9", tmp_path)
    assert output.startswith(
        "SourceError: cannot get van_tiny_754.pth.tar from Visual-Attention-Network/VAN-Tiny-original on the "
        "Hugging Face hub: it is not in the cache, and http://127.0.0.1:9 cannot be reached (Connection refused)"
    )
    assert "--checkpoint van_tiny_754.pth.tar" in output


def test_a_file_that_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    hub.files[B0.replace("van_tiny_754", "other")] = b"x"
    assert "the hub's repository has no such file" in run_fetch(hub.url, tmp_path)


def test_a_repository_that_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    assert "the hub has no such repository, or asks for a login" in run_fetch(hub.url, tmp_path)


@pytest.mark.parametrize("endpoint", ["not an address", "http://[bad", "http://me:secret@127.0.0.1:9", "://", ""])
def test_an_endpoint_of_the_hub_that_is_none(endpoint: str, tmp_path: Path) -> None:
    code = (
        "from porting.families.van import VanFamily; from porting.sources.hub import fetch_from_hub\n"
        "from porting.errors import SourceError\n"
        "try: fetch_from_hub(VanFamily().source_of('b1'))\n"
        "except SourceError as error: print(error.message)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    if not endpoint:
        environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot get van_small_811.pth.tar")
    assert "secret" not in done.stdout + done.stderr
