"""Windows: what another process sees, and what is left when the owner is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from bigdl_lite.comm.window import HEADER, Window, available, look, pour

ROOT = Path(__file__).resolve().parents[2]


def other(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_another_process_sees_the_values_and_the_stamp_without_a_copy() -> None:
    window = Window(8 * 10)
    window.values(torch.float64, 10).copy_(torch.arange(10.0))
    window.mark(7)
    told = other(f"""
        import torch
        from bigdl_lite.comm.window import look
        seen = look({window.address!r})
        x = seen.values(torch.float64, 8, 16)
        print(seen.stamp, x.sum().item())
        x[0] = 100.0
    """).communicate(timeout=60)[0]
    assert told.split() == ["7", str(float(sum(range(2, 10))))]
    assert window.values(torch.float64, 10)[2] == 100.0


def test_an_owner_that_is_killed_leaves_nothing() -> None:
    before = set(os.listdir("/dev/shm"))
    owner = other("""
        import torch, sys
        from bigdl_lite.comm.window import Window
        window = Window(1 << 20)
        print(window.address, flush=True)
        sys.stdin.read()
    """)
    address = owner.stdout.readline().strip()
    seen = look(address)
    assert seen is not None and set(os.listdir("/dev/shm")) == before
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait(30)
    assert look(address) is None
    assert seen.values(torch.uint8, 1 << 20).sum() == 0, "those who look already keep what they see"


@pytest.mark.parametrize("change", ["secret", "pid", "file", "length"])
def test_an_address_that_leads_elsewhere_shows_nothing(change: str) -> None:
    window, stranger = Window(64), Window(64)
    pid, file, secret, nbytes = window.address.split("/")
    wrong = {
        "secret": f"{pid}/{file}/{stranger.address.split('/')[2]}/{nbytes}", "pid": f"1/{file}/{secret}/{nbytes}",
        "file": f"{pid}/99999/{secret}/{nbytes}", "length": f"{pid}/{file}/{secret}/{10 * HEADER}",
    }[change]  # fmt: skip
    assert look(wrong) is None
    assert look(window.address) is not None  # the control


def test_values_are_poured_through_an_address_and_nowhere_else() -> None:
    window, stranger = Window(4 * 10), Window(4 * 10)
    assert pour(window.address, torch.arange(10.0)) and window.values(torch.float32, 10).tolist() == list(range(10))
    pid, file, _, nbytes = window.address.split("/")
    assert not pour("/".join([pid, file, stranger.address.split("/")[2], nbytes]), torch.zeros(10))
    assert not pour("/".join([pid, "99999", window.address.split("/")[2], nbytes]), torch.zeros(10))
    assert window.values(torch.float32, 10).tolist() == list(range(10))


def test_a_closed_window_is_shut_but_its_values_stay() -> None:
    window = Window(64)
    values = window.values(torch.float32, 4)
    values.fill_(3.0)
    window.close()
    window.close()
    assert look(window.address) is None and values.tolist() == [3.0] * 4


def test_what_is_free_is_a_number_of_this_machine() -> None:
    assert 0 < available() < 1 << 50
