"""A whole training step beside the float network's."""

PART = "step"


def test_step(compete, case, contender):
    compete(case, contender)
