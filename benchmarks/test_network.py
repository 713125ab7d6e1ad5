"""All the weights of a network at once."""

PART = "network"


def test_network(compete, case, contender):
    compete(case, contender)
