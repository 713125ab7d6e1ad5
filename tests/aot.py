"""Compiles the Triton kernels ahead of time, without a GPU, and reads what the compiler made of them.

``python tests/aot.py sm_90`` runs every launcher of :mod:`adq.backends.cuda` on small CPU tensors with the
launch itself replaced by a recorder, compiles each recorded launch for the target as the runtime would
(same constants, options and pointer alignment), and prints one JSON line a kernel. Needs Triton's
compiler, so it must not run under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adq.backends import cuda

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
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float64: "*fp64",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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


def _nvidia(compiled) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", "--dump-sass", cubin.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", dump))
    code = _sass(dump)
    wide = [i for i, _, _ in code if re.search(r"(LDG|STG)\.E\S*\.128", i)]
    return {
        "registers": int(usage["REG"]),
        "spills": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared": int(usage["SHARED"]),
        "wide_loads": sum("LDG" in i for i in wide),
        "wide_stores": sum("STG" in i for i in wide),
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
        "path": _hot_path(code, r"(global|buffer)_(load|store)_dwordx4" if wide else r"(global|buffer)_load"),
        "total": len(code),
    }


def compile_launch(target: GPUTarget, kernel, args, constants, options) -> dict:
    """Compile one recorded launch as the runtime would and measure it."""
    signature, constexprs, attributes = {}, dict(constants), {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if value is None:
            constexprs[name] = None
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    options = cuda.launch_options(target.backend == "hip", **options)
    compiled = triton.compile(ASTSource(kernel, signature, constexprs, attributes), target=target, options=options)
    figures = _nvidia(compiled) if target.backend == "cuda" else _amd(compiled)
    return {"fused": compiled.asm.get("ptx", "").count("fma."), **figures}


class Recorder:
    """Stands in for :func:`adq.backends.cuda._launch`."""

    def __init__(self):
        self.launches = []

    def __call__(self, kernel, programs, *args, block=False, **constants):
        self.launches.append((kernel, args, constants, {"block": block}))


BITS = {
    "sm_90": {torch.float32: (1, 2, 3, 4, 7, 8), torch.bfloat16: (2, 3, 4, 8), torch.float16: (3,)},
    "sm_80": {torch.float32: (2, 4, 8), torch.bfloat16: (3, 4)},
    "gfx942": {torch.float32: (2, 4, 8), torch.bfloat16: (3, 4)},
}
"""Bit-widths to compile: on one target all those whose code differs (above four bits that is the number of
probes of a search, and 7 stands for the symmetric codebooks), elsewhere the ends of the range."""


def cases(target: str):
    """(operation, dtype, size, call) of every launcher of the product; size is K, n or the bits of a code."""
    one = torch.ones(1)
    for dtype, widths in BITS[target].items():
        name = str(dtype).removeprefix("torch.")
        x = torch.zeros(4096, dtype=dtype)
        for bits in widths:
            levels, steps = 2**bits - (bits == 7), 2**bits - 1
            table = torch.zeros(levels), torch.zeros(levels - 1)
            yield "lookup", name, levels, partial(cuda.codebook_lookup, x, *table, False)
            yield "lookup with codes", name, levels, partial(cuda.codebook_lookup, x, *table, True)
            yield "statistics", name, levels, partial(cuda.codebook_statistics, x, table[1])
            if levels <= cuda.REGISTER_LEVELS:
                yield "both", name, levels, partial(cuda.codebook_lookup_statistics, x, *table, True)
            kinds = {"forward": torch.ones(steps), **({"uniform": one} if bits == 8 else {})}
            for kind, interval in kinds.items():
                arguments = (x, one, interval, one, one, one, steps)
                back = "backward" if kind == "forward" else "uniform backward"
                yield kind, name, steps, partial(cuda.threshold_quantize, *arguments)
                yield back, name, steps, partial(cuda.threshold_quantize_backward, x, *arguments)
    for bits in range(1, 9) if target == "sm_90" else (3, 4, 8):
        codes, packed = torch.zeros(8192, dtype=torch.uint8), torch.zeros(1024 * bits, dtype=torch.uint8)
        yield "pack", "uint8", bits, partial(cuda.pack_bits, codes, bits)
        yield "unpack", "uint8", bits, partial(cuda.unpack_bits, packed, bits, 8192)


def main(target: str) -> None:
    cuda.WARP = cuda.PRODUCT_SIZE = TARGETS[target].warp_size
    recorder = cuda._launch = Recorder()
    done = set()
    for operation, dtype, size, call in cases(target):
        recorder.launches.clear()
        call()
        for kernel, args, constants, options in recorder.launches:
            key = (kernel.__name__, str([getattr(a, "dtype", a is None) for a in args]), str(constants))
            if key in done:
                continue
            done.add(key)
            elements = 16 if operation.endswith("pack") else constants.get("VECTOR", 1)
            labels = {"operation": operation, "dtype": dtype, "size": size, "kernel": kernel.__name__}
            figures = compile_launch(TARGETS[target], kernel, args, constants, options)
            figures["per_element"] = round(figures["path"] / elements, 1)
            print(json.dumps(labels | figures), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
