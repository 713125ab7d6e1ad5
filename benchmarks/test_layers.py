"""Throughput of quantized layers beside float32 and bfloat16."""

PART = "layers"


def test_layers(compete, case, contender):
    compete(case, contender)
