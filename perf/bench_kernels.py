"""Every kernel against its floor: time, bandwidth or arithmetic rate, and the share of the ceiling measured first.

    python perf/bench_kernels.py                     14B shapes on CUDA, small ones on a CPU
    python perf/bench_kernels.py --shapes small      small shapes anywhere
    python perf/bench_kernels.py --only attend       ops whose name contains this
    python perf/bench_kernels.py --sweep             attention tiles, rows per program: what would be faster (CUDA)

Element-wise ops are bounded by copies, attention and products by arithmetic; both ceilings are measured in the same
run. ``share_%`` is the floor of `roofline` over the median. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import machine_card, pick_device, report, time_call
from roofline import Ceilings, Cost, Shapes, attention_cost, element_costs, linear_cost, measured_ceilings
from torch import Tensor

import streamdiff_kernels as kernels
from streamdiff_kernels import Impl

SHAPES = {
    "14b": Shapes(),
    "small": Shapes(tokens=384, heads=4, head_dim=64, hidden=704, sink=96, window=2, text=64, layers=2, item=2),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One op on one implementation, ready to be called."""

    cost: Cost
    by: str
    call: Callable[[], object]


class Tensors:
    """Random inputs of every op, made once."""

    def __init__(self, s: Shapes, device: torch.device) -> None:
        generator = torch.Generator(device=device).manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        D, L, N, K, R = s.width, s.tokens, s.heads, s.head_dim, s.head_dim // 2
        self.s, self.device, self.draw = s, device, draw
        self.x, self.y, self.hidden = draw(1, L, D), draw(1, L, D), draw(1, L, s.hidden)
        self.stream = draw(1, L, D, dtype=torch.float32)
        self.q, self.k, self.v = draw(1, L, 3 * D).split(D, dim=-1)
        self.weight = draw(D)
        angle = draw(L, R, dtype=torch.float32)
        self.cos, self.sin = angle.cos(), angle.sin()
        sink_angle = draw(s.sink, R, dtype=torch.float32)
        self.sink_cos, self.sink_sin = sink_angle.cos(), sink_angle.sin()
        self.pristine = draw(s.sink, N, K)
        self.keys, self.values = draw(s.rows, N, K), draw(s.rows, N, K)
        self.slot = torch.ones((), dtype=torch.int32, device=device)
        self.length = torch.full((), s.rows, dtype=torch.int32, device=device)
        table = 0.1 * draw(1, s.frames, 6, D, dtype=torch.float32)
        self.shift, self.scale, self.gate = table[:, :, 0], table[:, :, 1], table[:, :, 2]
        self.heads_q, self.heads_q_sink = draw(1, L, N, K), draw(1, L, N, K)


def element_cases(t: Tensors, impls: list[Impl]) -> Iterator[Case]:
    costs = {cost.name: cost for cost in element_costs(t.s)}

    def write(impl: Impl, *, two_turns: bool) -> object:
        return kernels.qk_norm_rope_write(
            t.q,
            t.k,
            t.v,
            q_weight_D=t.weight,
            k_weight_D=t.weight,
            cos_LR=t.cos,
            sin_LR=t.sin,
            cos_sink_LR=t.cos if two_turns else None,
            sin_sink_LR=t.sin if two_turns else None,
            keys_BMNK=t.keys,
            values_BMNK=t.values,
            slot=t.slot,
            ring_start=t.s.sink,
            impl=impl,
        )

    for impl in impls:
        calls: dict[str, Callable[[], object]] = {
            "qk_norm_rope_write": lambda impl=impl: write(impl, two_turns=False),
            "qk_norm_rope_write two turns": lambda impl=impl: write(impl, two_turns=True),
            "rotate_sink_": lambda impl=impl: kernels.rotate_sink_(
                t.pristine, t.sink_cos, t.sink_sin, t.keys, impl=impl
            ),
            "rms_norm": lambda impl=impl: kernels.rms_norm(t.q, t.weight, impl=impl),
            "norm_modulate": lambda impl=impl: kernels.norm_modulate(
                t.stream, t.scale, t.shift, out_dtype=t.x.dtype, impl=impl
            ),
            "gate_residual_": lambda impl=impl: kernels.gate_residual_(t.stream, t.y, t.gate, impl=impl),
            "gate_residual_norm_modulate_": lambda impl=impl: kernels.gate_residual_norm_modulate_(
                t.stream, t.y, t.gate, t.scale, t.shift, impl=impl
            ),
            "norm_modulate_fp8": lambda impl=impl: kernels.norm_modulate_fp8(t.stream, t.scale, t.shift, impl=impl),
            "gate_residual_norm_modulate_fp8_": lambda impl=impl: kernels.gate_residual_norm_modulate_fp8_(
                t.stream, t.y, t.gate, t.scale, t.shift, impl=impl
            ),
            "quantise_rows": lambda impl=impl: kernels.quantise_rows(t.x, impl=impl),
            "gelu_fp8": lambda impl=impl: kernels.gelu_fp8(t.hidden, impl=impl),
        }
        for name, call in calls.items():
            yield Case(costs[name], impl.value, call)
    yield Case(costs["gelu"], "torch", lambda: torch.nn.functional.gelu(t.hidden, approximate="tanh"))


