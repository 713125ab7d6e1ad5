"""A training step in 1, 2 and 4 processes, quantized beside float."""

PART = "distributed"


def test_distributed(compete, case, contender):
    compete(case, contender)
