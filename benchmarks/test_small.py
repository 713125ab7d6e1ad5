"""Calls on small tensors."""

PART = "small"


def test_small(compete, case, contender):
    compete(case, contender)
