"""Operators on large tensors, beside a copy."""

PART = "operators"


def test_operators(compete, case, contender):
    compete(case, contender)
