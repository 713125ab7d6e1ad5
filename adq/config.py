"""Configuration: frozen dataclasses that check themselves and round-trip through YAML."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from torch import nn

from adq.ops import MAX_BITS

T = TypeVar("T")

LEARNED_THRESHOLD_BITS = 5
"""Up to this width every activation interval is learned; above it one step serves all (uniform)."""
NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+"


def check_bits(bits: int, what: str) -> int:
    """Return ``bits`` if it is a whole number in 1..8, else raise ValueError naming ``what``."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"adq: {what} must be a whole number from 1 to {MAX_BITS}, got {bits!r}")
    return bits


def _check_fraction(value: float, what: str) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"adq: {what} must be in [0, 1), got {value!r}")


@dataclass(frozen=True)
class WeightConfig:
    """How a layer's weights are quantized: one codebook of K levels a layer.

    Attributes:
        bits: width of a code, 1..8.
        levels: ``"full"`` uses K = 2^bits levels, ``"symmetric"`` K = 2^bits - 1, with as many on each side of
            zero unless ``refine`` places them.
        scale: ``"channel"`` divides the weights by a scale per output channel before the lookup, the
            codebook being shared by the layer; ``"tensor"`` keeps the codebook in weight units.
        init: the levels without ``refine``, otherwise of no effect: ``"quantile"`` of each sign (the paper), or a
            ``"uniform"`` grid.
        refine: fit the levels to the least squared error (one-dimensional k-means, within 0.1 dB of the optimum).
        update: who moves the codebook in training: ``"ema"`` of the cells' means, the ``"gradient"`` of the
            loss, or nobody (``"frozen"``). With ``"step"`` the levels are the uniform grid of signed integers, whatever
            ``init`` and ``refine`` say, and the gradient moves its step, the scale (LSQ, arXiv 1902.08153).
        ema_decay: g of ``N <- g N + (1 - g) n``.
        ema_follows_lr: multiply (1 - g) by the learning rate over its peak, so that codebooks come to rest
            together with the weights; otherwise they go on moving while the weights can no longer answer. The peak is
            ``max_lr`` of the parameter group, where there is one, else the highest rate that it has had.
        snap: ``"int8"`` holds the levels on an int8 grid (a power-of-two step) times the scale.
    """

    bits: int = 3
    levels: Literal["full", "symmetric"] = "full"
    scale: Literal["channel", "tensor"] = "channel"
    init: Literal["quantile", "uniform"] = "quantile"
    refine: bool = True
    update: Literal["ema", "gradient", "frozen", "step"] = "ema"
    ema_decay: float = 0.99
    ema_follows_lr: bool = True
    snap: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits, "weight bits")
        _check_choices(self)
        _check_fraction(self.ema_decay, "ema_decay")
        if self.levels == "symmetric" and self.bits == 1:
            raise ValueError('adq: levels="symmetric" needs at least 2 bits: one bit would leave only the level zero')
        if self.update == "step" and self.bits == 1:
            raise ValueError('adq: update="step" needs at least 2 bits: the grid of one signed bit is lopsided')

    @property
    def num_levels(self) -> int:
        """K, the number of codewords."""
        return 2**self.bits - (self.levels == "symmetric")


@dataclass(frozen=True)
class ActivationConfig:
    """How a layer's input is quantized (N2UQ: learned thresholds, uniform levels).

    Attributes:
        bits: width of a level, 1..8; up to 5 bits every threshold is learned, above that one uniform step.
        signed: levels on both sides of zero, even if calibration sees inputs on one side only; ``None`` decides from
            the inputs seen there.
        thresholds: ``"learned"``, each by itself (N2UQ), or ``"uniform"``: one learned step at any width.
    """

    bits: int = 3
    signed: bool | None = None
    thresholds: Literal["learned", "uniform"] = "learned"

    def __post_init__(self) -> None:
        check_bits(self.bits, "activation bits")
        _check_choices(self)

    @property
    def steps(self) -> int:
        """n, the number of thresholds; the quantizer has n + 1 levels."""
        return 2**self.bits - 1

    @property
    def is_uniform(self) -> bool:
        """Whether one learned step stands for all intervals."""
        return self.thresholds == "uniform" or self.bits > LEARNED_THRESHOLD_BITS


