"""The weights of all layers are quantized at once when the model begins a forward pass, and it makes no difference."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import adq
from adq import update


class Net(nn.Module):
    """Layers that run once, twice (``again``), or not at all (``idle``), one with a shared weight (``tied``)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.again, self.tied = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.idle, self.last = nn.Linear(16, 16), nn.Linear(16, 3)
        self.tied.weight = self.again.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.first(x).relu()).relu()
        return self.last(self.tied(self.again(x).relu()).relu())


def model(activations: bool = False, **weight) -> Net:
    activation = adq.ActivationConfig() if activations else None
    config = adq.ADQConfig(weight=adq.WeightConfig(**weight), activation=activation, first_last_bits=4)
    return adq.quantize_(Net(), config)


def inputs() -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many weights each call of the operator quantizes."""
    counts: list[int] = []
    operator = torch.ops.adq.foreach_codebook_quantize

    def count(weights, *tables):
        counts.append(len(weights))
        return operator(weights, *tables)

    monkeypatch.setattr(torch.ops.adq, "foreach_codebook_quantize", count)
    return counts


def alone(net: Net, x: torch.Tensor) -> torch.Tensor:
    """The forward pass without the model as a whole: every layer quantizes its own weight."""
    return Net.forward(net, x)


@pytest.mark.parametrize("training", [True, False])
def test_one_call_serves_all_layers_and_the_result_is_that_of_each_alone(calls, training):
    net = model().train(training)
    together = net(inputs())
    assert calls == [4]  # five layers, of which two share a weight
    separately = alone(net, inputs())
    assert calls[1:] == [1, 1, 1, 1, 1]
    assert torch.equal(together, separately)


def test_gradients_are_the_same_together_and_alone():
    nets = [model(activations=True) for _ in range(2)]
    for net, forward in zip(nets, (Net.__call__, alone), strict=True):
        adq.calibrate_(net, [inputs()])
        forward(net, inputs()).square().sum().backward()
    for (name, one), other in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None) == name.startswith("idle")
        assert one.grad is None or torch.equal(one.grad, other.grad)


def change_in_place(net: Net) -> None:
    with torch.no_grad():
        net.again.weight.mul_(-1.5)


def change_data(net: Net) -> None:
    net.again.weight.data.mul_(-1.5)


def change_data_pointer(net: Net) -> None:
    net.again.weight.data = net.again.weight.data * -1.5


def load(net: Net) -> None:
    net.load_state_dict({key: -1.5 * v if key.endswith("again.weight") else v for key, v in net.state_dict().items()})


@pytest.mark.parametrize("change", [change_in_place, change_data, change_data_pointer, load])
def test_a_weight_that_changes_between_forward_passes_is_seen(change):
    net = model()
    before = net(inputs())
    change(net)
    after = net(inputs())
    assert torch.equal(after, alone(net, inputs()))
    assert not torch.equal(before, after)


def test_a_weight_that_changes_during_the_forward_pass_is_seen(calls):
    net = model()
    net.first.register_forward_hook(lambda *args: change_in_place(net))
    changed = net(inputs())
    assert calls == [4, 1, 1, 1]  # the changed weight anew, whenever a layer with it runs
    with torch.no_grad():
        net.again.weight.div_(-1.5)
    assert torch.equal(changed, alone(net, inputs()))


def test_a_replaced_weight_and_a_replaced_layer_are_seen():
    net = model()
    net(inputs())
    net.idle = nn.Identity()
    net.last.weight = nn.Parameter(net.last.weight.detach() * 2)
    assert torch.equal(net(inputs()), alone(net, inputs()))


def test_nothing_is_kept_after_a_forward_pass_also_one_that_fails():
    net = model()
    quantizers = [module for module in net.modules() if isinstance(module, adq.nn.WeightQuantizer)]
    seen = []
    net.last.register_forward_pre_hook(lambda *args: seen.append([q.prepared is not None for q in quantizers]))
    net(inputs())
    with pytest.raises(RuntimeError, match="shapes"):
        net(inputs()[:, :5])
    assert seen == [[True] * 4]
    assert [q.prepared for q in quantizers] == [None] * 4


def test_each_thread_takes_what_it_prepared_itself(monkeypatch):
    """A begins its pass, B begins one of its own, A ends, B ends."""
    net = model().eval()
    expected = net(inputs())
    a_began, b_began, a_ended = threading.Event(), threading.Event(), threading.Event()
    makers, found, wrong = {}, {}, []
    operator = torch.ops.adq.foreach_codebook_quantize
    of = adq.nn.weight.Prepared.of

    def quantize(*args):
        quantized = operator(*args)
        makers.update((id(w_q), threading.current_thread()) for w_q in quantized)
        found.setdefault("kept", []).extend(quantized)  # so that identities stay theirs
        return quantized

    def take(prepared, *args):
        ready = of(prepared, *args)
        if ready is not None and makers[id(ready)] is not threading.current_thread():
            wrong.append(ready)
        return ready

    def wait(layer, args):
        if threading.current_thread().name == "A":
            a_began.set()
            b_began.wait(10)
        else:
            b_began.set()
            a_ended.wait(10)

    def run():
        if threading.current_thread().name == "B":
            a_began.wait(10)
        with torch.no_grad():
            found[threading.current_thread().name] = net(inputs())
        if threading.current_thread().name == "A":
            found["left for B"] = net.last.weight_quantizer.prepared
            a_ended.set()

    monkeypatch.setattr(torch.ops.adq, "foreach_codebook_quantize", quantize)
    monkeypatch.setattr(adq.nn.weight.Prepared, "of", take)
    net.first.register_forward_pre_hook(wait)
    threads = [threading.Thread(target=run, name=name) for name in "AB"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and found["left for B"] is not None
    assert torch.equal(found["A"], expected) and torch.equal(found["B"], expected)
    assert net.last.weight_quantizer.prepared is None


def test_activation_checkpointing_recomputes_the_same():
    def block(net, x):
        return net.again(net.first(x).relu())

    net = model()
    gradients = []
    for use_reentrant in (None, False, True):
        net.zero_grad()
        x = inputs().requires_grad_()
        y = block(net, x) if use_reentrant is None else checkpoint(block, net, x, use_reentrant=use_reentrant)
        y.sum().backward()
        gradients.append(net.first.weight.grad.clone())
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_quantize_their_own_weights_at_once(calls, copied):
    net = model()
    net(inputs())
    twin = copied(net)
    change_in_place(twin)
    calls.clear()
    assert torch.equal(twin(inputs()), alone(twin, inputs()))
    assert calls[0] == 4
    assert not torch.equal(twin(inputs()), net(inputs()))


def held_by_a_hook() -> nn.Module:
    net = model()
    net.again.register_forward_hook(lambda *args, net=net: None)
    return net


@pytest.mark.parametrize(
    "make", [model, lambda: adq.quantize_(nn.Linear(6, 3), adq.ADQConfig(activation=None)), held_by_a_hook]
)
def test_a_model_that_has_run_is_freed(make):
    net = make()
    net(inputs())
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None


def test_layers_in_float_learned_codebooks_and_disabled_quantizers_stay_out(calls):
    learned = model(update="gradient")
    learned(inputs())
    assert calls == []
    net = model()
    net.first.weight_quantizer.enabled = False
    assert torch.equal(net(inputs()), alone(net, inputs()))
    assert calls[0] == 3


def test_inference_mode_and_functional_call():
    net = model()
    expected = net(inputs()).detach()
    with torch.inference_mode():
        assert torch.equal(net(inputs()), expected)
    doubled = {"last.weight": net.last.weight.detach() * 2}
    other = torch.func.functional_call(net, doubled, (inputs(),))
    with torch.no_grad():
        net.last.weight.mul_(2)
    assert torch.equal(other, net(inputs()))


def test_one_operator_moves_all_codebooks(monkeypatch):
    counts = []
    operator = torch.ops.adq.foreach_codebook_step_
    monkeypatch.setattr(
        torch.ops.adq,
        "foreach_codebook_step_",
        lambda weights, *rest: (counts.append(len(weights)), operator(weights, *rest)),
    )
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(inputs()).sum().backward()
    optimizer.step()
    assert counts == [4]


def test_a_learning_rate_on_the_device_paces_the_codebooks_as_a_number_does():
    nets = [model(ema_decay=0.9) for _ in range(2)]
    for net, lr in zip(nets, (0.05, torch.tensor(0.05)), strict=True):
        optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        for group in optimizer.param_groups:
            group["max_lr"] = 0.1
        assert float(update._pace(optimizer.param_groups[0])) == pytest.approx(0.5)
        net(inputs()).sum().backward()
        with torch.no_grad():
            for p in net.parameters():
                p.grad = None if p.grad is None else torch.ones_like(p)
        optimizer.step()
    for (name, one), other in zip(nets[0].named_buffers(), nets[1].buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)
