"""Operators on large tensors, beside what a user would otherwise run."""

PART = "peers"


def test_peers(compete, case, contender):
    compete(case, contender)
