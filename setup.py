"""Builds adq._C, the C++ kernels: no torch, one object per instruction set, OpenMP where there is one.

The extension is optional. Where it cannot be compiled the install still succeeds, and ``import adq``
says which implementation serves instead. Everything but the code is declared in pyproject.toml.

ADQ_SANITIZE=address builds the kernels for AddressSanitizer (GCC, Clang); see CONTRIBUTING.md.
"""

from __future__ import annotations

import itertools
import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11 import get_include
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, LinkError, PlatformError

# The slowest first, so that the others compile meanwhile.
SOURCES = (
    "csrc/kernels_baseline.cpp",
    "csrc/integer_baseline.cpp",
    "csrc/bindings.cpp",
    "csrc/adq.cpp",
    "csrc/foreach.cpp",
    "csrc/dispatch.cpp",
    "csrc/tensors.cpp",
    "csrc/integer.cpp",
    "csrc/integer_taps.cpp",
    "csrc/isa.cpp",
    "csrc/pool.cpp",
)
AVX2 = ["-mavx2", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
ISA_FLAGS = {
    "avx2": AVX2,
    "avx2vnni": [*AVX2, "-mavxvnni"],
    "avx512": AVX512,
    "avx512vnni": [*AVX512, "-mavx512vnni"],
}
ISA_SOURCES = {isa: [f"csrc/integer_{isa}.cpp"] for isa in ISA_FLAGS}
for _isa in ("avx2", "avx512"):  # VNNI serves the integer kernels alone
    ISA_SOURCES[_isa].insert(0, f"csrc/kernels_{_isa}.cpp")
OPENMP_PROGRAM = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
EMPTY_PROGRAM = "int main() { return 0; }\n"
SANITIZER = os.environ.get("ADQ_SANITIZE", "")


class BuildKernels(build_ext):
    """build_ext with flags per source file, after probes of what the compiler can do."""

    def build_extension(self, ext: Extension) -> None:
        openmp = self._openmp_flags()
        isas = self._isas()
        flags = self._common_flags() + openmp
        flags += [f"-DADQ_HAVE_{isa.upper()}" for isa in isas]
        jobs = {source: flags + isa_flags for isa, isa_flags in isas.items() for source in ISA_SOURCES[isa]}
        jobs |= dict.fromkeys(SOURCES, flags)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(self._compile, jobs, jobs.values()))
        strip = ["-Wl,-s"] if sys.platform == "linux" and not SANITIZER else []
        self.compiler.link_shared_object(
            [path for paths in objects for path in paths],
            self.get_ext_fullpath(ext.name),
            libraries=self.get_libraries(ext),
            extra_postargs=[] if self._msvc() else openmp + strip + self._sanitizer_flags(),
            export_symbols=self.get_export_symbols(ext),
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def _compile(self, source: str, flags: list[str]) -> list[str]:
        return self.compiler.compile(
            [source], output_dir=self.build_temp, include_dirs=[get_include()], extra_postargs=flags
        )

    def _msvc(self) -> bool:
        return self.compiler.compiler_type == "msvc"

    def _common_flags(self) -> list[str]:
        if self._msvc():
            return ["/std:c++17", "/O2", "/EHsc", "/fp:precise"]
        # Contraction would make results depend on whether the instruction set has FMA.
        flags = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
        # The kernels are vectors already; looking for more of them, and debug symbols, double the build's time.
        flags += ["-fno-tree-slp-vectorize", "-Wall", "-Wextra"]
        flags += ["-O1", "-g1", *self._sanitizer_flags()] if SANITIZER else ["-O3", "-g0"]
        # GCC's intrinsics headers leave operands undefined on purpose, and its warning says so at length.
        quiet = ["-Wno-maybe-uninitialized"]
        return flags + (quiet if self._accepts([*quiet, "-Werror"]) else [])

    def _sanitizer_flags(self) -> list[str]:
        return [f"-fsanitize={SANITIZER}", "-fno-omit-frame-pointer"] if SANITIZER else []

    def _openmp_flags(self) -> list[str]:
        flags = ["/openmp"] if self._msvc() else ["-fopenmp"]
        return flags if self._accepts(flags, OPENMP_PROGRAM, link=True) else []

    def _isas(self) -> dict[str, list[str]]:
        if self._msvc() or platform.machine().lower() not in ("x86_64", "amd64"):
            return {}
        return {isa: flags for isa, flags in ISA_FLAGS.items() if self._accepts(flags)}

    def _accepts(self, flags: list[str], program: str = EMPTY_PROGRAM, link: bool = False) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(program)
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
                if link:
                    self.compiler.link_executable(
                        objects, "probe", output_dir=folder, extra_postargs=flags, target_lang="c++"
                    )
            except (CCompilerError, CompileError, ExecError, LinkError, PlatformError):
                return False
        return True


setup(
    packages=[*find_packages(include=("adq", "adq.*")), "adq.kernels"],
    package_dir={"adq": "adq", "adq.kernels": "kernels"},
    ext_modules=[
        Extension(
            "adq._C",
            sources=[*SOURCES, *itertools.chain(*ISA_SOURCES.values())],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"build": {"build_base": f"build/{SANITIZER}"}} if SANITIZER else {},  # not to be taken for the usual build
)
