"""Operators that torch calls without Python: the results and errors of their Python functions, and nothing kept."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tensors import f32, normal, u8
from test_integer import make

from adq.backends import STATUS

cpu = pytest.importorskip("adq.backends.cpu", reason="the C++ kernels are not built")
if STATUS[0].backend != "cpp" or "by torch itself" not in STATUS[0].detail:
    pytest.skip(f"Python calls the kernels here: {STATUS[0]}", allow_module_level=True)

CODEBOOK = f32(-1.0, -0.25, 0.0, 1.0)
LOOKUP = CODEBOOK, f32(-0.6, -0.1, 0.5)
QUANTIZER = f32(-0.5), f32(0.5, 0.2, 0.7), f32(1.5), f32(0.8), f32(0.1)


def scale_of(w: torch.Tensor) -> torch.Tensor:
    shape = [w.shape[0], *[1] * (w.dim() - 1)] if w.dim() else []
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5


OPERATORS: dict[str, Callable[[torch.Tensor], tuple]] = {
    "codebook_lookup": lambda w: (w, *LOOKUP, True),
    "codebook_lookup_statistics": lambda w: (w, *LOOKUP, False),
    "foreach_codebook_quantize": lambda w: ([w, w], [scale_of(w), torch.ones([1] * w.dim())], [CODEBOOK, f32(0.3)]),
    "threshold_quantize": lambda x: (x, *QUANTIZER, 3),
    "threshold_quantize_backward": lambda x: (x.cos(), x, *QUANTIZER, 3),
    "threshold_levels": lambda x: (x, *QUANTIZER[:3], 3),
}
PACKED = u8(*range(0, 240, 16)), f32(*range(16)), f32(0.5, 1.0, 2.0).view(3, 1)
OTHERS = {"integer_conv2d": make(residual=True)[0], "codebook_linear": (normal(4, 10), *PACKED, 4, 3)}
"""Their results are tested in test_integer.py and test_linear.py."""
every_operator = pytest.mark.parametrize("operator", OPERATORS)


def both(operator: str, arguments: tuple) -> tuple[list, list]:
    """Results through torch, and of the Python function."""
    results = getattr(torch.ops.adq, operator)(*arguments), getattr(cpu, operator)(*arguments)
    return tuple([result] if isinstance(result, torch.Tensor) else list(result) for result in results)


def python_calls(run: Callable[[], object]) -> list[str]:
    """Names of the backend's Python functions that run while ``run`` does."""
    names = []

    def record(frame, event, argument):
        if event == "call" and frame.f_code.co_filename == cpu.__file__:
            names.append(frame.f_code.co_name)

    sys.setprofile(record)
    try:
        run()
    finally:
        sys.setprofile(None)
    return names


def test_every_native_operator_is_covered():
    assert set(cpu._C.native_operators()) == OPERATORS.keys() | OTHERS.keys()


@every_operator
def test_results_are_those_of_the_python_function(poisoned_memory, assert_identical, operator, layout, dtype):
    x = layout(lambda *shape: normal(*shape).to(dtype))
    if x.numel() > 2:
        x.flatten()[1] = torch.nan
    native, python = both(operator, OPERATORS[operator](x))
    for one, other in zip(native, python, strict=True):
        assert_identical(one, other)


@every_operator
@pytest.mark.parametrize("shape", ["1023", "channels-last", "channels-last-3d", "permuted", "0-dim"])
def test_small_dense_calls_do_not_enter_python(operator, shape, layouts):
    arguments = OPERATORS[operator](layouts[shape](normal))
    assert python_calls(lambda: getattr(torch.ops.adq, operator)(*arguments)) == []


@every_operator
@pytest.mark.parametrize("x", [normal(2**19), normal(6, 4)[:, ::2], normal(0)], ids=["large", "strided", "empty"])
def test_python_serves_the_other_calls(assert_identical, operator, x):
    arguments = OPERATORS[operator](x)
    assert python_calls(lambda: getattr(torch.ops.adq, operator)(*arguments))[0] == operator
    native, python = both(operator, arguments)
    for one, other in zip(native, python, strict=True):
        assert_identical(one, other)


@every_operator
@pytest.mark.parametrize("x", [normal(64), normal(8, 16)[:, ::2], normal(64).double()], ids=["fast", "slow", "wrong"])
def test_arguments_are_let_go(operator, x):
    def tensors(values) -> list:
        nested = [value if isinstance(value, list) else [value] for value in values]
        return [value for values in nested for value in values if isinstance(value, torch.Tensor)]

    arguments = OPERATORS[operator](x)
    before = [tensor._use_count() for tensor in tensors(arguments)]
    for _ in range(3):
        try:
            results = getattr(torch.ops.adq, operator)(*arguments)
        except TypeError:
            assert x.dtype == torch.float64
        else:
            assert all(result._use_count() == 1 for result in tensors([results]))
            del results
    assert [tensor._use_count() for tensor in tensors(arguments)] == before


ODD = {
    torch.Tensor: [
        *(
            f32(),
            f32(1.0),
            f32(1.0, 2.0, 3.0, 4.0, 5.0),
            torch.tensor(1.0),
            torch.zeros(300),
            normal(2, 2),
            normal(3, 1),
        ),
        *(normal(4).double(), normal(4).half(), normal(8)[::2], normal(1, 1, 1, 1), normal(2, 8, 7, 6)),
        *(torch.zeros(4, dtype=kind) for kind in (torch.uint8, torch.int8, torch.int32, torch.bool)),
        torch.zeros(2, 8, 7, 6, dtype=torch.uint8),
    ],
    bool: [True, False],
    int: [-1, 0, 1, 2, 3, 4, 8, 9, 255, 256, 2**33],
    float: [float("nan"), float("-inf"), 0.5],
}
ODD_LISTS = {
    torch.Tensor: [[], [f32(1.0)] * 2, [f32(1.0)] * 3, [normal(2, 2)] * 2],
    int: [[], [1], [0, 0], [-1, 2], [3, 3, 3], [2**33, 1]],
}


