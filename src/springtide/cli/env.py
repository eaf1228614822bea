"""``springtide env``."""

from __future__ import annotations


def env() -> None:
    """Versions, device and kernels in use, for bug reports."""
    import platform

    import torch
    import transformers

    from springtide import __version__
    from springtide.kernels import native

    level = native.level()
    rows = {
        "springtide": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "kernels": f"C++ ({level.name})" if level else "torch",
    }
    for name, value in rows.items():
        print(f"{name:13} {value}")
