"""A port that is killed, interrupted or out of space leaves a complete file or the old one. Uses real processes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from porting.errors import OutputError
from porting.families.van import VanFamily
from porting.tasks.port import port
from porting.tasks.revert import revert

pytestmark = pytest.mark.slow

OLD = b"what was there before"
# Imports once, then forks a real process for each moment at which to stop it, which saves its start.
STOP_AT_RANDOM = """
import json, os, random, signal, sys, time
from pathlib import Path
from porting.families.van import VanFamily
from porting.tasks.port import port
import torch, h5py

checkpoint, folder, count, how = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
out = folder / "van_nano.h5"
family = VanFamily()

def run():
    port(family, "nano", out, checkpoint=checkpoint, check=False)

def child():
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        run()
        os._exit(0)
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(70)

run()
out.unlink()
begin = time.perf_counter()
if (first := os.fork()) == 0:
    child()
os.waitpid(first, 0)
duration = time.perf_counter() - begin
whole = out.stat().st_size
rng = random.Random(0)
for number in range(count):
    for path in folder.iterdir():
        path.unlink()
    out.write_bytes(b"what was there before")
    # An interrupt waits until the child can answer it: before its `try`, the interpreter would end by the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    pid = os.fork()
    if pid == 0:
        child()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    time.sleep(rng.uniform(0, 1.1 * duration))
    os.kill(pid, getattr(signal, how))
    _, status = os.waitpid(pid, 0)
    content = out.read_bytes() if out.exists() else b""
    print(json.dumps({
        "ended": os.waitstatus_to_exitcode(status),
        "old": content == b"what was there before",
        "size": len(content),
        "whole": whole,
        "others": sorted(path.name for path in folder.iterdir() if path != out),
    }), flush=True)
"""


def stop(checkpoint: Path, folder: Path, count: int, how: str) -> list[dict[str, object]]:
    command = [sys.executable, "-c", STOP_AT_RANDOM, str(checkpoint), str(folder), str(count), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_at_a_hundred_instants(checkpoint: Path, tmp_path: Path) -> None:
    results = stop(checkpoint, tmp_path, 100, "SIGKILL")
    assert len(results) == 100
    for result in results:
        # Provenance has a time, so a complete file is recognised by its size, which is always the same.
        assert result["old"] or result["size"] == result["whole"], result
    assert any(result["old"] for result in results)
    assert any(not result["old"] for result in results)
    assert all(result["ended"] in {0, -9} for result in results)


# Writes a result and its report repeatedly until killed. The parent process checks what is left.
KILL_IN_A_LOOP = """
import json, os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
from porting.errors import ReportError
from porting.files.atomic import sha256_of
from porting.files.result import pending_result
from porting.reports.document import file_beside, read_report, to_json
from tests.reports.test_reports import PASSED

folder, count = Path(sys.argv[1]), int(sys.argv[2])
out, report = folder / "x.h5", folder / "x.h5.parity.json"

def write(number):
    with pending_result(out, ".h5", inputs={}) as pending:
        pending.path.write_bytes(str(number).encode() * 500_000)
        own = replace(PASSED, context={"file": pending.identity()})
        pending.commit(to_json(own) if number % 5 else None)

rng = random.Random(0)
for instant in range(count):
    write(10 + instant % 3)
    if (pid := os.fork()) == 0:
        number = 100
        while True:
            write(number)
            number += 1
    time.sleep(rng.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    content = out.read_bytes()
    vouches = False
    if report.exists():
        try:
            vouches = file_beside(read_report(report), report) == ""
        except ReportError:
            pass
    whole = content == content[: len(content) // 500_000] * 500_000
    said = json.loads(report.read_text())["context"]["file"]["sha256"] if report.exists() else ""
    print(json.dumps({"whole": whole, "vouches": vouches, "same": said == sha256_of(out), "report": report.exists()}))
write(7)
print(json.dumps({"left": sorted(path.name for path in folder.iterdir())}))
"""


def test_results_and_reports_agree_at_two_hundred_instants(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILL_IN_A_LOOP, str(tmp_path), "200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    *instants, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(instants) == 200
    assert all(each["whole"] for each in instants)
    assert all(each["vouches"] == each["same"] for each in instants), "a report vouches for its own file alone"
    assert sum(each["vouches"] for each in instants) > 20
    assert last["left"] == ["x.h5", "x.h5.parity.json"], "the next run removes what killed ones have left"


def test_interrupted_at_fifty_instants(checkpoint: Path, tmp_path: Path) -> None:
    results = stop(checkpoint, tmp_path, 50, "SIGINT")
    for result in results:
        assert result["ended"] in {0, 130}, result
        assert result["old"] or result["size"] == result["whole"], result
        assert result["others"] == [], "an interrupted run cleans up"
    assert any(result["ended"] == 130 for result in results)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A separate filesystem, whose size `remount` sets."""
    folder = Path(tempfile.mkdtemp())
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True
    )
    if not mounted or mounted.returncode:
        folder.rmdir()
        pytest.skip("a small filesystem can be mounted by root only")
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


def resize(disk: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", disk], check=True)


def test_a_disk_that_fills_up_at_any_write(family: VanFamily, checkpoint: Path, small_disk: Path) -> None:
    out = small_disk / "x.h5"
    out.write_bytes(OLD)
    failures = 0
    for kilobytes in range(8, 2600, 60):
        resize(small_disk, kilobytes)
        try:
            port(family, "nano", out, checkpoint=checkpoint, check=False)
            break
        except OutputError as caught:
            error = caught
        failures += 1
        assert "cannot be written: No space left" in error.message
        assert out.read_bytes() == OLD
        assert [path.name for path in small_disk.iterdir()] == ["x.h5"]
    assert failures > 10
    assert hashlib.sha256(out.read_bytes()).hexdigest() != hashlib.sha256(OLD).hexdigest()
    ported = out.rename(small_disk / "ported.h5")
    used = sum(path.stat().st_size for path in small_disk.iterdir()) // 1024
    resize(small_disk, used + 200)
    back = small_disk / "x.pth"
    back.write_bytes(OLD)
    with pytest.raises(OutputError, match="cannot be written"):
        revert(family, "nano", ported, back, check=False)
    assert back.read_bytes() == OLD
    assert sorted(path.name for path in small_disk.iterdir()) == ["ported.h5", "x.pth"]


def test_a_folder_that_is_gone(family: VanFamily, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        port(family, "nano", tmp_path / "gone" / "x.h5", checkpoint=checkpoint, check=False)
    assert list(tmp_path.iterdir()) == []
