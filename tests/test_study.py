"""``adq sensitivity --study`` on the digits: its summary numbers recomputed from its raw ones, and what it refuses."""

import itertools
import json
import math
import re
from statistics import fmean, median

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import adq
from adq.config import dump_yaml, load_yaml, to_dict
from adq.convert import quantizers_enabled
from adq.sensitivity import SensitivityTable
from adq.store import write_text

pytest.importorskip("accelerate", reason="adq train needs the extra 'train'")
pytest.importorskip("sklearn", reason="the digits need scikit-learn")

from scipy.stats import kendalltau, pearsonr, spearmanr
from typer.testing import CliRunner

from adq.train.cli import app
from adq.train.config import resolve
from adq.train.data import build_data
from adq.train.study import Subject, correlations

ESTIMATORS = ["loss", "fisher", "hessian", "true_fisher", "kl"]
SMALL = ["allocation.batches=1", "study.images=150", "study.repeats=3", "study.random=3", "study.steps=2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A digits network after two epochs."""
    torch.manual_seed(0)
    model = adq.create_model("digits_cnn", 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for images, target in build_data(resolve("digits", []).data).train:
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_file(model.state_dict(), path)
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["sensitivity", *map(str, arguments)])


def sets(assignments):
    return [word for assignment in assignments for word in ("--set", assignment)]


@pytest.fixture(scope="module")
def studied(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    outcome = run("--weights", weights, "--study", folder, *sets(SMALL))
    assert outcome.exit_code == 0, outcome.output
    return folder, json.loads((folder / "study.json").read_text()), outcome.output


def test_the_folder_is_complete(studied):
    folder, result, text = studied
    assert sorted(path.name for path in folder.iterdir()) == [
        "allocations.png", "heatmaps.png", "scatter.png", "study.json", "study.md",
    ]  # fmt: skip
    assert all((folder / f"{n}.png").read_bytes()[:4] == b"\x89PNG" for n in ("allocations", "heatmaps", "scatter"))
    assert (folder / "study.md").read_text() in text
    assert all(f"| `{name}` |" in text for name in ESTIMATORS)
    assert list(result["estimators"]) == ESTIMATORS
    assert (result["images"], result["draws"]) == (150, {"repeats": 3, "images": 64})
    assert result["float"]["top1"] > 80


def test_the_correlations_are_those_of_the_raw_numbers(studied):
    _, result, _ = studied
    pairs = [(name, bits) for name in result["layers"] for bits in map(str, result["widths"])]
    for estimator in result["estimators"].values():
        for scores, found in zip(estimator["scores"], estimator["correlations"], strict=True):
            for target in ("loss", "accuracy", "kl"):
                for group in ("all", "2", "3", "4"):
                    chosen = [(name, bits) for name, bits in pairs if group in ("all", bits)]
                    a = [scores[name][bits] for name, bits in chosen]
                    b = [result["truth"][name][bits][target] for name, bits in chosen]
                    got = found[target][group]
                    if len(set(b)) > 1:
                        assert got["spearman"] == pytest.approx(spearmanr(a, b)[0])
                        assert got["kendall"] == pytest.approx(kendalltau(a, b)[0])
                    logs = [(math.log(x), math.log(y)) for x, y in zip(a, b, strict=True) if x > 0 and y > 0]
                    if len(logs) > 2 and len({y for _, y in logs}) > 1:
                        assert got["log_pearson"] == pytest.approx(pearsonr(*zip(*logs, strict=True))[0])


def test_stability_and_cost_are_those_of_the_raw_numbers(studied):
    _, result, _ = studied
    for estimator in result["estimators"].values():
        flat = [[score for row in scores.values() for score in row.values()] for scores in estimator["scores"]]
        pairs = list(itertools.combinations(range(3), 2))
        assert estimator["stability"]["spearman"] == pytest.approx(
            fmean(spearmanr(flat[i], flat[j])[0] for i, j in pairs)
        )
        bits = [list(allocation.values()) for allocation in estimator["allocations"]]
        changed = [sum(x != y for x, y in zip(bits[i], bits[j], strict=True)) for i, j in pairs]
        assert estimator["stability"]["changed_layers"] == pytest.approx(fmean(changed))
        share = 100 * median(estimator["seconds"]) / result["epoch"]["seconds"]
        assert estimator["percent_of_epoch"] == pytest.approx(share)
    assert result["epoch"]["seconds"] == pytest.approx(result["epoch"]["step_seconds"] * result["epoch"]["steps"])
    assert result["epoch"]["steps"] == 1437 // 64


def test_whole_allocations_meet_the_budget_and_sum_their_layers_scores(studied):
    _, result, _ = studied
    points = {point["name"]: point for point in result["additivity"]["points"]}
    names = ["truth", *ESTIMATORS]
    assert sorted(points) == sorted(
        [*names, *(f"{name}, reversed" for name in names), *(f"random {i}" for i in (1, 2, 3))]
    )
    for point in points.values():
        free = {name: bits for name, bits in point["bits"].items() if name in result["layers"]}
        for name, total in point["sums"].items():
            scores = (
                {n: {b: rise["loss"] for b, rise in row.items()} for n, row in result["truth"].items()}
                if name == "truth"
                else result["estimators"][name]["scores"][0]
            )
            assert total == pytest.approx(sum(scores[n][str(b)] for n, b in free.items()))
    distinct = {tuple(point["bits"].items()): point for point in points.values()}.values()
    assert result["additivity"]["distinct"] == len(distinct) < len(points)
    for name in names:
        sums = [point["sums"][name] for point in distinct]
        for kind, found in result["additivity"]["spearman"].items():
            actual = [point[kind]["loss"] for point in distinct]
            assert found[name] == pytest.approx(spearmanr(sums, actual)[0])
        assert name == "truth" or points[name]["bits"] == result["estimators"][name]["allocations"][0]


def test_the_truth_is_the_rise_on_held_out_images(weights, studied):
    """Another way to it: the estimator ``loss`` on the same images, as one batch."""
    _, result, _ = studied
    config = resolve("digits", [{"model": {"weights": str(weights)}, "study": {"images": 150, "repeats": 2}}])
    subject = Subject.build(config)
    images = torch.cat([x for x, _ in subject.held_out]), torch.cat([y for _, y in subject.held_out])
    assert len(images[1]) == 150
    test = torch.cat([x for x, _ in subject.data.test])
    assert all(bool((image == test).flatten(1).all(1).any()) for image in images[0])
    table: SensitivityTable = adq.sensitivity(subject.model, [images], F.cross_entropy, (2, 3, 4), "loss")
    for layer in table.layers:
        for bits, score in layer.scores.items() if not layer.pinned else ():
            rise = result["truth"][layer.name][str(bits)]
            assert rise["loss"] == pytest.approx(score, abs=1e-5)
            assert (rise["even"] + rise["odd"]) / 2 == pytest.approx(rise["loss"])


def test_the_draws_are_disjoint(weights):
    config = resolve("digits", [{"model": {"weights": str(weights)}, "allocation": {"batches": 2}}])
    drawn = torch.cat([images for batches in Subject.build(config).draws for images, _ in batches])
    assert len(drawn) == 4 * 2 * 64
    assert len(np.unique(drawn.flatten(1).numpy(), axis=0)) > len(drawn) - 3  # the digits hold a few twins


def test_correlations_of_ties_and_few_pairs_are_none():
    scores = {name: {2: float(i), 3: 1.0} for i, name in enumerate("abc")}
    found = correlations(scores, {name: {2: -1.0 - i, 3: 2.0} for i, name in enumerate("abc")})
    assert found["2"] == {"spearman": -1.0, "kendall": -1.0, "log_pearson": None}
    assert found["3"] == {"spearman": None, "kendall": None, "log_pearson": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--estimator", "kl"], "it takes no --estimator, --output or --allocation"),
        (["--output", "table.yaml"], "it takes no --estimator, --output or --allocation"),
        (sets(["study.repeats=1"]), "study.repeats must be at least 2, got 1"),
        (sets(["study.images=1"]), "study.images must be at least 2, got 1"),
        (
            sets(["quantization.overrides={'re:.*': {weight: {bits: 3}}}", "allocation.batches=1"]),
            "the configuration gives each layer its own",
        ),
        (sets(["allocation.weight_bits=1.0"]), "no allocation meets the budget of 1.0"),
        (sets(["study.image=5"]), "unknown key 'image' in study; did you mean 'images'"),
        (sets(["allocation.weight_bits=null"]), "give it a budget, allocation.weight_bits"),
        (sets(["allocation.file=bits.yaml"]), "and no allocation.file"),
        (sets(["allocation.batches=9"]), "4 disjoint draws of 9 batches need 2304 training images, there are 1437"),
        (sets(["model.weights=null"]), "needs trained float weights: --weights FILE"),
    ],
)
def test_bad_options_are_refused(weights, tmp_path, arguments, message):
    outcome = run("--weights", weights, "--study", tmp_path / "out", *arguments)
    assert outcome.exit_code == 1
    assert message in " ".join(outcome.output.split())
    assert not (tmp_path / "out").exists()


# ---- runs that were trained --------------------------------------------------------------------------


def finished(folder, bits, top1, found=None, **changes):
    """A run folder as a finished run leaves it; ``found`` goes into its result."""
    folder.mkdir(parents=True)
    config = resolve("digits", [{"output": str(folder), **changes}])
    write_text(folder / "config.yaml", dump_yaml(to_dict(config)))
    write_text(folder / "allocation.yaml", dump_yaml(adq.Allocation(bits, 3.0, 3.1).to_dict()))
    result = {"model": "digits_cnn", "data": "digits", "average_bits_quantized": fmean(bits.values())}
    result |= {"float_top1": 95.0, "calibrated_top1": top1 - 2.0, "quantized_top1": top1, **(found or {})}
    write_text(folder / "result.json", json.dumps(result))
    return folder


def add(study, *runs):
    return run("--study", study, *(word for path in runs for word in ("--trained", path)))


@pytest.fixture
def known(tmp_path):
    """A study of two free layers, whose scores are known, and four finished runs of three allocations."""
    scores = {"a": {2: 4.0, 3: 1.0, 4: 0.5}, "b": {2: 2.0, 3: 1.5, 4: 0.25}}
    other = {"a": {2: 1.0, 3: 3.0, 4: 2.0}, "b": {2: 1.0, 3: 1.0, 4: 1.0}}
    truth = {n: {b: dict.fromkeys(TARGETS_AND_HALVES, v) for b, v in by.items()} for n, by in scores.items()}
    study = {
        **{"model": "digits_cnn", "data": "digits", "images": 10, "budget": 3.0, "widths": [2, 3, 4]},
        **{"layers": {"a": 1, "b": 1}, "truth": truth, "draws": {"repeats": 1, "images": 5}},
        "float": {"loss": 0.1, "top1": 95.0},
        "epoch": {"steps": 1, "step_seconds": 1.0, "seconds": 1.0},
        "estimators": {
            "fisher": {
                "seconds": [1.0],
                "percent_of_epoch": 1.0,
                "scores": [other],
                "correlations": [{t: correlations(other, scores) for t in ("loss", "accuracy", "kl")}],
                "stability": {"spearman": None, "changed_layers": None},
            }
        },
        "additivity": {"points": [], "spearman": {"rise": {"truth": 1.0}, "corrected": {"truth": 1.0}}},
    }
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text(json.dumps(study))
    runs = [
        finished(tmp_path / "one", {"a": 4, "b": 2}, 94.0),
        finished(tmp_path / "two", {"a": 2, "b": 4}, 90.0, seed=1),
        finished(tmp_path / "three", {"a": 3, "b": 3}, 92.0, allocation={"order": "random"}),
        finished(tmp_path / "four", {"a": 3, "b": 3}, 93.0, seed=2),
    ]
    return tmp_path / "study", runs


TARGETS_AND_HALVES = ("loss", "accuracy", "kl", "even", "odd", "error")


def test_runs_that_were_trained_are_ranked(known):
    study, runs = known
    outcome = add(study, *runs)
    assert outcome.exit_code == 0, outcome.output
    found = json.loads((study / "study.json").read_text())["trained"]
    points = {tuple(point["runs"]): point for point in found["points"]}
    assert list(points) == [("one",), ("three", "four"), ("two",)]
    assert points["three", "four"]["falls"] == {"calibrated": 4.5, "trained": 2.5}
    assert {names: point["sums"] for names, point in points.items()} == {
        ("one",): {"truth": 2.5, "fisher": 3.0},
        ("three", "four"): {"truth": 2.5, "fisher": 4.0},
        ("two",): {"truth": 4.25, "fisher": 2.0},
    }
    falls = [1.0, 2.5, 5.0]
    assert found["spearman"]["trained"]["truth"] == pytest.approx(spearmanr([2.5, 2.5, 4.25], falls)[0])
    assert found["spearman"]["trained"]["fisher"] == pytest.approx(spearmanr([3.0, 4.0, 2.0], falls)[0])
    assert found["stages"] == 1.0
    assert "three, four" in (study / "study.md").read_text()
    assert (study / "trained.png").stat().st_size > 1000
    assert add(study, *runs).exit_code == 0  # again: in place of what was there
    assert json.loads((study / "study.json").read_text())["trained"] == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, runs: runs[:2], "three of one budget, got 2 with 3.00, 3.00 bits"),
        (lambda f, runs: [*runs, finished(f / "r", {"a": 4, "b": 4}, 94.0)], "got 4 with 3.00, 3.00, 3.00, 4.00"),
        (lambda f, runs: [*runs, finished(f / "r", {"a": 8, "b": 2}, 94.0)], "no scores for .*r: layer 'a' of 8 bits"),
        (lambda f, runs: [*runs, finished(f / "r", {"a": 4}, 94.0)], "no scores for .*r: layer 'b' of None bits"),
        (
            lambda f, runs: [*runs, finished(f / "r", {"a": 4, "b": 2}, 94.0, qat={"lr": 0.5})],
            "r was trained with another qat.lr than .*one",
        ),
        (
            lambda f, runs: [*runs, finished(f / "r", {"a": 4, "b": 2}, 94.0, engine={"accumulation": 4})],
            "r was trained with another engine.accumulation than .*one",
        ),
        (
            lambda f, runs: [*runs, finished(f / "r", {"a": 4, "b": 2}, 94.0, {"float_top1": 94.0})],
            "r was trained with another float network than .*one",
        ),
        (
            lambda f, runs: [finished(f / f"r{i}", {"a": 4, "b": i}, 94.0, {"data": "letters"}) for i in (2, 3, 4)],
            "no scores for .*r2: the data 'letters', not 'digits'",
        ),
        (lambda f, runs: [*runs, f / "study" / ".." / "one"], "a run counts once, and .*one and .*one are one folder"),
        (lambda f, runs: [*runs, f], "holds no finished run: there is no result.json"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(known, change, message):
    study, runs = known
    before = (study / "study.json").read_text()
    outcome = add(study, *change(study.parent, runs))
    assert outcome.exit_code == 1
    assert re.search(message, " ".join(outcome.output.split())), outcome.output
    assert (study / "study.json").read_text() == before


def test_a_study_that_names_its_weights_takes_runs_of_these_alone(known):
    study, _ = known
    content = json.loads((study / "study.json").read_text())
    (study / "study.json").write_text(json.dumps({**content, "weights": "here/net.safetensors"}))
    bits = ({"a": 4, "b": 2}, {"a": 2, "b": 4}, {"a": 3, "b": 3})
    for name in ("net", "other"):
        runs = [
            finished(study.parent / name / f"{i}", b, 94.0, model={"weights": f"there/{name}.safetensors"})
            for i, b in enumerate(bits)
        ]
        outcome = add(study, *runs)
        assert outcome.exit_code == (name == "other"), outcome.output
    assert "float weights there/other.safetensors, not here/net.safetensors" in " ".join(outcome.output.split())


def test_runs_of_one_name_are_told_apart(known, monkeypatch):
    study, _ = known
    runs = [
        finished(study.parent / name / "run", {"a": 4 - i, "b": 2 + i}, 94.0, engine={"mixed_precision": precision})
        for i, (name, precision) in enumerate((("x", "no"), ("y", "bf16"), ("z", "no")))
    ]
    monkeypatch.chdir(runs[0])
    outcome = add(study, ".", *runs[1:])
    assert outcome.exit_code == 0, outcome.output
    found = json.loads((study / "study.json").read_text())["trained"]
    assert sorted(point["runs"] for point in found["points"]) == [["x/run"], ["y/run"], ["z/run"]]
    assert "trained in different precisions: bf16, no." in (study / "study.md").read_text()


def test_trained_runs_need_a_study_and_nothing_else(known, tmp_path):
    study, runs = known
    assert "takes --study DIR and nothing else" in run("--trained", runs[0]).output
    assert "takes --study DIR and nothing else" in run("--study", study, "--trained", runs[0], "--root", "x").output
    assert "No such file" in add(tmp_path / "none", *runs).output


def test_what_cannot_be_written_is_said_before_anything_is_measured(weights, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("adq.train.score.sensitivity", None)
    monkeypatch.setattr(Subject, "measure", None)
    common = "--weights", weights, *sets(SMALL)
    for options in (
        ["--output", tmp_path],
        ["--allocation", tmp_path],
        ["--output", tmp_path / "file" / "table.yaml"],
        ["--study", tmp_path / "file"],
    ):
        outcome = run(*common, *options)
        assert isinstance(outcome.exception, SystemExit) and "error: " in outcome.output, options


def test_no_table_is_lost(weights, tmp_path, monkeypatch):
    common = "--weights", weights, "--set", "allocation.batches=1"
    monkeypatch.setattr("adq.train.score.allocate", None)
    assert "estimator: fisher" in run(*common).output

    def full(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr("adq.store.write_text", full)
    outcome = run(*common, "--output", tmp_path / "table.yaml")
    assert outcome.exit_code == 1
    assert "estimator: fisher" in outcome.output and "error: the disk is full" in outcome.output


def test_scored_is_the_network_in_the_memory_format_of_training(weights, monkeypatch):
    seen = []

    def look(model, *arguments):
        seen.append(model.conv2.weight.is_contiguous(memory_format=torch.channels_last))
        raise ValueError

    monkeypatch.setattr("adq.train.score.sensitivity", look)
    for wanted in ("false", "true"):
        run("--weights", weights, "--set", f"engine.channels_last={wanted}")
    assert seen == [False, True]


def test_an_allocation_needs_a_budget(weights, tmp_path):
    outcome = run("--weights", weights, "--allocation", tmp_path / "a.yaml", *sets(["allocation.weight_bits=null"]))
    assert outcome.exit_code == 1 and "an allocation needs a budget: --weight-bits" in outcome.output


def test_what_cannot_be_allocated_is_said_before_anything_is_scored(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("adq.train.score.sensitivity", None)
    for change, message in (
        ("allocation.weight_bits=1.5", "no allocation meets the budget of 1.5000 average weight bits"),
        ("quantization.overrides={conv9: null}", "overrides match no layer: conv9"),
        ("allocation.file=bits.yaml", "it takes no allocation.file"),
    ):
        outcome = run("--weights", weights, "--set", change)
        assert outcome.exit_code == 1 and message in outcome.output


def test_the_table_is_written_before_bits_are_allocated(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("adq.train.score.allocate", None)
    outcome = run("--weights", weights, "--output", tmp_path / "table.yaml", "--set", "allocation.batches=1")
    assert outcome.exception is not None and SensitivityTable.from_dict(load_yaml(tmp_path / "table.yaml")).layers


def test_the_start_is_scored_where_there_is_one(weights, tmp_path):
    config = resolve("digits", [])
    data = build_data(config.data)

    def network():
        model = adq.create_model("digits_cnn", 10)
        adq.load_float_weights(model, weights)
        return model

    start = adq.calibrate_(adq.quantize_(network(), config.quantization), [next(iter(data.calibration))])
    start.conv2.weight.data.mul_(-1.0)
    adq.save(start, tmp_path / "start.safetensors")
    common = "--weights", weights, "--output", tmp_path / "table.yaml", "--set", "allocation.batches=1"
    found = []
    file = tmp_path / "start.safetensors"
    for arguments in ([], ["--set", f"start={file}"], ["--set", f"start=[{file}, {file}]"]):
        outcome = run(*common, *arguments)
        assert outcome.exit_code == 0, outcome.output
        found.append(SensitivityTable.from_dict(load_yaml(tmp_path / "table.yaml")))
    model = adq.start_from_(adq.quantize_(network(), config.quantization), start)
    batches = list(itertools.islice(data.calibration, 1))
    assert found[1] == adq.sensitivity(model, batches, F.cross_entropy, config.allocation.bits) != found[0]
    data = build_data(config.data)
    data.sampler.resume(0, 0)
    with quantizers_enabled(model, weights=False, activations=None):  # of the mean: over training batches
        adq.reestimate_batch_norm_(model, (x for x, _ in itertools.islice(data.train, len(data.calibration))))
    assert found[2] == adq.sensitivity(model, batches, F.cross_entropy, config.allocation.bits) != found[1]
    for arguments, message in (
        (common, "no such file: missing"),
        (["--weights", weights, "--study", tmp_path], "no start"),
    ):
        outcome = run(*arguments, "--set", "start=missing")
        assert outcome.exit_code == 1
        assert message in outcome.output
