"""Integer convolutions and networks, beside float32 and int8."""

PART = "integer"


def test_integer(compete, case, contender):
    compete(case, contender)
