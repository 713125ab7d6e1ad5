"""Each estimator against its definition, computed by a plain loop; and what scoring leaves untouched."""

from __future__ import annotations

import copy
import sys
from collections import UserDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

import adq
from adq import ADQConfig, SensitivityTable, WeightConfig
from adq.batches import batch_size
from adq.codebook import fit
from adq.config import dump_yaml
from adq.sensitivity import LayerCost, reordered

BITS = (2, 3, 5)
ESTIMATORS = ("loss", "fisher", "hessian", "true_fisher", "kl")


def float_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))
    return net.double()  # the oracle's; scored in float32


def scored(**config) -> nn.Sequential:
    return adq.quantize_(float_net().float(), ADQConfig(**config))


def batches(count: int = 3, size: int = 7) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 5, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(count)
    ]


def changes(weight: Tensor, bits: int) -> np.ndarray:
    """dw under a codebook of that width, in float64."""
    fitted = fit(weight.detach().float(), WeightConfig(bits=bits))
    c, scale = fitted.codebook.numpy(), fitted.scale.numpy()
    w = weight.detach().float().numpy()
    code = ((w / scale)[..., None] > np.float32(0.5) * (c[:-1] + c[1:])).sum(-1)
    return (c[code] * scale).astype(np.float64) - w


def by_name(table: SensitivityTable) -> dict[str, dict[int, float]]:
    return {layer.name: layer.scores for layer in table.layers}


# ---- estimators --------------------------------------------------------------------------------------


def test_loss_is_the_rise_with_one_layer_quantized():
    table = adq.sensitivity(scored(), batches(), F.cross_entropy, BITS, "loss", pinned=[])

    def mean_loss(net: nn.Module) -> float:
        return float(np.mean([F.cross_entropy(net(x.double()), y).item() for x, y in batches()]))

    base = mean_loss(float_net())
    for name, scores in by_name(table).items():
        for bits, score in scores.items():
            net = float_net()
            layer = net.get_submodule(name)
            layer.weight.data += torch.from_numpy(changes(layer.weight, bits))
            assert score == pytest.approx(mean_loss(net) - base, abs=2e-6)
    assert list(by_name(table)) == ["0", "2", "4"]
    assert all(list(scores) == list(BITS) for scores in by_name(table).values())
    assert max(scores[2] for scores in by_name(table).values()) > 1e-3


def test_fisher_is_the_weighted_square_of_the_change():
    table = adq.sensitivity(scored(), batches(), F.cross_entropy, BITS, "fisher", pinned=[])
    net = float_net()
    for name, scores in by_name(table).items():
        weight = net.get_submodule(name).weight
        diagonal = 0.0
        for x, y in batches():
            (gradient,) = torch.autograd.grad(F.cross_entropy(net(x.double()), y), weight)
            diagonal = diagonal + len(x) * gradient.numpy() ** 2 / 3
        for bits, score in scores.items():
            assert score == pytest.approx(0.5 * (diagonal * changes(weight, bits) ** 2).sum(), rel=1e-4)
            assert score > 0


def test_fisher_of_single_samples_is_the_mean_over_samples():
    """B times the square of the mean gradient is unbiased for B = 1 only; then any split gives the same."""
    singles = [(x[i : i + 1], y[i : i + 1]) for x, y in batches() for i in range(len(x))]
    table = adq.sensitivity(scored(), singles, F.cross_entropy, (2,), "fisher", pinned=[])
    net = float_net()
    squares = 0.0
    for x, y in singles:
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(x.double()), y), net[2].weight)
        squares = squares + gradient.numpy() ** 2
    expected = 0.5 * (squares / len(singles) * changes(net[2].weight, 2) ** 2).sum()
    assert by_name(table)["2"][2] == pytest.approx(expected, rel=1e-4)


