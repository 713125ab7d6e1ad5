"""A model as it was: its modules' classes and attributes, containers among these, and the values of its tensors."""

from __future__ import annotations

import operator
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import nn

from adq.update import unregister

_CONTAINERS: tuple[type[Any], ...] = (OrderedDict, dict, list, set, deque)


def _contents(container: Any, kind: type[Any]) -> list[Any]:
    """What a container holds, keys and values in turn, whatever a subclass makes of reading it."""
    return list(chain.from_iterable(kind.items(container)) if issubclass(kind, dict) else kind.__iter__(container))


def _refill(container: Any, kind: type[Any], then: list[Any]) -> None:
    """Have a container hold what it held then, if it does not, whatever a subclass makes of changing it."""
    now = _contents(container, kind)
    if len(now) == len(then) and all(map(operator.is_, now, then)):
        return
    kind.clear(container)
    if issubclass(kind, dict):
        for key, value in zip(then[::2], then[1::2], strict=True):
            kind.__setitem__(container, key, value)
    else:
        (kind.update if kind is set else kind.extend)(container, then)


def _held(values: Iterable[Any]) -> list[tuple[Any, type[Any], list[Any]]]:
    """The containers among these values, and in these, each with its kind and what it holds."""
    found: dict[int, tuple[Any, type[Any], list[Any]]] = {}
    left = list(values)
    while left:
        value = left.pop()
        kind = next((kind for kind in _CONTAINERS if isinstance(value, kind)), None)
        if kind is not None and id(value) not in found:
            found[id(value)] = value, kind, _contents(value, kind)
            left += found[id(value)][2]
        elif isinstance(value, tuple):
            left += tuple.__iter__(value)
    return list(found.values())


def attributes_restorer(model: nn.Module) -> Callable[[], None]:
    """What gives every module its class and attributes of now back, and containers among these, and in these, what they
    hold now.
    """
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    held = _held(value for _, _, attributes in before for value in attributes.values())

    def restore() -> None:
        for value, container, then in held:
            _refill(value, container, then)
        for module, kind, attributes in before:
            if type(module) is not kind:
                module.__class__ = kind
                unregister(module)
            vars(module).clear()
            vars(module).update(attributes)

    return restore


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """A model as it was, modules and values, if what is done to it fails."""
    restore = attributes_restorer(model)
    tensors = [(t, t.detach().clone(), t.requires_grad) for t in (*model.parameters(), *model.buffers())]
    try:
        yield
    except BaseException:
        restore()
        for tensor, value, requires_grad in tensors:
            tensor.detach().copy_(value)
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
        raise
