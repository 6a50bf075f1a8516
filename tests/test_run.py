"""When and by which command a report was made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from porting.run import describe_run, set_command


@pytest.fixture(autouse=True)
def no_command_afterwards() -> Iterator[None]:
    yield
    set_command([])


def test_the_command_is_in_the_facts_as_it_was_typed() -> None:
    set_command(["check", "--weights", "my file.h5"])
    facts = describe_run()
    assert facts["command"] == "van-port check --weights 'my file.h5'"
    assert facts["created_utc"].endswith("+00:00")


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("https://me:secret@host/x.pth", "https://host/x.pth"),
        ("https://host/x.pth?token=secret&a=b#part", "https://host/x.pth?..."),
        ("hf://owner/repo/file.bin@main", "hf://owner/repo/file.bin@main"),
    ],
)
def test_passwords_and_queries_are_left_out(word: str, kept: str) -> None:
    set_command(["--checkpoint", word])
    assert kept in describe_run()["command"]
    assert "secret" not in describe_run()["command"]