def test_hessian_of_a_quadratic_with_known_trace():
    """loss = 0.5 sum d_j (w x)_j^2 over orthogonal unit inputs: H is diagonal, its trace known, any probe exact."""
    torch.manual_seed(0)
    model = adq.quantize_(nn.Sequential(nn.Linear(4, 3, bias=False)), ADQConfig(activation=None))
    curvature = torch.tensor([1.0, 2.0, 5.0])

    def loss(out: Tensor, _: Tensor) -> Tensor:
        return 0.5 * (curvature * out.square()).sum()

    table = adq.sensitivity(model, [(torch.eye(4), torch.zeros(4))], loss, BITS, "hessian", pinned=[])
    trace = 4 * float(curvature.sum())
    for bits, score in by_name(table)["0"].items():
        expected = 0.5 * trace / 12 * (changes(model[0].weight, bits) ** 2).sum()
        assert score == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("estimator", ["loss", "hessian"])
def test_a_mean_over_samples_however_they_are_cut_into_batches(estimator):
    torch.manual_seed(0)
    model, x = adq.quantize_(nn.Sequential(nn.Linear(4, 3)), ADQConfig(activation=None)), torch.arange(1.0, 5.0).diag()

    def loss(out: Tensor, _: Tensor) -> Tensor:
        return out.square().sum() / len(out)

    tables = [
        adq.sensitivity(model, [(part, part) for part in x.split(size)], loss, (2, 3), estimator, pinned=[])
        for size in (4, 3, 2, 1)
    ]
    for table in tables[1:]:
        assert by_name(table)["0"] == pytest.approx(by_name(tables[0])["0"], rel=1e-4)


@pytest.mark.parametrize("estimator", ["fisher", "true_fisher"])
def test_a_batch_counts_by_its_samples(estimator, monkeypatch):
    monkeypatch.setattr(torch, "multinomial", lambda p, count, generator: p.topk(count).indices)
    (x, y), model = batches(1, 9)[0], scored()
    parts = [(x[:8], y[:8]), (x[8:], y[8:])]
    both, large, small = (
        by_name(adq.sensitivity(model, chosen, F.cross_entropy, (2,), estimator, pinned=[]))["2"][2]
        for chosen in (parts, parts[:1], parts[1:])
    )
    assert both == pytest.approx((8 * large + small) / 9, rel=1e-6)
    assert small != pytest.approx(large, rel=0.1)


def test_hessian_trace_of_a_network(monkeypatch):
    """The estimate of a stochastic trace is near the exact one, from the diagonal of the whole Hessian."""
    monkeypatch.setattr(sys.modules["adq.sensitivity"], "HUTCHINSON_PROBES", 200)
    table = adq.sensitivity(scored(), batches(8), F.cross_entropy, (3,), "hessian", pinned=[])
    net = float_net()

    def loss_of(weight: Tensor) -> Tensor:
        losses = [
            F.cross_entropy(torch.func.functional_call(net, {"0.weight": weight}, (x.double(),)), y)
            for x, y in batches(8)
        ]
        return torch.stack(losses).mean()

    hessian = torch.autograd.functional.hessian(loss_of, net[0].weight.detach())
    trace = hessian.reshape(40, 40).diagonal().sum().item()
    expected = 0.5 * trace / 40 * (changes(net[0].weight, 3) ** 2).sum()
    assert by_name(table)["0"][3] == pytest.approx(expected, rel=0.1)


def test_true_fisher_tends_to_the_exact_gauss_newton_diagonal():
    """Its labels are drawn; over many draws, and batches of seven, it is the mean over samples and all classes."""
    table = adq.sensitivity(scored(), batches() * 300, F.cross_entropy, (2,), "true_fisher", pinned=[])
    net = float_net()
    samples = torch.cat([x for x, _ in batches()]).double()
    for name, scores in by_name(table).items():
        weight = net.get_submodule(name).weight
        diagonal = 0.0
        for x in samples:
            log_p = net(x[None]).log_softmax(1)[0]
            for c in range(3):
                (gradient,) = torch.autograd.grad(log_p[c], weight, retain_graph=True)
                diagonal = diagonal + log_p[c].exp().item() * gradient.numpy() ** 2 / len(samples)
        assert scores[2] == pytest.approx(0.5 * (diagonal * changes(weight, 2) ** 2).sum(), rel=0.1)


