"""Broken and hostile files lead to an error message. scripts/fuzz_inputs.py defines what a failure is."""

from __future__ import annotations

import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_inputs.py"


@pytest.mark.slow
def test_no_file_brings_a_reader_down() -> None:
    """Try all files that are hostile by design, and some random damage, seeded by the date."""
    command = [sys.executable, str(SCRIPT), "--cases", "800", "--seed", f"{date.today():%Y%m%d}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "800 cases, 0 failures" in done.stdout
