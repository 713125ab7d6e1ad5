"""The cases of :mod:`adq.bench` under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``.

Options: ``--bench-device cpu|cuda`` and ``--bench-quick``, which runs everything at tiny sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from adq.bench.case import COPY, Call, Case, Setting, full_setting, quick_setting, ratio
from adq.bench.data import copy_of
from adq.bench.environment import environment
from adq.bench.run import PARTS, clock_of, run_checks, start
from adq.bench.timing import race


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-device", choices=("cpu", "cuda"), help="Default: cuda where there is one.")
    parser.addoption("--bench-quick", action="store_true", help="Tiny sizes: shows that everything runs.")


def _setting(config: pytest.Config) -> Setting:
    device = config.getoption("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu")
    make = quick_setting if config.getoption("--bench-quick") else full_setting
    return make(torch.device(device))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark for each contender of each case of the module's ``PART``."""
    if "contender" in metafunc.fixturenames:
        cases = PARTS[metafunc.module.PART](_setting(metafunc.config))
        pairs = [(case, name) for case in cases for name in case.contenders]
        ids = [f"{case.name}: {name}" for case, name in pairs]
        metafunc.parametrize(("case", "contender"), pairs, ids=ids)
    elif "case" in metafunc.fixturenames:
        cases = list(PARTS[metafunc.module.PART](_setting(metafunc.config)))
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.update(environment(_setting(config).device))


@pytest.fixture(scope="session")
def setting(pytestconfig: pytest.Config) -> Setting:
    """Device and sizes."""
    return _setting(pytestconfig)


@pytest.fixture(scope="session", autouse=True)
def checked(setting: Setting) -> None:
    """Nothing is timed before it has been compared with the reference."""
    run_checks(setting, print)


@pytest.fixture
def compete(benchmark, setting: Setting) -> Callable[[Case, str], float | None]:
    """``compete(case, contender)``: time one contender; returns its share of the copy's bandwidth, where it has one."""

    def run(case: Case, contender: str) -> float | None:
        data = case.data()
        calls, absent = start(replace(case, contenders={contender: case.contenders[contender]}), data)
        if absent and absent[0].failed:
            pytest.fail(f"{contender}: {absent[0].reason}")
        if absent:
            pytest.skip(f"{contender} did not run: {absent[0].reason}")
        call = calls[contender]
        benchmark.group = case.name
        seconds = setting.seconds if case.seconds is None else case.seconds
        rounds = 1 if case.cold else _rounds(case, setting, call, seconds)
        benchmark.pedantic((lambda: (call(), torch.cuda.synchronize())) if setting.cuda else call, rounds=rounds)
        if benchmark.stats:
            _describe(benchmark, case)
        if not case.bytes_moved or contender == COPY:
            return None
        calls |= {COPY: copy_of(case.bytes_moved, setting)[COPY](None)}
        samples, _ = race(calls, clock_of(case, setting), setting.rounds, seconds, case.cold)
        share = ratio(samples[COPY], samples[contender])
        benchmark.extra_info["share_of_copy"] = share
        return share

    return run


def _rounds(case: Case, setting: Setting, call: Call, seconds: float) -> int:
    (ms,) = clock_of(case, setting).round([call])
    return max(1, min(setting.rounds, int(1e3 * seconds / ms)))


def _describe(benchmark, case: Case) -> None:
    """Put bandwidth and throughput beside pytest-benchmark's own figures."""
    seconds = benchmark.stats.stats.median / case.calls
    benchmark.extra_info["seconds_a_call"] = seconds
    if case.bytes_moved:
        benchmark.extra_info["GB/s"] = case.bytes_moved / seconds / 1e9
    if case.items:
        benchmark.extra_info[f"{case.item}_a_second"] = case.items / seconds
