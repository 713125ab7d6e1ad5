"""Weights that FSDP2 has sharded: each process holds some rows, and a codebook needs the sums over all of them.

A step takes the statistics of the process's own rows, adds those of all layers up over the processes in one reduction,
and moves every codebook by the sums: on all processes by the same ones, so codebooks stay the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adq.ops import scale_axis
from adq.reference import decision_thresholds, ema_update, hold_peak, rescale, snap_codebook, within_reach

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from adq.nn.weight import WeightQuantizer

Member = tuple[Any, "WeightQuantizer"]
"""A sharded weight and its quantizer."""


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is a DTensor; known without importing what makes them."""
    return hasattr(weight, "device_mesh")


def whole(weight: Tensor) -> Tensor:
    """A weight with all its rows: of a sharded one gathered from all processes, the gradient goes back to its rows."""
    return weight.full_tensor() if is_sharded(weight) else weight  # type: ignore[attr-defined]


def refuse_sharded(weights: Iterable[Tensor], what: str) -> None:
    """Raise ValueError if a weight is a DTensor."""
    if any(is_sharded(weight) for weight in weights):
        raise ValueError(
            f"adq: {what} needs whole weights, and this model is sharded; do it before fully_shard, or on a model that "
            "the gathered state dict was loaded into"
        )


def shard_quantizers_(model: nn.Module, **options: Any) -> nn.Module:
    """Make the parameters of all quantizers one FSDP2 group, in float32 whatever the rest is computed in.

    Call it before ``fully_shard``. A group has one dtype: without this, ``fully_shard`` refuses a model in bfloat16,
    whose thresholds and scales are float32, and a ``MixedPrecisionPolicy`` would round them to 8 bits.

    Args:
        model: from :func:`adq.quantize_`, calibrated.
        options: of ``torch.distributed.fsdp.fully_shard``, such as ``mesh``; not ``mp_policy``.

    Returns:
        The same model.
    """
    from torch.distributed.fsdp import fully_shard

    from adq.convert import activation_quantizers, weight_quantizers

    quantizers: list[nn.Module] = [
        *activation_quantizers(model).values(),
        *(quantizer for _, quantizer in weight_quantizers(model).values()),
    ]
    learned = [quantizer for quantizer in quantizers if next(quantizer.parameters(), None) is not None]
    if learned:
        fully_shard(learned, **{"reshard_after_forward": False, **options})
    return model


def step(members: Sequence[Member], rates: Tensor) -> None:
    """One EMA step of the codebooks of sharded weights, and of their scales, as ``foreach_codebook_step_`` does it.

    Args:
        members: of one device.
        rates: float32 ``[members]``, how far each codebook moves.

    Raises:
        ValueError: a weight is sharded in another way than ``fully_shard`` does it.
    """
    groups: dict[Any, list[int]] = {}
    for i, (weight, _) in enumerate(members):
        groups.setdefault((weight.device_mesh, weight.placements), []).append(i)
    for (mesh, placements), which in groups.items():
        _step([members[i] for i in which], _entries(rates, which), mesh, placements)


def _entries(values: Tensor, which: Sequence[int]) -> Tensor:
    """``values[which]``; an index that is a list would be copied to the device, and waited for."""
    of_each = values.unbind()
    return torch.stack([of_each[i] for i in which])


def _step(members: list[Member], rates: Tensor, mesh: Any, placements: Sequence[Any]) -> None:
    quantizers = [quantizer for _, quantizer in members]
    axes = [scale_axis(weight.shape, quantizer.scale) for weight, quantizer in members]
    channels = [0 if axis is None else q.scale.numel() for axis, q in zip(axes, quantizers, strict=True)]
    sizes = [2 * quantizer.codebook.numel() for quantizer in quantizers]
    sums = torch.zeros(sum(sizes) + 2 * sum(channels), dtype=torch.float64, device=rates.device)
    cells, products, norms = sums.split([sum(sizes), sum(channels), sum(channels)])
    parts = zip(cells.split(sizes), products.split(channels), norms.split(channels), strict=True)
    for (weight, quantizer), axis, part in zip(members, axes, parts, strict=True):
        _add_up(weight, quantizer, axis, *part)
    for dim, placement in enumerate(placements):
        if not placement.is_replicate():
            dist.all_reduce(sums, group=mesh.get_group(dim))
    statistics, alike = cells.float().split(sizes), dict[Any, list[int]]()
    for i, quantizer in enumerate(quantizers):
        alike.setdefault((sizes[i], quantizer.config.snap, channels[i] > 0), []).append(i)
    factors: dict[int, Tensor] = {}
    for (_, snap, per_channel), which in alike.items():
        moved = _move_codebooks(
            [quantizers[i] for i in which],
            [statistics[i] for i in which],
            _entries(rates, which),
            bool(snap),
            per_channel,
        )
        factors.update(zip(which, moved.unbind(), strict=True))
    _move_scales(quantizers, channels, products, norms, rates, [factors[i] for i in range(len(members))])


