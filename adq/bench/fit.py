"""Fitting a codebook to weights, beside the k-means of other packages on the same values."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from adq import WeightConfig
from adq.bench import peers
from adq.bench.case import ADQ, Build, Call, Case, Setting, Unavailable, extra, faster_than
from adq.codebook import fit, sqnr
from adq.reference import decision_thresholds

PART = "fit"
BITS = 4
SKLEARN = "scikit-learn KMeans"
TORCHAO = "torchao codebook fit"
COREML = "coremltools k-means"
COREML_EXACT = "coremltools k-means1d (exact)"
OVER_SKLEARN = 20.0
OVER_OTHERS = 1.0
MAX_MEMORY = 1.5
PEAK = "peak memory"


@dataclass
class Weights:
    """Weights, and the codebook that each contender fitted to them last."""

    w: Tensor
    fitted: dict[str, Tensor] = field(default_factory=dict)


def cases(setting: Setting) -> Iterator[Case]:
    """Every case of this part; the sizes after the first leave out the slower peers."""
    for i, weights in enumerate(setting.fit_weights):
        yield _case(setting, weights, every=i == 0)


def random_weights(count: int, device: torch.device) -> Tensor:
    """Normal weights of a trained layer's magnitude, float32."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(count, device=device, generator=generator).mul_(0.02)


def _fit(w: Tensor) -> Tensor:
    return fit(w, WeightConfig(bits=BITS, scale="tensor")).codebook


def _contender(name: str, make: Callable[[], peers.Fit]) -> Build:
    """Fits with what ``make`` returns, and remembers the codebook."""

    def build(data: Weights) -> Call:
        function = make()

        def call() -> None:
            data.fitted[name] = function(data.w)

        return call

    return build


def _left_out(_: Weights) -> Call:
    raise Unavailable("left out at this size, for its time on fewer weights")


def _case(setting: Setting, weights: int, every: bool) -> Case:
    levels = 2**BITS
    slow: dict[str, Callable[[], peers.Fit]] = {
        TORCHAO: lambda: peers.torchao_fit(levels),
        COREML: lambda: peers.coremltools_fit(levels, exact=False),
        COREML_EXACT: lambda: peers.coremltools_fit(levels, exact=True),
    }
    contenders = {
        ADQ: _contender(ADQ, lambda: _fit),
        SKLEARN: _contender(SKLEARN, lambda: peers.sklearn_fit(levels)),
    }
    contenders |= {name: _contender(name, make) if every else _left_out for name, make in slow.items()}
    if setting.cuda and not every:
        contenders[SKLEARN] = _left_out  # on the host's CPU it would take the time of all the rest
    targets = [faster_than(SKLEARN, OVER_SKLEARN)] + [faster_than(name, OVER_OTHERS) for name in slow]
    targets += [extra(name, "SQNR, dB", f"SQNR of {name}", None) for name in contenders]
    extras = {f"SQNR of {name}": _sqnr_of(name) for name in contenders}
    if weights == setting.fit_weights[-1]:
        targets.append(extra(ADQ, "peak memory, times the weights", PEAK, MAX_MEMORY))
        extras[PEAK] = lambda _: _peak_in_new_process(weights, str(setting.device))
    return Case(
        PART,
        f"fit {levels} levels to {weights:,} weights",
        lambda: Weights(random_weights(weights, setting.device)),
        contenders,
        tuple(targets),
        items=weights,
        item="weights",
        cold=True,
        host=True,
        extras=extras,
    )


def _sqnr_of(name: str) -> Callable[[Weights], float]:
    def measure(data: Weights) -> float:
        if name not in data.fitted:
            raise Unavailable("not fitted")
        codebook = data.fitted[name].to(data.w.device)
        w_q, _ = torch.ops.adq.codebook_lookup(data.w, codebook, decision_thresholds(codebook), False)
        return sqnr(data.w, w_q)

    return measure


def peak_memory(weights: int, device: str) -> float:
    """Most memory that a fit has in use, the weights included, over the bytes of the weights."""
    w = random_weights(weights, torch.device(device))
    _fit(w[:1000])  # what is loaded once is not counted
    if w.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _fit(w)
        return 1.0 + (torch.cuda.max_memory_allocated() - before) / w.nbytes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    _fit(w)
    return 1.0 + (_status("VmHWM") - before) / w.nbytes


def _status(key: str) -> int:
    """A figure of this process in bytes, on Linux."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{key}:"))


def _peak_in_new_process(weights: int, device: str) -> float:
    """:func:`peak_memory` where no memory that was freed before can be used again unseen."""
    program = f"from adq.bench.fit import peak_memory; print(peak_memory({weights}, {device!r}))"
    with TemporaryDirectory() as folder:  # not the working directory, whose ./adq would come before the installed one
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"peak memory is not known: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)
