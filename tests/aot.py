"""Compiles the Triton kernels ahead of time, without a GPU, and reads what the compiler made of them.

``python tests/aot.py sm_90 gfx942`` runs every launcher of :mod:`adq.backends.cuda` on small CPU tensors with the
launch itself replaced by a recorder, compiles each recorded launch for each target as the runtime would (same
constants, options and pointer alignment), on all cores, and prints one JSON line a kernel. Needs Triton's
compiler, so it must not run under ``TRITON_INTERPRET=1``.

On NVIDIA most of the time would go into starting the assembler and the disassembler, so the PTX of several kernels
is put together and assembled, by Triton's own command, as one file. Functions do not influence each other there.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from adq.backends import cuda
from adq.layout import arrange

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float64: "*fp64",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WHOLE = "sm_90"
"""The target for which every case is compiled."""

BATCH = 12
"""Kernels that a process compiles at a time."""

Code = list[tuple[str, int | None, bool]]
"""Instructions: text, index of the branch target or None, and whether the next one is not reached from it."""


def _sass(text: str) -> Code:
    lines = [(int(m[1], 16), m[2].strip()) for m in re.finditer(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", text, re.M)]
    place = {address: i for i, (address, _) in enumerate(lines)}
    code: Code = []
    for address, line in lines:
        target = re.search(r"\b(?:BRA|CALL)\b.*?\b0x([0-9a-f]+)", line)
        if target and int(target[1], 16) == address:
            break  # the padding behind the program
        code.append((line, place[int(target[1], 16)] if target else None, bool(re.match(r"(BRA|EXIT|RET)", line))))
    return code


def _gcn(text: str) -> Code:
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if re.match(r"([a-z]+_\w+|\.LBB\w+:)", line)]
    place, plain = {}, []
    for line in lines:
        if line.startswith("."):
            place[line.split(":")[0]] = len(plain)
        else:
            plain.append(line)
    code: Code = []
    for line in plain:
        target = re.match(r"s_c?branch\S*\s+(\.LBB\w+)", line)
        code.append((line, place[target[1]] if target else None, line.startswith(("s_branch", "s_endpgm"))))
    return code


def _distances(code: Code, origin: int) -> dict[int, int]:
    """Instructions executed from ``origin`` on, by the shortest way, until each reachable one has been."""
    reached, front = {origin: 1}, [origin]
    while front:
        following = []
        for i in front:
            _, target, ends = code[i]
            for j in (target, None if ends else i + 1):
                if j is not None and j < len(code) and j not in reached:
                    reached[j] = reached[i] + 1
                    following.append(j)
        front = following
    return reached


def _hot_path(code: Code, anchor: str) -> int:
    """Instructions of the shortest way around the loop through a memory access that matches ``anchor``, or
    through the whole program where there is no loop. Full tiles have the wide accesses, so this is theirs."""
    around, through = [], []
    begin = _distances(code, 0)
    ends = [i for i, (line, _, _) in enumerate(code) if re.search("EXIT|s_endpgm", line)]
    for at in (i for i, (line, _, _) in enumerate(code) if i in begin and re.search(anchor, line)):
        onwards = _distances(code, at)
        before = [i for i, (_, target, last) in enumerate(code) if target == at or (i + 1 == at and not last)]
        around += [min(onwards[i] for i in before if i in onwards)] if any(i in onwards for i in before) else []
        through.append(begin[at] + min(onwards[i] for i in ends if i in onwards) - 1)
    return max(around or through)


class Assembler:
    """Stands in for Triton's assembler: keeps each kernel's PTX until they are assembled together."""

    make_cubin = CUDABackend.make_cubin

    def __init__(self):
        self.ptx, self.arguments = [], ()

    def __call__(self, backend, ptx: str, metadata, options, capability) -> bytes:
        name, number = re.search(r"\.entry (\w+)", ptx)[1], len(self.ptx)
        self.ptx.append(re.sub(rf"\b{name}\b|_\$_str", rf"k{number}_\g<0>", ptx))
        self.arguments = backend, metadata, options, capability
        return b""

    def figures(self) -> list[dict]:
        """What was made of each kernel."""
        backend, *others = self.arguments
        body = [ptx[ptx.index(".address_size 64") + len(".address_size 64") :] for ptx in self.ptx]
        begin = self.ptx[0][: -len(body[0])]
        cubin = Assembler.make_cubin(backend, begin + "".join(body), *others)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [TOOLS / "cuobjdump", "--dump-resource-usage", "--dump-sass", file.name]
            dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = dict(re.findall(r"Function k(\d+)_\w+:\s*\n\s*(.*)", dump))
        code = {m[1]: m[2] for m in re.finditer(r"Function : k(\d+)_\w+\n(.*?)(?=Function :|\Z)", dump, re.S)}
        assert len(usage) == len(code) == len(self.ptx)
        return [_nvidia(usage[str(i)], code[str(i)]) for i in range(len(self.ptx))]


def _nvidia(usage: str, text: str) -> dict:
    size = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    code = _sass(text)
    wide = [i for i, _, _ in code if re.search(r"(LDG|STG)\.E\S*\.128", i)]
    return {
        "registers": int(size["REG"]),
        "spills": int(size["STACK"]) + int(size["LOCAL"]),
        "shared": int(size["SHARED"]),
        "wide_loads": sum("LDG" in i for i in wide),
        "wide_stores": sum("STG" in i for i in wide),
        "wide_copies": sum("LDGSTS" in i and ".128" in i for i, _, _ in code),
        "integer_products": sum(bool(re.search(r"\b(IMMA|IGMMA)\b", i)) for i, _, _ in code),
        "path": _hot_path(code, r"(LDG|STG)\.E\S*\.128" if wide else "LDG"),
        "total": len(code),
    }


def _amd(compiled) -> dict:
    assembly = compiled.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    code = _gcn(assembly)
    wide = [i for i, _, _ in code if re.match(r"(global|buffer)_(load|store)_dwordx4", i)]
    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count") + field("private_segment_fixed_size"),
        "shared": field("group_segment_fixed_size"),
        "wide_loads": sum("load" in i for i in wide),
        "wide_stores": sum("store" in i for i in wide),
        "wide_copies": sum("load" in i for i in wide),
        "integer_products": sum(i.startswith("v_mfma_i32") for i, _, _ in code),
        "path": _hot_path(code, r"(global|buffer)_(load|store)_dwordx4" if wide else r"(global|buffer)_load"),
        "total": len(code),
    }


def compile_launch(target: GPUTarget, kernel, args, constants, options):
    """Compile one recorded launch as the runtime would."""
    signature, constexprs, attributes = {}, dict(constants), {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if value is None:
            constexprs[name] = None
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    options = cuda.launch_options(target.backend == "hip", **options)
    return triton.compile(ASTSource(kernel, signature, constexprs, attributes), target=target, options=options)


def measure(target: GPUTarget, launches: list[tuple]) -> list[dict]:
    """Compile recorded launches and read the figures of each; ``fused`` counts the products and sums that the
    compiler fused by itself, in PTX."""
    assembler = Assembler()
    CUDABackend.make_cubin = lambda *args: assembler(*args)
    compiled = [compile_launch(target, *launch) for launch in launches]
    figures = assembler.figures() if target.backend == "cuda" else list(map(_amd, compiled))
    for kernel, row in zip(compiled, figures, strict=True):
        by_name = sum(int(m or 1) for m in re.findall(r"call (?:<(\d+) x )?float>? @llvm\.fma\.", kernel.asm["llir"]))
        row["fused"] = kernel.asm["ptx"].count("fma.") - by_name if target.backend == "cuda" else 0
    return figures


class Recorder:
    """Stands in for :func:`adq.backends.cuda._launch`."""

    def __init__(self):
        self.launches = []

    def __call__(self, kernel, programs, *args, block=False, registers=None, stages=1, **constants):
        self.launches.append((kernel, args, constants, {"block": block, "registers": registers, "stages": stages}))


def cases(target: str):
    """(operation, dtype, size, call) of every launcher of the product; size is K, n or the bits of a code.

    Symmetric codebooks have a level less. Where no search in memory and no statistics are needed, that is another
    constant in the same code. So is the number of steps of a uniform quantizer. Float16 has the code of bfloat16
    with other conversions: it, and symmetric codebooks, are compiled for :data:`WHOLE` alone.
    """
    one, whole = torch.ones(1), target == WHOLE
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 3 if whole else 2]:
        name = str(dtype).removeprefix("torch.")
        x = torch.zeros(4096, dtype=dtype)
        for bits in range(1, 9):
            for levels in (2**bits, 2**bits - 1)[: 2 if whole and bits > 1 else 1]:
                table = torch.zeros(levels), torch.zeros(levels - 1)
                if levels == 2**bits or bits > cuda.LANE_PROBES:
                    yield "lookup", name, levels, partial(cuda.codebook_lookup, x, *table, False)
                    yield "lookup with codes", name, levels, partial(cuda.codebook_lookup, x, *table, True)
                yield "statistics", name, levels, partial(cuda.codebook_statistics, x, table[1])
                if levels <= cuda.REGISTER_LEVELS:
                    yield "both", name, levels, partial(cuda.codebook_lookup_statistics, x, *table, True)
            steps = 2**bits - 1
            kinds = {"": torch.ones(steps), **({"uniform ": one} if bits == 8 else {})}
            for kind, interval in kinds.items():
                arguments = (x, one, interval, one, one, one, steps)
                yield kind + "forward", name, steps, partial(cuda.threshold_quantize, *arguments)
                yield kind + "backward", name, steps, partial(cuda.threshold_quantize_backward, x, *arguments)
                yield kind + "levels", name, steps, partial(cuda.threshold_levels, x, one, interval, one, steps)
        if whole or dtype == torch.bfloat16:
            yield from foreach_cases(dtype, target)
    yield from integer_cases()
    for bits in range(1, 9):
        codes, packed = torch.zeros(8192, dtype=torch.uint8), torch.zeros(1024 * bits, dtype=torch.uint8)
        yield "pack", "uint8", bits, partial(cuda.pack_bits, codes, bits)
        yield "unpack", "uint8", bits, partial(cuda.unpack_bits, packed, bits, 8192)
        for kind, scale in (
            ("", torch.ones(1, 1)),
            ("rows ", torch.ones(16, 1)),
            ("columns ", torch.ones(1, 512)),
        ):
            arguments = packed, torch.zeros(2**bits), scale, bits, [16, 512]
            yield f"decode {kind}".strip(), "uint8", bits, partial(cuda.codebook_decode, *arguments)
    for dtype, rows, widths in (
        (torch.float32, 1, range(1, 9)),
        (torch.bfloat16, 1, (4,)),
        (torch.float16, 1, (4,) if whole else ()),
        (torch.bfloat16, 4, (3, 4, 8)),
    ):
        for bits in widths:
            x, packed = torch.zeros(rows, 4096, dtype=dtype), torch.zeros(4096 * bits, dtype=torch.uint8)
            arguments = x, packed, torch.zeros(2**bits), torch.ones(8, 1), bits, 8
            operation, name = "linear" if rows == 1 else "linear, rows", str(dtype).removeprefix("torch.")
            yield operation, name, bits, partial(cuda.codebook_linear, *arguments)


def integer_cases():
    """The integer convolution, size the bits of a weight (9: depthwise)."""
    values = torch.zeros(128)
    for bits in (1, 2, 3, 4, 8, 9):
        groups = 64 if bits == 9 else 1
        shape = 64, 64 // groups, 3, 3
        generator = torch.Generator().manual_seed(bits)
        weight = torch.randint(0, 2 ** min(bits, 8), shape, generator=generator).to(torch.int8)
        for residual in (None, torch.zeros(2, 64, 8, 8)):
            arguments = torch.zeros(2, 64, 8, 8, dtype=torch.uint8), *arrange(weight, groups), values[:64].int()
            pairs = [1, 1], [1, 1], [1, 1]
            after = values[:64], values[:64], residual, 0.0, 1.0, [], [], True, [3, 3], *pairs, groups, 0
            operation = "integer" + ("" if residual is None else ", residual")
            yield operation, "uint8", bits, partial(cuda.integer_conv2d, *arguments, *after)


def foreach_cases(dtype: torch.dtype, target: str):
    """The operators of many layers: of all widths in one network, which is all the code there is; and of single
    widths, in float32 on one target, for their figures. Size is the largest number of levels."""
    single = dtype == torch.float32 and target == WHOLE
    for levels in ((4, 8, 16, 256), *[(4,), (8,), (16,)] * single):
        labels = str(dtype).removeprefix("torch."), max(levels)
        weights, scales = (
            [torch.zeros(16, 8, 3, 3, dtype=dtype) for _ in levels],
            [torch.ones(16, 1, 1, 1) for _ in levels],
        )
        tables = [[torch.zeros(k) for k in levels] for _ in range(3)]
        yield "foreach quantize", *labels, partial(cuda.foreach_codebook_quantize, weights, scales, tables[0])
        rates, snap = torch.ones(len(levels)), [False] * len(levels)
        for operation, quantized in (("foreach step", []), ("foreach step, quantize", weights)):
            arguments = weights, scales, *tables, rates, 1.0, snap, quantized
            yield operation, *labels, partial(cuda.foreach_codebook_step_, *arguments)


def record(target: str) -> list[tuple[dict, tuple]]:
    """Labels and launch of everything that :func:`cases` launches on a target, each code once."""
    warp = cuda.WARP = cuda.PRODUCT_SIZE = TARGETS[target].warp_size
    cuda.LINEAR_LANES = 4 * warp
    cuda.PRECISION = "ieee" if TARGETS[target].backend == "hip" else "tf32"
    recorder = cuda._launch = Recorder()
    found = {}
    for operation, dtype, size, call in cases(target):
        recorder.launches.clear()
        call()
        for launch in recorder.launches:
            kernel, args, constants, options = launch
            key = (kernel.__name__, str([getattr(a, "dtype", a is None) for a in args]), str(constants))
            vector = 4 if operation.startswith(("decode", "linear")) else constants.get("VECTOR", 1)
            tile = constants.get("SIZE", constants.get("LANES", warp) * vector)
            if operation.startswith("linear"):
                tile *= constants.get("OUTPUTS", 1)
            elif operation.startswith("integer"):  # results, or weights
                tile = constants["M"] * constants["N"] if "M" in constants else constants["STEPS"] * 64
            elements = 16 if operation.endswith("pack") else max(1, tile // (cuda.BLOCK if options["block"] else warp))
            labels = {"target": target, "operation": operation, "dtype": dtype, "size": size}
            found.setdefault(key, (labels | {"kernel": kernel.__name__, "elements": elements}, launch))
    return list(found.values())


def work(task: tuple[str, int]) -> list[dict]:
    """The rows of one batch of a target's launches."""
    target, first = task
    batch = RECORDED[target][first : first + BATCH]
    figures = measure(TARGETS[target], [launch for _, launch in batch])
    rows = [labels | row for (labels, _), row in zip(batch, figures, strict=True)]
    return [row | {"per_element": round(row["path"] / row["elements"], 1)} for row in rows]


if __name__ == "__main__":
    RECORDED = {target: record(target) for target in sys.argv[1:]}
    tasks = [(target, first) for target, launches in RECORDED.items() for first in range(0, len(launches), BATCH)]
    with multiprocessing.get_context("fork").Pool() as pool:
        for rows in pool.imap_unordered(work, tasks):
            for row in rows:
                print(json.dumps(row), flush=True)