def test_kl_is_the_softened_divergence_with_one_layer_quantized():
    uneven = [(x[: 7 - 2 * i], y[: 7 - 2 * i]) for i, (x, y) in enumerate(batches())]
    table = adq.sensitivity(scored(), uneven, F.cross_entropy, BITS, "kl", pinned=[])
    x = torch.cat([x for x, _ in uneven]).double()
    p = (float_net()(x) / 2).softmax(1)
    for name, scores in by_name(table).items():
        for bits, score in scores.items():
            net = float_net()
            layer = net.get_submodule(name)
            layer.weight.data += torch.from_numpy(changes(layer.weight, bits))
            expected = 4 * (p * (p.log() - (net(x) / 2).log_softmax(1))).sum(1).mean().item()
            assert score == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert max(scores[2] for scores in by_name(table).values()) > 1e-3


@pytest.mark.parametrize("estimator", ["true_fisher", "kl"])
def test_estimators_on_logits_use_neither_targets_nor_the_loss(estimator):
    def other(outputs: Tensor, targets: Tensor) -> Tensor:
        raise AssertionError

    one = adq.sensitivity(scored(), batches(), F.cross_entropy, (2,), estimator)
    shifted = [(x, 2 - y) for x, y in batches()]
    assert one == adq.sensitivity(scored(), shifted, other, (2,), estimator)


@pytest.mark.parametrize("estimator", ["true_fisher", "kl"])
@pytest.mark.parametrize(
    ("output", "found"),
    [
        (lambda y: y[:, :, None], r"torch.float32 \[7, 3, 1\]"),
        (lambda y: y[:, 0], r"torch.float32 \[7\]"),
        (lambda y: y.argmax(1, keepdim=True), r"torch.int64 \[7, 1\]"),
        (lambda y: (y,), "tuple"),
    ],
)
def test_estimators_on_logits_refuse_other_outputs(estimator, output, found):
    class Head(nn.Module):
        def forward(self, y: Tensor) -> object:
            return output(y)

    model = nn.Sequential(scored(), Head())
    with pytest.raises(ValueError, match=rf"'kl' and 'true_fisher' need logits, .* \[N, C\].*; got {found}"):
        adq.sensitivity(model, batches(), F.cross_entropy, (2,), estimator, pinned=[])


@pytest.mark.parametrize("estimator", ["true_fisher", "kl"])
def test_logits_that_are_not_finite_are_refused_and_the_weights_come_back(estimator):
    model = scored()
    before, calls = copy.deepcopy(model.state_dict()), []

    def spoil(module: nn.Module, args: object, output: Tensor) -> Tensor:
        calls.append(output)
        return output / 0.0 if len(calls) > 5 or (estimator == "true_fisher" and len(calls) > 2) else output

    model.register_forward_hook(spoil)
    with pytest.raises(ValueError, match="the logits are not finite on a calibration batch"):
        adq.sensitivity(model, batches(), F.cross_entropy, BITS, estimator, pinned=[])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("estimator", ["fisher", "hessian", "true_fisher", "kl"])
def test_a_layer_that_the_loss_does_not_reach_costs_nothing(estimator):
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    said = r"scored 0, never reached by the batches: unused; give batches .* overrides=\{'unused': None\}"
    with pytest.warns(UserWarning, match=said):
        table = adq.sensitivity(adq.quantize_(Part()), batches(), F.cross_entropy, (2,), estimator, pinned=[])
    assert by_name(table)["used"][2] > 0
    assert by_name(table)["unused"] == {2: 0.0}
    assert [layer.macs for layer in table.layers] == [15, 0]


def test_a_loss_without_curvature_has_hessian_scores_of_zero():
    model = adq.quantize_(nn.Sequential(nn.Linear(5, 3)), ADQConfig(activation=None))
    table = adq.sensitivity(model, batches(), lambda out, _: out.mean(), (2,), "hessian", pinned=[])
    assert by_name(table)["0"] == {2: 0.0}


