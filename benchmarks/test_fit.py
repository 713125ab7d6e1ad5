"""Codebook fits beside other packages' k-means."""

PART = "fit"


def test_fit(compete, case, contender):
    compete(case, contender)
