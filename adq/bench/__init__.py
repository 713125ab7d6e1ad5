"""Benchmarks: every operator beside a copy of the same bytes and beside what a user would otherwise run.

``adq bench`` and ``pytest benchmarks/ --benchmark-only`` run the same cases. A case
(:class:`adq.bench.case.Case`) is a list of contenders over the same data, timed in interleaved rounds, and the
targets that their ratios must meet.
"""