# ---- what stays --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "fails"),
    [*((e, False) for e in ESTIMATORS), *((e, True) for e in ("loss", "fisher", "hessian"))],
)
def test_the_model_is_as_it_was(estimator, fails):
    model = adq.calibrate_(scored(), [x for x, _ in batches()])
    model.train()
    model[3].eval()
    model[2].weight.requires_grad_(False)
    model[4].weight_quantizer.enabled = False
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    calls = []

    def loss(out: Tensor, target: Tensor) -> Tensor:
        calls.append(out)
        assert not model.training
        return F.cross_entropy(out, target) * (float("nan") if fails and len(calls) > 2 else 1.0)

    if fails:
        with pytest.raises(ValueError, match="the loss is nan on a calibration batch"):
            adq.sensitivity(model, batches(), loss, BITS, estimator, pinned=[])
    else:
        adq.sensitivity(model, batches(), loss, BITS, estimator, pinned=[])
    assert [key for key, value in model.state_dict().items() if not torch.equal(before[key], value)] == []
    assert [module.training for module in model.modules()] == flags
    assert [model[i].weight_quantizer.enabled for i in (0, 2, 4)] == [True, True, False]
    assert [model[i].weight.requires_grad for i in (0, 2, 4)] == [True, False, True]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scoring_is_deterministic_and_needs_no_calibration_or_grad_mode(estimator):
    with torch.no_grad():
        one = adq.sensitivity(scored(), batches(), F.cross_entropy, BITS, estimator)
    assert one == adq.sensitivity(scored(), iter(batches()), F.cross_entropy, reversed(BITS), estimator)


# ---- the table ---------------------------------------------------------------------------------------


def test_pinned_layers_have_their_own_width_only():
    table = adq.sensitivity(scored(), batches(), F.cross_entropy, BITS)
    assert [layer.pinned for layer in table.layers] == [True, False, True]
    assert by_name(table)["0"] == by_name(table)["4"] == {8: 0.0}
    assert list(by_name(table)["2"]) == list(BITS)
    table = adq.sensitivity(scored(), batches(), F.cross_entropy, BITS, pinned=["2"])
    assert [layer.pinned for layer in table.layers] == [False, True, False]
    everything = adq.sensitivity(scored(), batches(), F.cross_entropy, BITS, pinned=["0", "2", "4"])
    assert [layer.scores for layer in everything.layers] == [{8: 0.0}, {3: 0.0}, {8: 0.0}]


def test_sizes_and_the_round_trip():
    table = adq.sensitivity(scored(first_last_bits=6), batches(), F.cross_entropy, BITS)
    assert [(layer.weights, layer.activation_bits) for layer in table.layers] == [(40, 6), (64, 3), (24, 6)]
    assert table.float_weights == 8 + 3  # two biases; not the quantizers' own parameters
    assert SensitivityTable.from_dict(yaml.safe_load(dump_yaml(table.to_dict()))) == table


class Tokens(nn.Module):
    """A layer called twice on tokens folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(x.flatten(0, 1))).sum(-1).reshape(len(x), -1)


class Twins(nn.Module):
    """Two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 7), 6 * 5 * 7 * 4 * 9),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 7, 7), 6 * 3 * 3 * 2 * 9),
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5), 4 * 3 * 3 * 9),
        (nn.Conv1d(3, 5, 4), (2, 3, 9), 5 * 6 * 3 * 4),
        (nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3), 3 * 8 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5), 4 * 25 * 3 * 9),
        (nn.Linear(6, 5), (2, 6), 30),
        (nn.Linear(6, 5), (2, 7, 6), 7 * 30),
        (Tokens(), (2, 7, 6), 2 * 7 * 36),
        (Twins(), (2, 6), 2 * 36),
    ],
)
def test_multiply_accumulates_by_hand(layer, shape, macs):
    model = adq.quantize_(nn.Sequential(layer), ADQConfig(activation=None))
    batch = (torch.randn(shape), torch.zeros(2))
    table = adq.sensitivity(model, [batch], lambda out, _: out.square().mean(), (2,))
    assert [layer.macs for layer in table.layers] == [macs]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": float_net().float()}, r"no layer has quantized weights; call adq\.quantize_"),
        ({"batches": []}, "no batches to score with"),
        ({"estimator": "guess"}, "estimator must be one of loss, fisher, hessian, true_fisher, kl, got 'guess'"),
        ({"bits": ()}, "no bit-widths to score"),
        ({"loss_fn": None}, "the estimator 'fisher' needs loss_fn"),
        ({"bits": (2, 9)}, "bits of the table must be a whole number from 1 to 8, got 9"),
        ({"pinned": ["2", "3"]}, "no quantized layer '3' to pin"),
    ],
)
def test_errors(change, message):
    arguments = {"model": scored(), "batches": batches(), "loss_fn": F.cross_entropy} | change
    with pytest.raises(ValueError, match=message):
        adq.sensitivity(**arguments)


