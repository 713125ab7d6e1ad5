"""CUDA graphs: what a captured step must have seen before."""

from __future__ import annotations

import torch


def is_capturing(device: torch.device) -> bool:
    """Whether what runs on a device now becomes part of a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def check_not_capturing(device: torch.device) -> None:
    """Refuse to make what outlives a step within a CUDA graph, which would make it anew, or fail; RuntimeError."""
    if is_capturing(device):
        raise RuntimeError(
            "adq: a CUDA graph is being captured, and these tensors have not been seen before: run the same step "
            "on them once before the capture"
        )
