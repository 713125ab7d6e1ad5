"""The C++ kernels against the reference, on every instruction set that the processor has.

Codes, levels and packed bytes must equal the reference's bit for bit, sums to float32 rounding; and no bit
of any result may depend on the instruction set, on the number of threads or on the run.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import adq
from adq import reference

# `python -m pytest` puts the checkout on sys.path, where ./adq, which has no compiled kernels, hides an installation.
for distribution in importlib.metadata.distributions(name="adq"):
    for file in distribution.files or []:
        extension = Path(str(file.locate())).resolve()
        if extension.stem.startswith("_C.") and extension.parent != Path(adq.__file__).resolve().parent:
            raise RuntimeError(f"{adq.__file__} hides the installed package {extension.parent}: run `pytest` instead")

try:
    from adq.backends import cpu
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

_C = cpu._C
ISAS = _C.available_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 100, 255, 256)
STEPS = (1, 2, 3, 7, 15, 16, 31, 63, 255)
SIZES = (0, 1, 7, 15, 16, 17, 63, 1023, 4099, 100_003)
SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -1e-40, 6e-8, 65504.0, 3e38, -3e38)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(params=ISAS)
def isa(request):
    """Run with this instruction set."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def threads():
    """Set the number of threads; it is put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def values(size: int, dtype: torch.dtype, special: bool = True, seed: int = 0) -> torch.Tensor:
    """Normal deviates, among them (if there is room) the special values."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    if special and size > 4 * len(SPECIAL):
        x[torch.arange(len(SPECIAL)) * (size // len(SPECIAL))] = torch.tensor(SPECIAL)
    return x.to(dtype)


def codebook(levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An ascending codebook with duplicates, and its thresholds."""
    book = torch.randn(levels, generator=torch.Generator().manual_seed(levels)).sort().values
    if levels > 3:
        book[2] = book[1]
    return book, reference.decision_thresholds(book)


def quantizer(steps: int, uniform: bool = False, offset: float = 0.0) -> tuple:
    """Parameters of the activation quantizer; some of the intervals are clamped."""
    interval = 3.0 / steps * (0.2 + torch.rand(1 if uniform else steps, generator=torch.Generator().manual_seed(steps)))
    if steps > 5 and not uniform:
        interval[[2, 5]] = torch.tensor([-0.5, 1e-3])
    scalars = (torch.tensor([value]) for value in (-1.2, 1.1, 0.7, offset))
    start, in_scale, out_scale, shift = scalars
    return start, interval, in_scale, out_scale, shift, steps


QUANTIZERS = [*(quantizer(steps) for steps in STEPS), *(quantizer(steps, uniform=True) for steps in (3, 15, 255))]
each_quantizer = pytest.mark.parametrize("args", QUANTIZERS, ids=lambda args: f"{args[5]}steps-{args[1].numel()}")


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal dtype, shape, strides, and values bit for bit; NaN equals NaN, -0 does not equal 0."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    if actual.is_floating_point():
        number = ~actual.isnan()
        assert torch.equal(actual.signbit()[number], expected.signbit()[number])


def assert_bytes(actual: tuple, expected: tuple) -> None:
    """Tuples of equal bytes."""
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def assert_gradients(actual: tuple, grad: torch.Tensor, x: torch.Tensor, args: tuple) -> None:
    """d_x to the rounding of its dtype; sums relative to the same sums over absolute values."""
    expected = reference.threshold_quantize_backward(grad, x, *args)
    magnitude = reference.threshold_quantize_backward(grad.abs(), x, *args)
    eps = max(torch.finfo(x.dtype).eps, 5e-7)
    torch.testing.assert_close(actual[0], expected[0], rtol=eps, atol=1e-7, equal_nan=True)
    for one, other, scale in zip(actual[1:], expected[1:], magnitude[1:], strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 2e-6 * scale.abs().max()


# ---- codebooks ---------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("levels", LEVELS)
def test_lookup_matches_reference(isa, dtype, levels):
    book, thresholds = codebook(levels)
    for size in SIZES:
        w = values(size, dtype)
        w_q, codes = cpu.codebook_lookup(w, book, thresholds, True)
        expected = reference.codebook_lookup(w, book, thresholds, True)
        assert_same_bits(w_q, expected[0])
        assert_same_bits(codes, expected[1])


@each_dtype
@pytest.mark.parametrize("levels", LEVELS)
def test_statistics_match_reference(isa, dtype, levels):
    book, thresholds = codebook(levels)
    for size in SIZES:
        w = values(size, dtype, special=False)
        if size:
            w[0] = float("nan")
        w_q, codes, count, total = cpu.codebook_lookup_statistics(w, book, thresholds, False)
        assert codes.numel() == 0
        assert_same_bits(w_q, reference.codebook_lookup(w, book, thresholds, False)[0])
        expected = reference.codebook_statistics(w, thresholds)
        assert torch.equal(count, expected[0])
        torch.testing.assert_close(total, expected[1], rtol=1e-5, atol=1e-5 * max(1.0, size**0.5))
        assert_bytes(cpu.codebook_statistics(w, thresholds), (count, total))


def test_infinity_stays_in_its_cell(isa):
    w = torch.tensor([float("inf"), -float("inf"), 0.1, 0.2, float("nan")] * 40)
    for levels in (4, 40):
        book = torch.linspace(-1, 1, levels)
        count, total = cpu.codebook_statistics(w, reference.decision_thresholds(book))
        assert count.sum() == 160
        assert total[0] == -float("inf")
        assert total[-1] == float("inf")
        assert total[1:-1].sum() == pytest.approx(12.0)


def test_tie_takes_the_lower_codeword(isa):
    book = torch.tensor([0.0, 1.0, 2.0])
    w_q, codes = cpu.codebook_lookup(torch.tensor([0.5, 0.50001, 1.5, 9.0]), book, torch.tensor([0.5, 1.5]), True)
    assert codes.tolist() == [0, 1, 1, 2]
    assert w_q.tolist() == [0.0, 1.0, 1.0, 2.0]


# ---- activation quantizer ----------------------------------------------------------------------------


@each_dtype
@each_quantizer
def test_quantize_matches_reference(isa, dtype, args):
    for size in SIZES:
        x = values(size, dtype)
        assert_same_bits(cpu.threshold_quantize(x, *args), reference.threshold_quantize(x, *args))


@each_dtype
@pytest.mark.parametrize("uniform", [False, True])
def test_quantize_at_its_edges(isa, dtype, uniform):
    """Inputs on and next to every edge, where one rounding too many would show."""
    start, interval, in_scale, out_scale, offset, steps = quantizer(15, uniform, offset=0.3)
    edges = start + (torch.arange(15) + 0.5) * interval if uniform else start + interval.cumsum(0) - interval / 2
    x = (edges / in_scale)[:, None] * (1 + torch.arange(-8, 9) * torch.finfo(dtype).eps / 2)
    x = x.to(dtype)
    actual = cpu.threshold_quantize(x, start, interval, in_scale, out_scale, offset, steps)
    assert_same_bits(actual, reference.threshold_quantize(x, start, interval, in_scale, out_scale, offset, steps))


@each_dtype
@each_quantizer
def test_backward_matches_reference(isa, dtype, args):
    for size in SIZES:
        x = values(size, dtype)
        grad = values(size, dtype, special=False, seed=1)
        actual = cpu.threshold_quantize_backward(grad, x, *args)
        assert_gradients(actual, grad, x, args)


def test_clamped_interval_has_no_gradient(isa):
    args = quantizer(7)
    d_interval = cpu.threshold_quantize_backward(torch.ones(999), values(999, torch.float32), *args)[2]
    assert (d_interval == 0).tolist() == (args[1] <= 1e-3).tolist()


# ---- packing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_matches_reference(isa, bits):
    for size in SIZES:
        codes = torch.randint(0, 256, (size,), dtype=torch.uint8)
        packed = cpu.pack_bits(codes, bits)
        assert torch.equal(packed, reference.pack_bits(codes, bits))
        assert torch.equal(cpu.unpack_bits(packed, bits, size), codes & (2**bits - 1))


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_stays_in_bounds(isa, bits):
    """Buffers of exactly the size, inside larger ones whose other bytes must not change."""
    for size in (1, 8, 127, 128, 129, 1024, 70_001):
        codes = torch.randint(0, 2**bits, (size,), dtype=torch.uint8)
        length = (size * bits + 7) // 8
        packed = torch.full((length + 16,), 0xAA, dtype=torch.uint8)
        back = torch.full((size + 16,), 0xAA, dtype=torch.uint8)
        _C.pack_bits(codes.data_ptr(), size, bits, packed.data_ptr() + 8, 2)
        _C.unpack_bits(packed.data_ptr() + 8, bits, size, back.data_ptr() + 8, 2)
        for buffer in (packed, back):
            assert (buffer[:8] == 0xAA).all()
            assert (buffer[-8:] == 0xAA).all()
        assert torch.equal(back[8:-8], codes)


def packed_weight(size: int, bits: int, axis: int | None = 0) -> tuple:
    """Arguments of the decoder for ``size`` weights in rows of 7, or as many as there are."""
    shape = [size // 7, 7] if size % 7 == 0 else [size]
    generator = torch.Generator().manual_seed(size)
    codes = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    scale = torch.randn([n if d == axis else 1 for d, n in enumerate(shape)], generator=generator)
    return reference.pack_bits(codes, bits), codebook(max(1, 2**bits - 1))[0], scale, bits, shape


@pytest.mark.parametrize("bits", range(1, 9))
def test_decoding_matches_reference(isa, bits):
    for size in (*SIZES, 7 * 301):
        for axis in (None, 0):
            args = packed_weight(size, bits, axis)
            assert_same_bits(cpu.codebook_decode(*args), reference.codebook_decode(*args))


@pytest.mark.parametrize("bits", range(1, 9))
def test_decoding_stays_in_bounds(isa, bits):
    for rows, length in ((1, 1), (1, 127), (3, 4099), (300, 9), (17, 64)):
        size = rows * length
        packed = torch.randint(0, 256, ((size * bits + 7) // 8,), dtype=torch.uint8)
        levels, scale = torch.randn(2**bits), torch.randn(rows, 1)
        out = torch.full((size + 16,), 7.0)
        tables = levels.data_ptr(), levels.numel(), scale.data_ptr()
        _C.codebook_decode(packed.data_ptr(), bits, *tables, 1, rows, length, out.data_ptr() + 32, 2)
        assert (out[:8] == 7.0).all()
        assert (out[-8:] == 7.0).all()
        assert torch.equal(
            out[8:-8].view(rows, length), reference.codebook_decode(packed, levels, scale, bits, [rows, length])
        )


@pytest.mark.parametrize("bits", range(1, 9))
def test_products_with_codes_match_reference(isa, bits):
    """Rows that share bytes, several to a block of codes, and longer than a block; every number of rows of x."""
    for outputs, inputs, rows in ((37, 7, 1), (21, 129, 3), (3, 4099, 2), (2, 9000, 6), (1, 64, 13)):
        packed, book, scale, bits, _ = packed_weight(outputs * inputs, bits, None)
        scale = torch.linspace(-1.0, 1.0, outputs).view(-1, 1)
        x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
        weight = reference.codebook_decode(packed, book, scale, bits, [outputs, inputs])
        y = cpu.codebook_linear(x, packed, book, scale, bits, outputs)
        error = (y - reference.codebook_linear(x, packed, book, scale, bits, outputs)).abs()
        assert (error <= 2e-6 * (x.abs() @ weight.abs().t())).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_products_with_codes_stay_in_bounds(isa, bits):
    for rows, outputs, inputs in ((1, 1, 1), (2, 3, 127), (9, 17, 64)):
        packed = torch.randint(0, 256, ((outputs * inputs * bits + 7) // 8,), dtype=torch.uint8)
        levels, scale, x = torch.randn(2**bits), torch.randn(outputs, 1), torch.randn(rows, inputs)
        out = torch.full((rows * outputs + 16,), 7.0)
        table = packed.data_ptr(), bits, levels.data_ptr(), levels.numel(), scale.data_ptr(), outputs
        _C.codebook_linear(x.data_ptr(), rows, inputs, outputs, *table, out.data_ptr() + 32, 2)
        assert (out[:8] == 7.0).all()
        assert (out[-8:] == 7.0).all()
        expected = cpu.codebook_linear(x, packed, levels, scale, bits, outputs)
        assert torch.equal(out[8:-8].view(rows, outputs), expected)


# ---- one result everywhere ---------------------------------------------------------------------------


def all_results(dtype: torch.dtype, size: int) -> tuple[torch.Tensor, ...]:
    """Every result of every operator, through the chains, the searches and the closed form."""
    w, grad = values(size, dtype), values(size, dtype, seed=1)
    results: list[torch.Tensor] = []
    for levels in (2, 7, 16, 40, 256):
        book, thresholds = codebook(levels)
        results += cpu.codebook_lookup_statistics(w, book, thresholds, True)
    for steps, uniform in ((1, False), (3, False), (7, False), (15, False), (100, False), (15, True)):
        args = quantizer(steps, uniform, offset=0.4)
        results.append(cpu.threshold_quantize(w, *args))
        results += cpu.threshold_quantize_backward(grad, w, *args)
    for bits in range(1, 9):
        codes = results[1]
        results.append(cpu.pack_bits(codes, bits))
        results.append(cpu.unpack_bits(results[-1], bits, codes.numel()))
        results.append(cpu.codebook_decode(*packed_weight(size, bits)))
        x = torch.where(w.isfinite(), w, 0.5)[:2500].view(5, 500)
        packed, book, scale, *_ = packed_weight(200 * 500, bits, None)
        results.append(cpu.codebook_linear(x, packed, book, scale.view(1, 1), bits, 200))
    return tuple(results)


@each_dtype
def test_bits_do_not_depend_on_isa_threads_or_run(dtype, threads):
    before = _C.isa()
    threads(1)
    expected = all_results(dtype, 100_003)
    try:
        for name in ISAS:
            _C.set_isa(name)
            for count in (1, 2, 7):
                threads(count)
                assert_bytes(all_results(dtype, 100_003), expected)
    finally:
        _C.set_isa(before)


# ---- layouts -----------------------------------------------------------------------------------------


LAYOUTS = {
    "0-dim": lambda x: x[0],
    "misaligned": lambda x: x[1:1000],
    "strided": lambda x: x[::3],
    "transposed": lambda x: x[:2000].view(40, 50).t(),
    "channels_last": lambda x: x[: 2 * 3 * 5 * 7].view(2, 3, 5, 7).to(memory_format=torch.channels_last),
    "sliced": lambda x: x[:2000].view(40, 50)[:, 3:17],
    "expanded": lambda x: x[:40, None].expand(40, 20),
    "empty": lambda x: x[:0].view(0, 3),
}


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype, layout):
    x = LAYOUTS[layout](values(5000, dtype, special=False))
    grad = torch.randn(x.shape).to(dtype)
    book, thresholds = codebook(8)
    for actual, expected in zip(
        cpu.codebook_lookup(x, book, thresholds, True),
        reference.codebook_lookup(x, book, thresholds, True),
        strict=True,
    ):
        assert_same_bits(actual, expected)
    assert torch.equal(cpu.codebook_statistics(x, thresholds)[0], reference.codebook_statistics(x, thresholds)[0])
    args = quantizer(7)
    assert_same_bits(cpu.threshold_quantize(x, *args), reference.threshold_quantize(x, *args))
    gradients = cpu.threshold_quantize_backward(grad, x, *args)
    assert_gradients(gradients, grad, x, args)
    assert gradients[0].stride() == torch.empty_like(x).stride()
    codes = cpu.codebook_lookup(x, book, thresholds, True)[1]
    assert torch.equal(cpu.pack_bits(codes, 3), reference.pack_bits(codes, 3))


@pytest.mark.filterwarnings("ignore:torch.searchsorted")
def test_tables_may_be_strided():
    book = torch.linspace(-1, 1, 16)[::2]
    thresholds = torch.stack([reference.decision_thresholds(book), torch.zeros(7)], 1)[:, 0]
    w = values(100, torch.float32)
    expected = reference.codebook_lookup(w, book, thresholds, True)
    assert_bytes(cpu.codebook_lookup(w, book, thresholds, True), expected)


# ---- the extension -----------------------------------------------------------------------------------


def test_isa_can_be_chosen():
    assert _C.isa() in ISAS
    assert ISAS[-1] == "baseline"
    with pytest.raises(ValueError, match="mmx"):
        _C.set_isa("mmx")
    assert cpu.describe().startswith("C++ kernels, ")


@pytest.mark.parametrize(("isa", "said"), [(ISAS[-1], ISAS[-1]), ("mmx", "instruction set 'mmx' is unknown")])
def test_isa_can_be_forced_by_the_environment(isa, said):
    environment = {**os.environ, "ADQ_CPU_ISA": isa}
    command = [sys.executable, "-c", "from adq.backends import cpu; print(cpu._C.isa())"]
    finished = subprocess.run(command, env=environment, cwd=tempfile.gettempdir(), capture_output=True, text=True)
    assert said in (finished.stdout or finished.stderr)