class Output(NamedTuple):
    logits: Tensor


class Named(nn.Module):
    """Takes its inputs by name, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = float_net().float()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:
        return Output(self.inner(x))


@pytest.mark.parametrize("estimator", ["loss", "fisher", "hessian"])
def test_mappings_go_whole_to_the_loss(estimator):
    named = adq.quantize_(Named())
    mapped = [UserDict(x=x, labels=y) for x, y in batches()]
    found = adq.sensitivity(
        named, mapped, lambda out, batch: F.cross_entropy(out.logits, batch["labels"]), (2,), estimator
    )
    expected = adq.sensitivity(scored(), batches(), F.cross_entropy, (2,), estimator)
    assert {name.removeprefix("inner."): scores for name, scores in by_name(found).items()} == by_name(expected)
    assert [layer.macs for layer in found.layers] == [layer.macs for layer in expected.layers] == [40, 64, 24]


@pytest.mark.parametrize("estimator", ["true_fisher", "kl"])
def test_estimators_on_logits_take_inputs_alone(estimator):
    expected = adq.sensitivity(scored(), batches(), F.cross_entropy, (2,), estimator)
    for alone in ([x for x, _ in batches()], [(x,) for x, _ in batches()]):
        assert adq.sensitivity(scored(), alone, bits=(2,), estimator=estimator) == expected


class Answer(nn.Module):
    """Logits as an attribute or an item of something else."""

    def __init__(self, make) -> None:
        super().__init__()
        self.inner, self.make = float_net().float(), make

    def forward(self, x: Tensor) -> object:
        return self.make(self.inner(x))


@pytest.mark.parametrize("estimator", ["true_fisher", "kl"])
@pytest.mark.parametrize("make", [Output, lambda y: {"loss": y.sum(), "logits": y}, lambda y: UserDict(logits=y)])
def test_estimators_on_logits_find_them_in_the_output(estimator, make):
    expected = adq.sensitivity(scored(), batches(), bits=(2,), estimator=estimator)
    found = adq.sensitivity(adq.quantize_(Answer(make)), batches(), bits=(2,), estimator=estimator)
    assert [layer.scores for layer in found.layers] == [layer.scores for layer in expected.layers]


def test_a_loss_of_another_output_than_the_one_in_evaluation():
    """Torchvision's detectors give losses in training, and a list of detections in evaluation."""
    model = adq.quantize_(Answer(lambda y: [{"boxes": y}]))
    with pytest.raises(TypeError, match="loss_fn does not take .* in evaluation mode, a list .* no attribute 'values'"):
        adq.sensitivity(model, batches(), lambda losses, _: sum(losses.values()), (2,))
    with pytest.raises(AttributeError, match="no attribute 'loss'"):  # a mistake in the loss itself
        adq.sensitivity(scored(), batches(), lambda y, _: y.loss, (2,))


