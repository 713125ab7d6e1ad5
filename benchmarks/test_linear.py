"""Linear layers on packed codes, beside float weights."""

PART = "linear"


def test_linear(compete, case, contender):
    compete(case, contender)
