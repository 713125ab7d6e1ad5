"""The prediction for ImageNet: the committed page is what the code writes, and the formula does what it says."""

from __future__ import annotations

import json
import runpy
from dataclasses import asdict, replace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scale.py"
FOLDER = SCRIPT.parent / "results" / "scale"


@pytest.fixture(scope="module")
def scale():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def measured(scale):
    return scale["Measured"](**json.loads((FOLDER / "measured.json").read_text()))


def test_the_page_is_what_the_code_writes(scale, measured):
    assumed = scale["Assumptions"]()
    assert (FOLDER / "scale.md").read_text() == scale["page"](measured, assumed)
    rows = [asdict(row) for row in scale["predictions"](measured, assumed)]
    assert json.loads((FOLDER / "scale.json").read_text())["predictions"] == rows


def test_a_row_by_hand(scale, measured):
    assumed = replace(scale["Assumptions"](), yardstick_rate=1000.0, epochs=10.0, test_images=0.0, price=3.0)
    row = scale["predict"](measured, assumed, 1, 100, "resized")
    per_image = measured.student_macs / measured.yardstick_macs / 1000.0
    assert row.student == pytest.approx(100 * per_image)
    assert row.teacher == pytest.approx(100 * measured.teacher_macs / measured.yardstick_macs / 3000.0)
    moved = 10 * measured.quantized_elements * 100 + 12 * measured.student_parameters
    assert row.adq == pytest.approx(moved / (assumed.memory_share * assumed.memory_rate))
    assert (row.all_reduce, row.exposed, row.bound) == (0.0, 0.0, "compute")
    assert row.step == pytest.approx(row.student + row.teacher + row.adq)
    assert row.hours == pytest.approx(10 * (1_281_167 // 100) * row.step / 3600)
    assert row.dollars == pytest.approx(3 * row.hours)


def test_what_bounds_a_step(scale, measured):
    predict, assumed = scale["predict"], scale["Assumptions"]()
    assert predict(measured, replace(assumed, cores=1.0), 1, 256, "original").bound == "data loading"
    assert predict(measured, replace(assumed, launch=1e-3), 1, 256, "original").bound == "launches"
    slow = predict(measured, replace(assumed, network_bus=1e8), 64, 256, "original")
    assert slow.bound == "all-reduce"
    ring = 2 * 63 / 64 * 4 * measured.student_parameters / 1e8 + 2 * 63 * assumed.hop * 2
    assert slow.all_reduce == pytest.approx(ring)
    assert slow.exposed == pytest.approx(ring - slow.student * 2 / 3)


def test_counts_are_those_of_the_networks(scale, measured):
    """What does not depend on the machine is counted again; published for ResNet-18: 1.81 GMACs, 11.7 M parameters."""
    assert scale["_macs"]("resnet18") == measured.student_macs
    assert measured.student_macs == pytest.approx(1.81e9, rel=0.01)
    model = scale["_student"](True)
    assert scale["_quantized_elements"](model) == measured.quantized_elements
    assert sum(p.numel() for name, p in model.named_parameters() if "quantizer" not in name) == 11_689_512
