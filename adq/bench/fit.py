"""Fitting a codebook to weights, beside the k-means of other packages on the same values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

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
    targets = [faster_than(SKLEARN, OVER_SKLEARN)] + [faster_than(name, OVER_OTHERS) for name in slow]
    targets += [extra(name, "SQNR, dB", f"SQNR of {name}", None) for name in contenders]
    extras = {f"SQNR of {name}": _sqnr_of(name) for name in contenders}
    if weights == setting.fit_weights[-1]:
        targets.append(extra(ADQ, "peak memory, times the weights", PEAK, MAX_MEMORY))
        extras[PEAK] = lambda data: peak_memory(lambda: _fit(data.w), data.w)

    def data() -> Weights:
        generator = torch.Generator(setting.device).manual_seed(0)
        return Weights(0.02 * torch.randn(weights, device=setting.device, generator=generator))

    return Case(
        PART,
        f"fit {levels} levels to {weights:,} weights",
        data,
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


def peak_memory(call: Callable[[], object], w: Tensor) -> float:
    """Most memory that a call has in use, the weights included, over the bytes of the weights."""
    if w.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return 1.0 + (torch.cuda.max_memory_allocated() - before) / w.nbytes
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError as error:
        raise Unavailable("no high-water mark of this process on this system") from error
    before = _status("VmRSS")
    call()
    return 1.0 + (_status("VmHWM") - before) / w.nbytes


def _status(key: str) -> int:
    """A figure of this process in bytes, on Linux."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{key}:"))
