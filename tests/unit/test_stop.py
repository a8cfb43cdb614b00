"""Signals: what they mean for this process and for those that it starts."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

import pytest

from fsdp_qlora.stop import SIGNALS, Stop

GROUP = """
import os, signal, subprocess, sys, time
from fsdp_qlora.stop import Stop

with Stop(speaks=False) as stop:
    child = subprocess.Popen([sys.executable, "-c", "print('ready', flush=True); input()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    os.killpg(os.getpgrp(), signal.Signals[sys.argv[1]])
    child.communicate("go on")
    deadline = time.monotonic() + 20  # a thread reads the signals
    while stop.received is None and time.monotonic() < deadline:
        time.sleep(0.01)
    print(child.returncode, stop.received)
"""
"""A process that starts another, as torch.compile starts its workers, and sends a signal to both."""


@pytest.mark.parametrize("name", [number.name for number in SIGNALS])
def test_a_signal_to_all_processes_leaves_children_at_work(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROUP, name],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        start_new_session=True,
    )
    assert done.stdout.split() == ["0", name]


def test_signals_are_as_before_afterwards() -> None:
    def now() -> tuple[object, ...]:
        return signal.pthread_sigmask(signal.SIG_BLOCK, ()), *map(signal.getsignal, SIGNALS)

    before = now()
    with Stop(speaks=False):
        assert now() != before
    assert now() == before


def test_a_forked_child_does_not_hold_up_the_end() -> None:
    with Stop(speaks=False):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_handler_that_a_library_has_replaced_is_taken_back() -> None:
    """Triton's LLVM does this when it first compiles."""
    swallow = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: None)
    with Stop(speaks=False) as stop:
        ctypes.CDLL(None).signal(signal.SIGUSR1, swallow)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)
        assert not stop.is_asked(), "the library does not swallow it: the test says nothing"
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while stop.received is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert stop.received == "SIGUSR1"
