"""Which attention backend to use: by name, or the fastest of those that can run here, measured once."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from streamdiff_kernels.backends import available_backends, backend_named
from streamdiff_kernels.errors import BackendUnavailable
from streamdiff_kernels.ops import attend

logger = logging.getLogger(__name__)


def resolve_backend(
    name: str,
    q_BLNK: Tensor,
    keys_BMNK: Tensor,
    values_BMNK: Tensor,
    *,
    key_scale_BN: Tensor | None = None,
    value_scale_BN: Tensor | None = None,
) -> str:
    """The name of a backend that can run on such tensors; call it once, when the stage is built.

    A name is checked (`BackendUnavailable` says what is missing). ``auto`` measures a call over the whole
    ring on every backend that can run, and returns the fastest.
    """
    if name != "auto":
        return backend_named(name, device=q_BLNK.device, dtype=q_BLNK.dtype, head_dim=q_BLNK.shape[-1]).name
    times_ms = measure_backends(
        q_BLNK, keys_BMNK, values_BMNK, key_scale_BN=key_scale_BN, value_scale_BN=value_scale_BN
    )
    best = min(times_ms, key=times_ms.__getitem__)
    if math.isinf(times_ms[best]):
        raise BackendUnavailable("no attention backend ran on these tensors; name one to see its error")
    logger.info("attention backend %s chosen: %s", best, {name: round(ms, 3) for name, ms in times_ms.items()})
    return best


def measure_backends(
    q_BLNK: Tensor,
    keys_BMNK: Tensor,
    values_BMNK: Tensor,
    *,
    key_scale_BN: Tensor | None = None,
    value_scale_BN: Tensor | None = None,
    num_runs: int = 5,
    candidates: Sequence[str] | None = None,
) -> dict[str, float]:
    """Milliseconds of one call over the whole ring, by name; infinite for one that refused these tensors."""
    device, num_rows = q_BLNK.device, keys_BMNK.shape[-3]
    if candidates is None:
        ready = available_backends(device=device, dtype=q_BLNK.dtype, head_dim=q_BLNK.shape[-1])
        # On a CPU 'triton' is the interpreter, thousands of times slower: not worth waiting for.
        hopeless = ("reference", "triton") if device.type == "cpu" else ("reference",)
        candidates = [name for name, why in ready.items() if why is None and name not in hopeless]
    times_ms: dict[str, float] = {}
    for name in candidates:

        def once(backend: str = name) -> None:
            attend(
                q_BLNK,
                keys_BMNK,
                values_BMNK,
                num_rows,
                backend=backend,
                key_scale_BN=key_scale_BN,
                value_scale_BN=value_scale_BN,
            )

        try:
            times_ms[name] = _median_ms(once, device, num_runs)
        except (RuntimeError, NotImplementedError) as error:
            # A library that imports and then refuses this shape is out of the race, not the end of it.
            logger.debug("attention backend %s refused to be measured: %s", name, error)
            times_ms[name] = math.inf
    return times_ms


def _median_ms(call: Callable[[], None], device: torch.device, num_runs: int) -> float:
    once = _cuda_ms if device.type == "cuda" else _host_ms
    for _ in range(2):
        call()
    return sorted(once(call, device) for _ in range(num_runs))[num_runs // 2]


def _cuda_ms(call: Callable[[], None], device: torch.device) -> float:
    stream = torch.cuda.current_stream(device)  # the call's own, which is not the current one of every rank
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end)


def _host_ms(call: Callable[[], None], device: torch.device) -> float:
    del device
    start_s = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start_s)
