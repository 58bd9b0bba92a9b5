"""Packages with GPU kernels, which models do not use."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGES = ("causal_conv1d", "mamba_ssm", "fla")


@contextmanager
def without_kernels() -> Iterator[None]:
    """Let the modeling files that transformers imports in this context compute in PyTorch.

    If one of these packages is installed, transformers binds its kernels when it imports a modeling file, whatever the
    device of a model is. These kernels cannot compute on the CPU, where models are opened and probed, nor with every
    width of a layer.
    """
    before = {name: sys.modules[name] for name in PACKAGES if name in sys.modules}
    sys.modules.update(dict.fromkeys(PACKAGES))  # type: ignore[arg-type]  # None: the package cannot be imported.
    try:
        yield
    finally:
        for name in PACKAGES:
            del sys.modules[name]
        sys.modules.update(before)