def outcome(function: Callable, arguments: list) -> tuple:
    try:
        result = function(*arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error), str(error).split("\n")[0]
    tensors = (
        [result] if isinstance(result, torch.Tensor) else [t for r in result for t in (r if type(r) is list else [r])]
    )
    return "result", [(t.dtype, t.shape, t.stride(), t.reshape(-1).view(torch.uint8).tolist()) for t in tensors]


@pytest.mark.parametrize("operator", [*OPERATORS, *OTHERS])
def test_odd_arguments_have_the_same_outcome_as_in_python(poisoned_memory, operator):
    """What C++ takes for its own is what the Python function would have taken; every argument is replaced in turn."""
    arguments = OTHERS.get(operator) or OPERATORS[operator](normal(4))
    through_torch, in_python = getattr(torch.ops.adq, operator), getattr(cpu, operator)
    outcomes = set()
    for i, value in enumerate(arguments):
        odd = ODD_LISTS[type(value[0])] if isinstance(value, list) else ODD[type(value)]
        for replaced in [*odd, None] if operator == "integer_conv2d" and i == 6 else odd:
            changed = [*arguments[:i], replaced, *arguments[i + 1 :]]
            expected = outcome(in_python, changed)
            assert outcome(through_torch, changed) == expected, f"argument {i} is {replaced}"
            outcomes.add(expected[0])
    assert outcomes >= {"result", ValueError}


def test_sizes_whose_product_is_beyond_64_bits_are_refused_as_in_python():
    arguments = [normal(4, 10), PACKED[0], PACKED[1], torch.ones(1, 1), 4, 2**62 + 3]
    through_torch = outcome(torch.ops.adq.codebook_linear, arguments)
    assert through_torch == outcome(cpu.codebook_linear, arguments)
    assert through_torch[0] is ValueError


def test_many_threads_at_once():
    x, slow, wrong = normal(999), normal(30, 30).t(), normal(9).double()
    fast = both("threshold_quantize", OPERATORS["threshold_quantize"](x))[1][0]

    def work(_: int) -> bool:
        for _ in range(50):
            with pytest.raises(TypeError, match="x must be float32"):
                torch.ops.adq.threshold_quantize(*OPERATORS["threshold_quantize"](wrong))
            torch.ops.adq.threshold_quantize(*OPERATORS["threshold_quantize"](slow))
        return torch.equal(torch.ops.adq.threshold_quantize(*OPERATORS["threshold_quantize"](x)), fast)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_a_torch_without_the_functions_is_served_from_python(monkeypatch):
    monkeypatch.setattr(cpu._C, "torch_functions", lambda: ["aoti_torch_get_dim", "torch_of_some_other_time"])
    assert cpu._torch_functions() is None


PROGRAM = """
import torch, adq
from adq.backends import STATUS
x = torch.linspace(-1, 1, 9)
y = torch.ops.adq.codebook_lookup(x, torch.tensor([-1.0, 0.5]), torch.tensor([-0.25]), False)[0]
print(STATUS[0].detail, y.tolist())
"""


def run(choice: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "ADQ_CPU_DISPATCH": choice, "ADQ_CPU_BACKEND": "cpp", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=environment, cwd=tempfile.gettempdir(), capture_output=True, text=True)


def test_python_can_be_forced():
    finished = run("python")
    assert finished.returncode == 0, finished.stderr
    assert "called from Python [-1.0, -1.0, -1.0, -1.0, 0.5" in finished.stdout


def test_another_choice_is_refused():
    assert "ADQ_CPU_DISPATCH must be auto or python, got 'fast'" in run("fast").stderr


def started(code: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, **environment}
    variables.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=variables, cwd=tempfile.gettempdir(), capture_output=True, text=True)


@pytest.mark.parametrize(("limit", "fails"), [("64", False), ("", False), ("1GB", True), ("-5", True)])
def test_the_limit_of_the_pool_is_a_number(limit, fails):
    finished = started("import adq", ADQ_CPU_POOL_MIB=limit)
    assert (finished.returncode != 0) == fails
    assert (f"ADQ_CPU_POOL_MIB must be a whole number of MiB, got {limit!r}" in finished.stderr) == fails


@pytest.mark.parametrize("gpus", [0, 1])
def test_an_old_triton_leaves_the_gpu_to_the_reference_and_says_so_where_there_is_one(gpus):
    code = (
        "import sys, types, torch; old = types.ModuleType('triton'); old.__version__ = '3.3.1'; "
        "old.language = types.ModuleType('triton.language'); "
        f"torch.cuda.device_count = lambda: {gpus}; "
        "sys.modules.update({'triton': old, 'triton.language': old.language}); "
        "from adq.backends import STATUS; print(STATUS[1])"
    )
    finished = started(code)
    assert finished.returncode == 0, finished.stderr
    assert (
        "backend='reference'" in finished.stdout
        and "need Triton 3.4 or newer (torch 2.8), this is 3.3.1" in finished.stdout
    )
    assert ("the far slower torch reference serves the GPU" in finished.stderr) == bool(gpus)