@dataclass(frozen=True)
class ADQConfig:
    """How a whole model is quantized.

    Attributes:
        weight: of every quantized layer; ``None`` leaves weights in float.
        activation: of every quantized layer's input; ``None`` leaves activations in float.
        first_last_bits: width of weights and inputs of the first and the last layer, in order of
            registration; ``None`` leaves the two in float.
        overrides: exceptions, later ones win. A key is a layer's name, ``"re:PATTERN"`` for names that match
            a whole regular expression, or a module type (``nn.Linear`` or ``"type:Linear"``). A value is
            ``None`` (leave in float) or ``{"weight": ..., "activation": ...}``, each a mapping of the fields
            to change or ``None``.
    """

    weight: WeightConfig | None = field(default_factory=WeightConfig)
    activation: ActivationConfig | None = field(default_factory=ActivationConfig)
    first_last_bits: int | None = 8
    overrides: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("weight", WeightConfig), ("activation", ActivationConfig)):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, from_dict(kind, value, where=name))
            elif value is not None and not isinstance(value, kind):
                raise ValueError(f"adq: {name} must be a {kind.__name__}, a mapping or None, got {value!r}")
        if self.first_last_bits is not None:
            check_bits(self.first_last_bits, "first_last_bits")
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"adq: overrides must be a mapping, got {self.overrides!r}")
        overrides = {_override_key(key): _override_value(key, value) for key, value in self.overrides.items()}
        object.__setattr__(self, "overrides", overrides)
        for value in overrides.values():
            merge_override(LayerConfig(self.weight, self.activation), value)


@dataclass(frozen=True)
class LayerConfig:
    """What :class:`ADQConfig` comes to for one layer; ``None`` for both leaves the layer in float.

    ``pinned`` layers have a weight width of their own (first, last, or by an override) that the allocator keeps.
    """

    weight: WeightConfig | None
    activation: ActivationConfig | None
    pinned: bool = False

    @property
    def is_float(self) -> bool:
        """Whether nothing of the layer is quantized."""
        return self.weight is None and self.activation is None


def _override_key(key: object) -> str:
    if isinstance(key, type) and issubclass(key, nn.Module):
        return f"type:{key.__name__}"
    if not isinstance(key, str):
        raise TypeError(f"adq: an override is keyed by a name, 're:PATTERN' or a module type, got {key!r}")
    if key.startswith("re:"):
        try:
            re.compile(key[3:])
        except re.error as error:
            raise ValueError(f"adq: override {key!r} is not a regular expression: {error}") from error
    return key


def _override_value(key: object, value: object) -> dict[str, Any] | None:
    if value is None:
        return None
    if isinstance(value, LayerConfig):
        value = {name: getattr(value, name) for name in ("weight", "activation")}
    if not isinstance(value, Mapping) or not set(value) <= {"weight", "activation"}:
        raise ValueError(
            f"adq: override {key!r} must be None or a mapping with 'weight' and 'activation', got {value!r}"
        )
    return {
        name: asdict(part) if is_dataclass(part) and not isinstance(part, type) else part
        for name, part in value.items()
    }


def merge_override(layer: LayerConfig, override: Mapping[str, Any] | None) -> LayerConfig:
    """``layer`` with the fields of one override changed."""
    if override is None:
        return LayerConfig(None, None)
    parts: dict[str, Any] = {}
    for name, kind in (("weight", WeightConfig), ("activation", ActivationConfig)):
        parts[name] = getattr(layer, name)
        if name in override:
            change = override[name]
            parts[name] = (
                None if change is None else from_dict(kind, change, base=parts[name], where=f"overrides.{name}")
            )
    parts["pinned"] = layer.pinned or "bits" in (override.get("weight") or ())
    return LayerConfig(**parts)


def with_bits(layer: LayerConfig, bits: int) -> LayerConfig:
    """``layer`` pinned to ``bits`` for weights and activations, where they are quantized at all."""
    return LayerConfig(
        replace(layer.weight, bits=bits) if layer.weight else None,
        replace(layer.activation, bits=bits) if layer.activation else None,
        pinned=True,
    )


# ---- mapping and YAML --------------------------------------------------------------------------------