def _add_up(
    weight: DTensor, quantizer: WeightQuantizer, axis: int | None, cells: Tensor, products: Tensor, norms: Tensor
) -> None:
    """Write what this process's part of a weight adds to the sums, float64.

    Args:
        weight, quantizer: of a layer with K levels; axis: of its C scales, None for one scale.
        cells: ``[2 K]``, counts and totals of the cells.
        products, norms: ``[C]``, sums of ``w q`` and of ``q^2`` of each channel; those of channels elsewhere stay.
    """
    local, scale, codebook, first = weight.to_local().detach(), quantizer.scale, quantizer.codebook, _first(weight)
    if axis is not None:
        scale = scale.narrow(axis, first[axis], local.shape[axis])
    v = local.float() / scale
    counted = v if axis is None else within_reach(v, codebook)
    q, _, count, total = torch.ops.adq.codebook_lookup_statistics(
        counted, codebook, decision_thresholds(codebook), False
    )
    cells[: len(codebook)], cells[len(codebook) :] = count, total
    if axis is not None:
        others = [d for d in range(local.dim()) if d != axis]
        here = slice(first[axis], first[axis] + local.shape[axis])
        products[here], norms[here] = torch.mul(local, q, out=v).sum(others), q.mul_(q).sum(others)


def _first(weight: DTensor) -> list[int]:
    """Index of the first element of this process's part in the whole weight; parts are those of ``torch.chunk``."""
    first, size, mesh = [0] * weight.dim(), list(weight.shape), weight.device_mesh
    for dim, placement in enumerate(weight.placements):
        if placement.is_shard():
            axis = placement.dim  # type: ignore[attr-defined]
            length = -(-size[axis] // mesh.size(dim))
            begin = min(mesh.get_local_rank(dim) * length, size[axis])
            first[axis], size[axis] = first[axis] + begin, min(length, size[axis] - begin)
    if torch.Size(size) != weight.to_local().shape or not all(
        p.is_shard() or p.is_replicate() for p in weight.placements
    ):
        raise ValueError(
            f"adq: codebooks follow weights that fully_shard has sharded, this one of shape {tuple(weight.shape)} has "
            f"the placements {weight.placements}"
        )
    return first


def _move_scales(
    quantizers: list[WeightQuantizer],
    channels: list[int],
    products: Tensor,
    norms: Tensor,
    rates: Tensor,
    factors: list[Tensor],
) -> None:
    """Towards the factors of least squared error, as :func:`adq.reference.least_squares_scale` has them, and into the
    units of the new codebooks."""
    scales = [quantizer.scale for quantizer, count in zip(quantizers, channels, strict=True) if count]
    if not scales:
        return
    rate, factor = (
        torch.cat([value.expand(count) for value, count in zip(values, channels, strict=True)])
        for values in (rates.unbind(), factors)
    )
    old, fitted = torch.cat([scale.flatten() for scale in scales]), products.float() / norms.float()
    fitted = torch.where((fitted > 0) & (rate > 0), fitted, old)
    new = rescale(old + rate * (fitted - old), factor)
    parts = new.split([scale.numel() for scale in scales])
    torch._foreach_copy_(scales, [part.view_as(scale) for part, scale in zip(parts, scales, strict=True)])


def _move_codebooks(
    quantizers: list[WeightQuantizer], cells: list[Tensor], rates: Tensor, snap: bool, per_channel: bool
) -> Tensor:
    """By :func:`adq.reference.ema_update`, codebooks of one length at once; returns the factors on their units."""
    count, total = torch.stack(cells).chunk(2, 1)
    states = [[getattr(q, name) for q in quantizers] for name in ("codebook", "ema_count", "ema_total")]
    of_each: Any = torch.func.vmap  # its signature is not typed
    before = [torch.stack(state) for state in states]
    moved, factors = list(of_each(ema_update)(*before, count, total, rates)), torch.ones_like(rates)
    if per_channel:
        moved[0], moved[2], factors = of_each(hold_peak)(before[0], moved[0], moved[2])
    if snap:
        moved[0] = of_each(snap_codebook)(moved[0])
    for state, new in zip(states, moved, strict=True):
        torch._foreach_copy_(state, list(new))
    return factors
