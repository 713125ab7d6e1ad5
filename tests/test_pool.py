"""Large CPU results live in memory that is kept for the next ones; nothing else about them is different."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch

cpu = pytest.importorskip("adq.backends.cpu", reason="the C++ kernels are not built")

pytestmark = pytest.mark.skipif(not cpu._C.has_pool(), reason="no pool on this system")

ELEMENTS = 3 * 2**20 // 4 + 5


@pytest.fixture(autouse=True)
def empty_pool():
    gc.collect()
    cpu._C.set_pool_limit(0)
    cpu._C.set_pool_limit(2**30)
    yield
    cpu._C.set_pool_limit(2**30)


def quantize(w: torch.Tensor) -> torch.Tensor:
    codebook = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    return torch.ops.adq.codebook_lookup(w, codebook, 0.5 * (codebook[1:] + codebook[:-1]), False)[0]


def test_a_freed_result_serves_the_next_one():
    w = torch.randn(ELEMENTS)
    first = quantize(w)
    address, expected = first.data_ptr(), first.clone()
    del first
    assert cpu._C.pool_idle() == 4 * 2**20  # whole huge pages
    second = quantize(w)
    assert second.data_ptr() == address
    assert cpu._C.pool_idle() == 0
    assert torch.equal(second, expected)


def test_results_that_live_do_not_share_memory():
    w = torch.randn(ELEMENTS)
    results = [quantize(w * i) for i in range(4)]
    views = [result[7:] for result in results]
    del results
    for i, view in enumerate(views):
        assert torch.equal(view, quantize(w * i)[7:])


def test_what_waits_is_bounded():
    cpu._C.set_pool_limit(6 * 2**20)
    results = [quantize(torch.randn(ELEMENTS)) for _ in range(3)]
    del results
    assert cpu._C.pool_idle() == 4 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layout_autograd_and_changes_in_place(dtype):
    x = torch.randn(8, 64, 40, 70, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    y = adq_quantize(x)
    assert not y._is_view() and y.stride() == x.stride() and y.dtype == dtype
    y.mul_(2).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def adq_quantize(x: torch.Tensor) -> torch.Tensor:
    from adq.functional import threshold_quantize

    return threshold_quantize(x, torch.tensor([-1.0]), torch.full((3,), 0.7), torch.ones(1), torch.ones(1))


def test_threads_take_and_free_results():
    w = torch.randn(ELEMENTS)
    expected = quantize(w)
    wrong = []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(quantize(w), expected):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_environment_turns_it_off_and_results_outlive_the_module():
    code = (
        "import torch, adq; from adq.backends import cpu\n"
        "c = torch.tensor([0.0, 1.0]); y = torch.ops.adq.codebook_lookup(torch.ones(2**21), c, c[1:] - 0.5, False)[0]\n"
        "z = y[1:]; del y; print(bool((z == 1).all()), z.untyped_storage().resizable())"
    )
    for limit, resizable in (("0", "True"), ("64", "False")):
        environment = {**os.environ, "ADQ_CPU_POOL_MIB": limit, "ADQ_CPU_BACKEND": "cpp", "TRITON_INTERPRET": "0"}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")
        assert run.returncode == 0, run.stderr
        assert run.stdout.split() == ["True", resizable]