@pytest.mark.parametrize("estimator", ["loss", "fisher", "hessian"])
def test_batches_without_targets_and_losses_that_are_no_number(estimator):
    for alone, found in (([x for x, _ in batches()], "Tensor"), ([(x,) for x, _ in batches()], "tuple of 1")):
        with pytest.raises(ValueError, match=rf"takes batches \(inputs, targets\), or mappings.*; got {found}"):
            adq.sensitivity(scored(), alone, F.cross_entropy, (2,), estimator)
    for loss, found in (
        (lambda o, y: F.cross_entropy(o, y, reduction="none"), r"a tensor \[7\]"),
        (lambda o, y: 1.0, "float"),
    ):
        with pytest.raises(ValueError, match=f"loss_fn must return one number, .*; got {found}"):
            adq.sensitivity(scored(), batches(), loss, (2,), estimator)


@pytest.mark.parametrize("estimator", ["fisher", "hessian"])
def test_squares_of_half_precision_changes_do_not_vanish(estimator):
    def score(dtype: torch.dtype) -> float:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)).to(dtype)
        net[2].weight.data /= 32
        typed = [(x.to(dtype), y) for x, y in batches()]
        table = adq.sensitivity(
            adq.quantize_(net), typed, lambda out, y: F.cross_entropy(out.float(), y), (8,), estimator, pinned=[]
        )
        return by_name(table)["2"][8]

    assert score(torch.float16) == pytest.approx(score(torch.float32), rel=0.5)
    assert score(torch.float32) > 0