def _check_choices(config: Any) -> None:
    hints = typing.get_type_hints(type(config))
    for item in fields(config):
        choices = _literals(hints[item.name])
        value = getattr(config, item.name)
        if choices and value not in choices:
            raise ValueError(f"adq: {item.name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _literals(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    found = tuple(value for member in members for value in _literals(member))
    return (*found, None) if found and type(None) in members else found


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain mappings, lists and numbers (what :func:`from_dict` takes)."""
    return asdict(config)


def from_dict(kind: type[T], values: Any, base: T | None = None, where: str = "") -> T:
    """Build the dataclass ``kind`` from a mapping; fields not named keep ``base``'s value or the default.

    Raises ValueError for an unknown key, naming its place and the closest known one, for a value of the wrong type,
    and for a number that is not finite, unless it is infinity and the field's metadata has ``unlimited``.
    """
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"adq: {where or kind.__name__} must be a mapping, got {values!r}")
    _check_keys(kind, values, where)
    hints = typing.get_type_hints(kind)
    unlimited = {item.name: math.inf for item in fields(kind) if item.metadata.get("unlimited")}  # type: ignore[arg-type]
    changes = {
        key: value
        if value == unlimited.get(key, ...)
        else _convert(hints[key], value, getattr(base, key, None), _place(where, key))
        for key, value in values.items()
    }
    return replace(base, **changes) if base is not None else kind(**changes)  # type: ignore[type-var]


def filled(kind: type, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """What :func:`from_dict` makes of a mapping, as a mapping: converted, and with the defaults of what it leaves out.

    Only the keys are checked: a value of the wrong type stays as it is, and values need not agree with each other.
    """
    _check_keys(kind, values, where)
    hints, made = typing.get_type_hints(kind), {**to_dict(kind()), **values}
    for key, value in made.items():
        part = next((hint for hint in (hints[key], *typing.get_args(hints[key])) if is_dataclass(hint)), None)
        if part is not None and isinstance(value, Mapping):
            made[key] = filled(typing.cast(type, part), value, _place(where, key))
        else:
            with suppress(ValueError):
                made[key] = _convert(hints[key], value, None, _place(where, key))
    return made


def _check_keys(kind: type, values: Mapping[str, Any], where: str) -> None:
    known = [item.name for item in fields(kind)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
            raise ValueError(f"adq: unknown key {key!r} in {where or kind.__name__}{hint}")


def _place(where: str, key: str) -> str:
    return f"{where}.{key}".lstrip(".")


def _convert(hint: Any, value: Any, base: Any, where: str) -> Any:
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in members:
        return None
    if value is False and "no" in _literals(hint):
        return "no"  # what YAML takes for a truth value
    if value in _literals(hint):
        return value
    members = tuple(member for member in members if member is not type(None))
    for member in members:
        if is_dataclass(member):
            return from_dict(typing.cast(type, member), value, base=base, where=where)
        if typing.get_origin(member) is Mapping and not isinstance(value, Mapping):
            raise ValueError(f"adq: {where} must be a mapping, got {value!r}")
    items = next((typing.get_args(member)[0] for member in members if typing.get_origin(member) is tuple), None)
    if items is not None and (len(members) == 1 or isinstance(value, (list, tuple))):
        return _convert_items(items, value, where)
    plain = tuple(member for member in members if member in (int, float, str, bool))
    if float in plain and str not in plain:
        value = _number(value)
    if plain and not _is_plain(value, plain):
        names = " or ".join(member.__name__ for member in plain)
        raise ValueError(f"adq: {where} must be {names}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"adq: {where} must be a finite number, got {value!r}")
    return float(value) if float in plain and isinstance(value, int) and int not in plain else value


def _convert_items(hint: Any, values: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"adq: {where} must be a list like [1, 2], got {values!r}")
    return tuple(_convert(hint, value, None, f"{where}[{i}]") for i, value in enumerate(values))


def _number(value: Any) -> Any:
    """What YAML takes for text, because it has no point, or its exponent no sign: 1e-3, 1.0e3."""
    return float(value) if isinstance(value, str) and re.fullmatch(NUMBER, value) else value


def _is_plain(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


class _Loader(yaml.SafeLoader):
    """YAML of which no mapping has a key twice; the standard wants it, and PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} comes twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """What a YAML text holds; yaml.YAMLError for one that is not valid, or that has a key twice."""
    return yaml.load(text, _Loader)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; FileNotFoundError or ValueError naming the file otherwise."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"adq: no such file: {path}")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"adq: {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"adq: {path} must hold a mapping, got {type(values).__name__}")
    return values


def dump_yaml(values: Any) -> str:
    """YAML text of a dataclass or a mapping, keys in order."""
    if is_dataclass(values) and not isinstance(values, type):
        values = to_dict(values)
    return yaml.safe_dump(_plain(values), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