def decoder_cases(t: Tensors, impls: list[Impl]) -> Iterator[Case]:
    big = t.device.type == "cuda"
    for channels, side in ((96, 352), (192, 176), (384, 88)):
        shape = (1, channels, 4, 2 * side, side * 12 // 11) if big else (1, channels // 4, 1, side // 8, side // 8)
        picture, weight = t.draw(*shape), t.draw(shape[1])
        for layout in ("contiguous", "channels last"):
            x = picture.contiguous(
                memory_format=torch.channels_last_3d if layout == "channels last" else torch.contiguous_format
            )
            cost = Cost(f"rms_norm_silu {channels}, {layout}", 2 * x.numel() * x.itemsize, 0, 0, "")
            for impl in impls:
                yield Case(
                    cost, impl.value, lambda x=x, weight=weight, impl=impl: kernels.rms_norm_silu(x, weight, impl=impl)
                )


def attention_cases(t: Tensors) -> Iterator[Case]:
    s = t.s
    dense, sparse = attention_cost(s), attention_cost(s, name="attend sparse", rows=s.sink + 2 * s.tokens)
    ready = kernels.available_backends(device=t.device, dtype=torch.bfloat16, head_dim=s.head_dim)
    pairs = [(0, s.sink), (s.sink, s.tokens), (s.sink + s.tokens * (s.window - 1), s.tokens)]
    on_device = torch.tensor(pairs, dtype=torch.int32, device=t.device)
    for name, why in ready.items():
        if why is not None or name == "reference":
            continue
        length = t.length if kernels.BACKENDS[name].counts_on_device else s.rows
        segments = on_device if name == "triton" else pairs

        def attend(backend: str = name, **how: Any) -> object:
            return kernels.attend(t.heads_q, t.keys, t.values, backend=backend, **how)

        yield Case(dense, name, lambda attend=attend, length=length: attend(length=length))
        two = {"q_sink_BLNK": t.heads_q_sink, "sink_rows": s.sink}
        yield Case(
            attention_cost(s, name="attend two turns"),
            name,
            lambda attend=attend, length=length, two=two: attend(length=length, **two),
        )
        yield Case(sparse, name, lambda attend=attend, segments=segments: attend(segments=segments))


def linear_cases(t: Tensors) -> Iterator[Case]:
    s, D = t.s, t.s.width
    for name, inputs, outputs in (
        ("linear q, k, v", D, 3 * D),
        ("linear up", D, s.hidden),
        ("linear down", s.hidden, D),
    ):
        x, weight, bias = t.draw(1, s.tokens, inputs), t.draw(outputs, inputs), t.draw(outputs)
        cost = linear_cost(s, name, inputs, outputs, 0, eight_bits=False)
        yield Case(
            cost, "torch", lambda x=x, weight=weight, bias=bias: kernels.linear(x, weight, bias, impl=Impl.TORCH)
        )
        if t.device.type == "cuda" and torch.cuda.get_device_capability(t.device) < (8, 9):
            continue
        x8, x_scale = kernels.quantise_rows(x, impl=Impl.TORCH)
        weight8, weight_scale = kernels.quantise_rows(weight, impl=Impl.TORCH)
        eight = linear_cost(s, f"{name}, fp8", inputs, outputs, 0, eight_bits=True)
        yield Case(
            eight,
            "torch",
            lambda a=(x8, x_scale, weight8, weight_scale, bias): kernels.linear_fp8(*a),
        )


def tile_cases(t: Tensors) -> Iterator[Case]:
    """Our attention in other tiles than it chooses, and the row kernels with other numbers of rows."""
    from streamdiff_kernels.triton import attention, rows  # only where Triton is

    s = t.s
    cost = attention_cost(s)
    arguments = (
        t.heads_q,
        None,
        t.keys[None],
        t.values[None],
        None,
        None,
        t.length,
        None,
        None,
        0,
        s.head_dim**-0.5,
        False,
    )
    for queries, keys, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3, 4)):
        tiles = attention.Tiles(queries, keys, warps, stages)
        yield Case(
            cost,
            f"triton {queries}x{keys} w{warps} s{stages}",
            lambda tiles=tiles: attention.attend(*arguments, tiles=tiles),
        )
    costs = {c.name: c for c in element_costs(s)}
    for count in (1, 2, 4, 8):

        def fused(count: int = count) -> object:
            rows.ROWS_PER_PROGRAM = count
            return rows.gate_residual_norm_modulate_(t.stream, t.y, t.gate, t.scale, t.shift, 1e-6)

        def norm(count: int = count) -> object:
            rows.ROWS_PER_PROGRAM = count
            return rows.norm_modulate(t.stream, t.scale, t.shift, 1e-6, t.x.dtype)

        yield Case(costs["gate_residual_norm_modulate_"], f"triton {count} rows", fused)
        yield Case(costs["norm_modulate"], f"triton {count} rows", norm)


