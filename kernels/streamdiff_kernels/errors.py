"""Every error that the kernels raise on purpose.

KernelError
├── KernelInputError (ValueError)          tensors that do not fit each other
└── BackendUnavailable (RuntimeError)      an implementation that cannot run here
"""

from __future__ import annotations


class KernelError(Exception):
    """Root of the tree."""


class KernelInputError(KernelError, ValueError):
    """Tensors whose shapes, types or places do not fit each other."""


class BackendUnavailable(KernelError, RuntimeError):  # noqa: N818 - the condition is its name
    """An implementation was named that cannot run on this machine or on these tensors."""
