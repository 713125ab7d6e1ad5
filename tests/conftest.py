"""What the tests share: the process's backends, the table of layouts, the tolerances and the poisoned memory.

The environment is set before torch and triton are imported: Triton kernels run on CPU tensors under
Triton's interpreter, by calling :mod:`adq.backends.cuda` directly, while ``torch.ops.adq`` serves CPU tensors
with the C++ kernels, or with the reference where those are not built. Variables that the user has set are
left alone. With ``TRITON_INTERPRET=0`` the Triton kernels are compiled and tested on a GPU.
"""

from __future__ import annotations

import importlib
import os
from importlib.machinery import PathFinder
from importlib.util import find_spec

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads take the cores of other test processes
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault(  # looks for the extension without importing adq, because that loads the backends
    "ADQ_CPU_BACKEND",
    "cpp" if PathFinder.find_spec("adq._C", find_spec("adq").submodule_search_locations) else "reference",
)

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from oracle import Sum

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
BACKENDS = {"reference": "adq.reference", "cpp": "adq.backends.cpu", "triton": "adq.backends.cuda"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LAYOUTS = {
    "one": lambda make: make(1),
    "0-dim": lambda make: make(),
    "empty": lambda make: make(0),
    "empty-3d": lambda make: make(3, 0, 5),
    "63": lambda make: make(63),
    "1023": lambda make: make(1023),
    "prime": lambda make: make(4099),
    "primes-3d": lambda make: make(7, 31, 13),
    "misaligned": lambda make: make(1031)[3:],
    "transposed": lambda make: make(37, 53).t(),
    "permuted": lambda make: make(5, 7, 11).permute(2, 0, 1),
    "step-slice": lambda make: make(2 * 401)[::2],
    "column-slice": lambda make: make(41, 60)[:, 3:50],
    "expanded": lambda make: make(29, 1).expand(29, 17),
    "scalar-expanded": lambda make: make().expand(6, 31),
    "channels-last": lambda make: make(3, 16, 5, 7).to(memory_format=torch.channels_last),
    "channels-last-3d": lambda make: make(2, 5, 3, 4, 7).to(memory_format=torch.channels_last_3d),
}
"""Shapes and strides, as functions of ``make(*shape)``, which returns a contiguous tensor."""


@dataclass(frozen=True)
class Tolerance:
    """Largest error of a float32 computation whose result is rounded to a dtype."""

    relative: float
    absolute: float


TOLERANCES = {
    torch.float64: Tolerance(relative=2e-6, absolute=2.0**-149),
    torch.float32: Tolerance(relative=2e-6, absolute=2.0**-149),
    torch.bfloat16: Tolerance(relative=2.0**-8 + 2e-6, absolute=2.0**-133),
    torch.float16: Tolerance(relative=2.0**-11 + 2e-6, absolute=2.0**-24),
}
"""Arithmetic in float32 (2e-6, of the sum of the absolute contributions) plus one rounding to the dtype."""


FEW = {
    "levels": [4, 17, 256],
    "steps": [3, 255],
    "layout": ["0-dim", "empty", "prime", "misaligned", "column-slice", "channels-last"],
}
"""Of each parameter, the values with which half precision goes through Triton's interpreter, one of each code path."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Triton's kernels compute in float32 whatever they load, and interpreting them is slow: in half precision they
    run with a :data:`FEW` values of each parameter, all of which ``ADQ_TEST_SLOW=1`` and a GPU bring back."""
    if not INTERPRETED or os.environ.get("ADQ_TEST_SLOW"):
        return

    def repeats(item: pytest.Item) -> bool:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        half = given.get("backend") == "triton" and given.get("dtype") in DTYPES[1:]
        return half and any(given[name] not in few for name, few in FEW.items() if name in given)

    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        (dropped if repeats(item) else kept).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request):
    """One entry of :data:`LAYOUTS`."""
    return LAYOUTS[request.param]


@pytest.fixture(scope="session")
def layouts() -> dict:
    """The whole table, for tests that choose from it."""
    return LAYOUTS


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request):
    """The module of one backend: a function per operator, same name and arguments in each."""
    try:
        module = importlib.import_module(BACKENDS[request.param])
    except ImportError as error:
        pytest.skip(f"the {request.param} backend cannot be imported: {error}")
    if request.param == "triton" and not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 compiles the Triton kernels, and there is no GPU to run them")
    return module


def _copy_to(value, device: str):
    """A tensor copied to ``device`` with its strides and offset, whatever they are; so too the tensors of a list."""
    if isinstance(value, list):
        return [_copy_to(item, device) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return storage.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def _to_cpu(result):
    """A result, or a tuple or list of results, on the CPU."""
    return result.cpu() if isinstance(result, torch.Tensor) else type(result)(map(_to_cpu, result))


def _copy_back(values: list, moved: list) -> None:
    """What an operator in place has written to lists of tensors; the first argument is only read."""
    for value, written in zip(values[1:], moved[1:], strict=True):
        if isinstance(value, list):
            for tensor, result in zip(value, written, strict=True):
                if isinstance(tensor, torch.Tensor):
                    tensor.copy_(result)


@pytest.fixture(scope="session")
def call(backend):
    """``call(operator, *args)``: run an operator of the backend on CPU tensors (through a GPU if it needs one)."""
    on_gpu = backend.__name__ == BACKENDS["triton"] and not INTERPRETED

    def run(operator: str, *args):
        function = getattr(backend, operator)
        if not on_gpu:
            return function(*args)
        moved = _copy_to(list(args), "cuda")
        result = function(*moved)
        if operator.endswith("_"):
            _copy_back(list(args), moved)
            return result
        return _to_cpu(result)

    return run


@pytest.fixture(scope="module")
def poisoned_memory():
    """Fill what ``torch.empty`` returns with NaN, or with the largest integer: unwritten elements are seen."""
    settings = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    settings.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="session")
def assert_identical():
    """``assert_identical(actual, expected)``: same dtype, shape, strides and bits; one NaN is as good as another."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert actual.stride() == expected.stride()
        bits = integers[actual.element_size()]
        same = actual.contiguous().view(bits) == expected.contiguous().view(bits)
        same |= actual.isnan() & expected.isnan()
        wrong = (~same).nonzero()
        assert len(wrong) == 0, (
            f"{len(wrong)} of {same.numel()} elements differ, the first at {wrong[0].tolist()}: "
            f"{actual[tuple(wrong[0])].item()!r} instead of {expected[tuple(wrong[0])].item()!r}"
        )

    return check


@pytest.fixture(scope="session")
def assert_sum():
    """``assert_sum(actual, oracle)``: the error is small beside the sum of the absolute contributions."""

    def check(actual: torch.Tensor, oracle: Sum) -> None:
        assert actual.shape == oracle.value.shape
        tolerance = TOLERANCES[actual.dtype]
        error = np.abs(actual.double().cpu().numpy() - oracle.value)
        allowed = tolerance.relative * oracle.magnitude + tolerance.absolute * (oracle.magnitude > 0)
        excess = float(np.where(error == 0, 0.0, error / np.maximum(allowed, 1e-300)).max(initial=0.0))
        assert excess <= 1, f"the largest error, {error.max()}, is {excess:.3g} times what is allowed"

    return check