def row_of(case: Case, ceilings: Ceilings, device: torch.device, budget_s: float) -> dict[str, Any]:
    try:
        timing = time_call(case.call, device, budget_s=budget_s)
    except Exception as error:  # noqa: BLE001 - one kernel that a machine refuses must not hide the others
        return {
            "op": case.cost.name,
            "by": case.by,
            "error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
        }
    seconds = timing.p50 / 1e3
    row: dict[str, Any] = {
        "op": case.cost.name,
        "by": case.by,
        "ms": timing.p50,
        "p95": timing.p95,
        "best": timing.best,
        "GB/s": case.cost.bytes_moved / seconds / 1e9,
        "TFLOP/s": case.cost.flops / seconds / 1e12 if case.cost.flops else None,
        "bound": case.cost.bound(ceilings),
        "share_%": 100 * case.cost.floor_ms(ceilings) / timing.p50,
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shapes", choices=sorted(SHAPES), help="default: 14b on CUDA, small elsewhere")
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--sweep", action="store_true", help="other tiles than the chosen ones (CUDA)")
    parser.add_argument("--budget-s", type=float, default=0.5, help="seconds given to each row")
    parser.add_argument("--save", type=Path, help="write the JSON object here too")
    args = parser.parse_args()
    device = pick_device(args.device)
    name = args.shapes or ("14b" if device.type == "cuda" else "small")
    ceilings = measured_ceilings(device)
    if "float8_e4m3fn" not in ceilings.product:
        # Eight-bit products run here as something else; their ceiling is that of the type they are widened to.
        ceilings.product["float8_e4m3fn"] = ceilings.product["bfloat16"]
    print(f"ceilings: copy {ceilings.copy / 1e9:,.0f} GB/s, ", end="")
    print(", ".join(f"{kind} {rate / 1e12:.3g} TFLOP/s" for kind, rate in ceilings.product.items()))
    impls = [Impl.TORCH] + ([Impl.TRITON] if device.type == "cuda" else [])
    with torch.inference_mode():
        tensors = Tensors(SHAPES[name], device)
        cases = itertools.chain(
            element_cases(tensors, impls),
            decoder_cases(tensors, impls),
            attention_cases(tensors),
            linear_cases(tensors),
            tile_cases(tensors) if args.sweep and device.type == "cuda" else (),
        )
        rows = [row_of(case, ceilings, device, args.budget_s) for case in cases if args.only in case.cost.name]
    report(
        "kernels",
        f"Kernels at the {name} shapes, bfloat16",
        rows,
        machine_card(device),
        save=args.save,
        shapes=name,
        ceilings={"copy": ceilings.copy, **ceilings.product},
    )


if __name__ == "__main__":
    main()