class Tied(nn.Module):
    """A head that shares its weight with an embedding, which stays in float."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embed(x))))


@pytest.mark.parametrize("estimator", ["loss", "kl"])
def test_a_weight_that_an_embedding_shares_is_quantized_for_the_layer_alone(estimator):
    x, y = torch.arange(9), torch.arange(9).roll(1)
    table = adq.sensitivity(
        adq.quantize_(Tied(), ADQConfig(activation=None)), [(x, y)], F.cross_entropy, (2,), estimator, pinned=[]
    )
    float_model, model = Tied(), Tied()
    model.head.weight = nn.Parameter(
        model.embed.weight.detach() + torch.from_numpy(changes(model.embed.weight, 2)).float()
    )
    p = (float_model(x) / 2).log_softmax(1).exp()
    expected = {
        "loss": F.cross_entropy(model(x), y) - F.cross_entropy(float_model(x), y),
        "kl": 4 * (p * (p.log() - (model(x) / 2).log_softmax(1))).sum(1).mean(),
    }[estimator]
    assert by_name(table)["head"][2] == pytest.approx(expected.item(), abs=1e-5)
    assert [(layer.name, layer.in_float) for layer in table.layers] == [("inner", False), ("head", True)]
    assert table.float_weights == 9 * 6 + 6
    assert SensitivityTable.from_dict(yaml.safe_load(dump_yaml(table.to_dict()))) == table


# ---- control orders ----------------------------------------------------------------------------------


def ordered_table() -> SensitivityTable:
    """Free layers of 10, 100, 1000 and 5 weights; per weight at 2 bits 3, 1, 4 and 2."""
    sizes, per_weight = {"a": 10, "b": 100, "c": 1000, "d": 5}, {"a": 3.0, "b": 1.0, "c": 4.0, "d": 2.0}
    free = [LayerCost(n, sizes[n], 0, 3, {2: per_weight[n] * sizes[n], 3: 0.5 * sizes[n]}) for n in sizes]
    return SensitivityTable("loss", (LayerCost("first", 7, 0, 8, {8: 0.0}, pinned=True), *free), 11)


def test_reversed_gives_the_most_sensitive_layer_the_scores_of_the_least():
    table = reordered(ordered_table(), "reversed")
    assert by_name(table) == {
        "first": {8: 0.0},
        "a": {2: 2.0 * 10, 3: 5.0},  # rank 2 of 0..3 gets those of rank 1, "d"
        "b": {2: 4.0 * 100, 3: 50.0},
        "c": {2: 1.0 * 1000, 3: 500.0},
        "d": {2: 3.0 * 5, 3: 2.5},
    }
    assert (table.estimator, table.float_weights) == ("loss", 11)
    assert by_name(reordered(table, "reversed")) == by_name(ordered_table())


def test_random_is_a_permutation_of_the_scores_per_weight_that_the_seed_decides():
    tables = [reordered(ordered_table(), "random", seed) for seed in range(20)]
    for table in tables:
        assert table.layers[0] == ordered_table().layers[0]
        assert sorted(round(layer.scores[2] / layer.weights) for layer in table.layers[1:]) == [1, 2, 3, 4]
        assert [layer.weights for layer in table.layers] == [7, 10, 100, 1000, 5]
    assert reordered(ordered_table(), "random", 3) == tables[3]
    assert len({str(table) for table in tables}) > 5


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order must be random or reversed, got 'ranked'"):
        reordered(ordered_table(), "ranked")


def test_sequences_count_by_their_targets():
    """Inputs ``[T, B, E]``: a sample is one of B."""
    torch.manual_seed(0)
    model = adq.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    batch = torch.randn(5, 8, 4), torch.randn(8, 4)
    table = adq.sensitivity(model, [batch], lambda y, target: F.mse_loss(y.mean(0), target), (2,))
    assert [layer.macs for layer in table.layers] == [5 * 16, 5 * 16]


N = torch.zeros(6, 8)
ONE = torch.zeros(1, 8)


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (N, 6),
        ([N], 6),
        ((N, torch.zeros(4)), 4),
        ((N, torch.tensor(1.0)), 6),
        ((N, None), 6),
        ((N, [N, N]), 6),  # targets of two tasks
        ((N, (torch.zeros(6), torch.zeros(6), 0.3)), 6),  # mixed up
        ((N, [torch.zeros(3, 4), torch.zeros(2, 4)] * 3), 6),  # boxes of each image
        ((N, {"class": torch.zeros(6), "box": torch.zeros(6, 4)}), 6),
        (([torch.zeros(3, 5, 5), torch.zeros(3, 4, 4)], [{"boxes": ONE}] * 2), 2),
        (([torch.zeros(3, 5, 5)] * 2, [ONE, ONE]), 2),
        (([torch.zeros(3, 5, 5)] * 2,), 2),
        (([N, N], torch.zeros(6)), 6),  # a model of two inputs
        (([N, N], [torch.zeros(6)] * 3), 6),
        (({"x": N}, None), 6),
        ({"position_ids": ONE, "input_ids": N}, 6),
        ({"position_ids": ONE, "input_ids": N, "labels": torch.zeros(6)}, 6),
        ({"input_ids": ONE, "mask": ONE, "cache_position": torch.zeros(8)}, 1),
        (UserDict(pixel_values=torch.zeros(2, 3, 5, 5), labels=[{"boxes": N}] * 2, scale=0.5), 2),
    ],
)
def test_samples_of_a_batch(batch, samples):
    assert batch_size(batch) == samples


def test_a_batch_of_nothing_has_no_size():
    for batch in ((), (None, None), {"x": 1}, torch.tensor(1.0)):
        with pytest.raises(ValueError, match="has no tensor among its inputs"):
            batch_size(batch)


def test_images_of_a_list_count_singly():
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.second(self.first(torch.stack(images))).mean((2, 3))

    images = list(torch.randn(6, 3, 4, 4))
    model, loss = adq.quantize_(Stack()), lambda y, _: y.square().mean()
    listed, tensor = (
        adq.sensitivity(model, [(images, targets)], loss, (2,), pinned=[]) for targets in ([{}] * 6, torch.zeros(6))
    )
    assert listed == tensor
    assert [layer.macs for layer in listed.layers] == [16 * 12, 16 * 16]


def test_drawn_labels_leave_the_samples_to_the_targets():
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(0)

    torch.manual_seed(0)
    model, x = adq.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), Mean())), torch.randn(5, 8, 4)
    by_targets, by_inputs = (
        by_name(adq.sensitivity(model, [batch], bits=(2,), estimator="true_fisher", pinned=[]))["0"][2]
        for batch in ((x, torch.zeros(8)), (x,))
    )
    assert by_targets == pytest.approx(8 / 5 * by_inputs)
