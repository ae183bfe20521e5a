"""`use_backend` while other threads call: it waits for their calls, or refuses."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

import elf_fast
from elf_fast import backend, functional, ops, reference

#: Crashed the interpreter when kernels were replaced under running calls.
SWITCHING = """
import threading, time, torch, elf_fast
from elf_fast import functional, ops
torch.set_num_threads(1)
z, x, y = torch.randn(32, 50), torch.randn(32, 64), torch.randint(0, 50, (32,))
s, scalar, running, calls, errors = torch.arange(0, 32, 2), torch.tensor(1.0), True, [], []
expected = functional.exit_loss(z, y).loss

def call():
    try:
        while running:
            leaf = z.clone().requires_grad_()
            loss = functional.exit_loss(leaf, y, threshold=0.5).loss
            loss.sum().backward()
            torch.testing.assert_close(loss, expected)
            with torch.inference_mode():
                ops.exit_gate(z, scalar, scalar, 0, None, False)
            torch.ops.elf_fast.compact_into(x[:16].clone(), x, s, None)
            calls.append(1)
    except BaseException as error:
        errors.append(error)

threads = [threading.Thread(target=call) for _ in range(2)]
for thread in threads:
    thread.start()
end, switches = time.monotonic() + 1.5, 0
while time.monotonic() < end or switches < 10:
    with elf_fast.use_backend("torch"):
        assert functional.exit_gate(z, 0.5).prediction.equal(z.argmax(1))
    switches += 1
running = False
for thread in threads:
    thread.join()
assert calls and not errors, errors
print("switched")
"""


def test_kernels_are_switched_between_the_calls_of_other_threads():
    done = subprocess.run([sys.executable, "-c", SWITCHING], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "switched\n", done.stderr[-2000:]


@pytest.fixture
def stuck(monkeypatch):
    """A thread in a call that ends when the event is set; yields (event, thread)."""
    begun, go_on, real = threading.Event(), threading.Event(), reference.exit_gate

    def waiting(*args, **kwargs):
        begun.set()
        go_on.wait(20)
        return real(*args, **kwargs)

    monkeypatch.setattr(reference, "exit_gate", waiting)
    thread = threading.Thread(target=functional.exit_gate, args=(torch.randn(3, 4), 0.5))
    with elf_fast.use_backend("torch"):
        thread.start()
        assert begun.wait(20)
        yield go_on, thread
        go_on.set()
        thread.join()


def test_a_switch_is_refused_while_another_call_does_not_end(stuck, monkeypatch):
    go_on, thread = stuck
    monkeypatch.setattr(backend, "_PATIENCE", 0.05)
    before, interval = elf_fast.report(), sys.getswitchinterval()
    with pytest.raises(RuntimeError, match="expected no other thread to be calling elf_fast"):
        elf_fast.use_backend("torch").__enter__()
    assert elf_fast.report() == before and sys.getswitchinterval() == interval
    go_on.set()
    thread.join()
    with elf_fast.use_backend("torch"):
        pass


def test_a_switch_waits_for_a_call_that_ends(stuck):
    go_on, thread = stuck
    threading.Timer(0.2, go_on.set).start()
    start = time.monotonic()
    with elf_fast.use_backend("torch"):
        assert time.monotonic() - start > 0.15 and go_on.is_set()
    thread.join()


def test_threads_outside_of_the_operators_do_not_hold_a_switch_up():
    idle = threading.Event()
    thread = threading.Thread(target=idle.wait, args=(20,))
    thread.start()
    start = time.monotonic()
    with elf_fast.use_backend("torch"):
        assert ops.compact(torch.ones(3, 2), torch.tensor([0, 2])).shape == (2, 2)
    assert time.monotonic() - start < 2
    idle.set()
    thread.join()
