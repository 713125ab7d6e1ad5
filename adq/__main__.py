"""Command line: ``adq`` or ``python -m adq``."""

from __future__ import annotations

import sys


def info() -> str:
    """Which backends loaded, and why another did not."""
    import platform
    from importlib.util import find_spec

    import torch

    from adq import backends
    from adq.artifact import installed_version

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device found"
    lines = [
        f"adq {installed_version()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}",
        f"threads: {torch.get_num_threads()}; GPU: {device}",
        *(f"{status.device}: {status.backend} ({status.detail})" for status in backends.STATUS),
    ]
    missing = [name for name in ("accelerate", "typer", "torchvision", "sklearn", "matplotlib") if not find_spec(name)]
    if missing:
        lines.append(f"adq train is not available, missing: {', '.join(missing)} (pip install 'adq[train]')")
    return "\n".join(lines)


def main() -> None:
    """Entry point of the command ``adq``."""
    try:
        from adq.train.cli import app
    except ImportError as error:
        if sys.argv[1:] in ([], ["info"]):
            print(info())
            return
        sys.exit(f"error: {error}; the command line needs pip install 'adq[train]'")
    app()


if __name__ == "__main__":
    main()
