"""Ceilings first: what a denoising step cannot be faster than, op by op, on this machine or on a named one.

    python perf/roofline.py                                  ceilings measured here, at the 14B model's shapes
    python perf/roofline.py --assume h200                    ceilings of an H200 as they were measured on one
    python perf/roofline.py --height 832 --width 480 --window 7
    python perf/roofline.py --predict                        what is expected of an H200, and what would be faster

An op moves bytes and computes; it takes at least the longer of the two at the machine's rates. Bytes are counted once
in and once out, modulations and tables included. The sum over a step is its floor: kernels back to back, nothing else.
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measure import copy_bandwidth, machine_card, pick_device, product_rate, report


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Sizes of one chunk in one layer; the defaults are the 14B model at 704x384."""

    tokens: int = 3168
    frames: int = 3
    heads: int = 40
    head_dim: int = 128
    hidden: int = 13824
    sink: int = 2640
    window: int = 4
    """Chunks attended to, the own one included."""
    text: int = 512
    folded: int = 64
    """Keys of a folded prompt (`streamdiff.models.served.cross`); 0: neither prompt nor sound is folded."""
    audio: int = 5
    """Tokens per latent frame."""
    layers: int = 40
    injectors: int = 12
    item: int = 2
    """Bytes of an activation."""
    stream_item: int = 4
    """Bytes of a value of the residual stream, which is never rounded; 2 says what that costs."""

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def rows(self) -> int:
        """Rows of the ring."""
        return self.sink + self.window * self.tokens


@dataclass(frozen=True, slots=True)
class Cost:
    """One call of one op, and how many a step makes."""

    name: str
    bytes_moved: int
    flops: int
    calls: int
    arithmetic: str
    """Which product rate bounds it: 'bfloat16', 'float8_e4m3fn' or '' when it only moves data."""

    def floor_ms(self, ceilings: Ceilings) -> float:
        """The longer of moving and computing, one call."""
        compute_s = self.flops / ceilings.product[self.arithmetic] if self.arithmetic else 0.0
        return 1e3 * max(self.bytes_moved / ceilings.copy, compute_s)

    def bound(self, ceilings: Ceilings) -> str:
        compute_s = self.flops / ceilings.product[self.arithmetic] if self.arithmetic else 0.0
        return "compute" if compute_s > self.bytes_moved / ceilings.copy else "memory"


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates of a machine: bytes per second copied (read and written), operations per second by type."""

    copy: float
    product: dict[str, float]
    source: str


ASSUMED = {
    # Copies at 4.3 of the 4.8 TB/s of the data sheet; square products of 8192 at 769 to 798 TFLOP/s in bfloat16, and
    # row-scaled eight-bit products at 1350 to 1520, as reported for Hopper.
    "h200": Ceilings(4.3e12, {"bfloat16": 780e12, "float8_e4m3fn": 1400e12}, "an H200, not measured in this run"),
}


def element_costs(s: Shapes) -> list[Cost]:
    """The ops between the products, once each. Modulations are float32."""
    row, mods = s.tokens * s.width * s.item, s.frames * s.width * 4
    table = s.tokens * (s.head_dim // 2) * 4 * 2
    scales = s.tokens * 4
    half, stream = row // s.item, s.tokens * s.width * s.stream_item
    return [
        Cost("qk_norm_rope_write", 6 * row + 2 * table, 0, s.layers, ""),
        Cost("qk_norm_rope_write two turns", 7 * row + 3 * table, 0, 0, ""),
        Cost("rotate_sink_", 2 * s.sink * s.width * s.item, 0, s.layers, ""),
        Cost("rms_norm", 2 * row, 0, s.layers + s.injectors, ""),
        Cost("norm_modulate", stream + row + 2 * mods, 0, 1, ""),
        Cost("gate_residual_", 2 * stream + row + mods, 0, 0, ""),
        Cost("gate_residual_norm_modulate_", 2 * (stream + row) + 3 * mods, 0, 3 * s.layers + s.injectors, ""),
        # In sixteen bits the product ends in it (cuBLASLt's epilogue); in eight it is a pass, which quantises.
        Cost("gelu", 2 * s.tokens * s.hidden * s.item, 0, 0, ""),
        Cost("norm_modulate_fp8", stream + half + scales + 2 * mods, 0, 0, ""),
        Cost("gate_residual_norm_modulate_fp8_", 2 * stream + row + half + scales + 3 * mods, 0, 0, ""),
        Cost("quantise_rows", row + half + scales, 0, 0, ""),
        Cost("gelu_fp8", s.tokens * s.hidden * (s.item + 1) + scales, 0, 0, ""),
    ]


def attention_cost(s: Shapes, *, name: str = "attend", rows: int | None = None, calls: int | None = None) -> Cost:
    rows = s.rows if rows is None else rows
    moved = (2 * s.tokens + 2 * rows) * s.width * s.item
    calls = s.layers if calls is None else calls
    return Cost(name, moved, 4 * s.tokens * rows * s.width, calls, "bfloat16")


def linear_cost(s: Shapes, name: str, inputs: int, outputs: int, calls: int, *, eight_bits: bool) -> Cost:
    item = 1 if eight_bits else s.item
    moved = item * (s.tokens * inputs + inputs * outputs) + s.item * s.tokens * outputs
    kind = "float8_e4m3fn" if eight_bits else "bfloat16"
    return Cost(name, moved, 2 * s.tokens * inputs * outputs, calls, kind)


def folded_costs(s: Shapes, name: str, keys: int, calls: int, *, groups: int = 1) -> list[Cost]:
    """Attention to folded keys: float32 scores, their softmax and its copy, and the product with what was folded."""
    shares = s.tokens * s.heads * keys
    scores = s.item * s.tokens * s.width + shares * (4 + 4 + s.item + 2 * s.item)
    product = s.item * (shares + groups * s.heads * keys * s.width + s.tokens * s.width)
    return [
        Cost(f"scores of the {name}", scores, 2 * s.tokens * s.width * keys, calls, "bfloat16"),
        Cost(f"folded {name}", product, 2 * shares * s.width, calls, "bfloat16"),
    ]


def conditions_costs(s: Shapes, *, eight_bits: bool) -> list[Cost]:
    """Attention to the prompt and to the sound, with the projection after it."""
    frames = replace(s, tokens=s.tokens // s.frames)
    plain = s.injectors if eight_bits or not s.folded else 0
    costs = [
        attention_cost(s, name="attend to the prompt", rows=s.text, calls=0 if s.folded else s.layers),
        attention_cost(frames, name="attend to the sound", rows=s.audio, calls=plain * s.frames),
    ]
    if s.folded:
        costs += folded_costs(s, "prompt", s.folded, s.layers)
        costs += folded_costs(s, "sound", s.audio, s.injectors - plain, groups=s.frames)
    return [cost for cost in costs if cost.calls]


def num_square(s: Shapes, *, eight_bits: bool) -> int:
    """Products from width to width: of self-attention, of the prompt's queries and outputs, of the sound's."""
    outputs = 0 if s.folded else s.layers
    sound = s.injectors if eight_bits or not s.folded else 0
    return 2 * s.layers + outputs + s.injectors + sound


def step_costs(s: Shapes, *, eight_bits: bool) -> list[Cost]:
    """Every op of one step. In eight bits the fused ops write bytes and the products read them."""
    D = s.width
    costs = [cost for cost in element_costs(s) if cost.calls]
    if eight_bits:
        by_name = {cost.name: cost for cost in element_costs(s)}
        eight = {
            "norm_modulate": "norm_modulate_fp8",
            "gate_residual_norm_modulate_": "gate_residual_norm_modulate_fp8_",
        }
        costs = [replace(by_name[eight.get(c.name, c.name)], calls=c.calls) for c in costs]
        costs.append(replace(by_name["gelu_fp8"], calls=s.layers))
        # Attention's output enters its projection through a pass of its own.
        calls = (1 if s.folded else 2) * s.layers + s.injectors
        costs.append(replace(by_name["quantise_rows"], calls=calls))
    square = num_square(s, eight_bits=eight_bits)
    return [
        *costs,
        attention_cost(s),
        *conditions_costs(s, eight_bits=eight_bits),
        linear_cost(s, "linear q, k, v", D, 3 * D, s.layers, eight_bits=eight_bits),
        linear_cost(s, "linear D to D", D, D, square, eight_bits=eight_bits),
        linear_cost(s, "linear up", D, s.hidden, s.layers, eight_bits=eight_bits),
        linear_cost(s, "linear down", s.hidden, D, s.layers, eight_bits=eight_bits),
    ]


def served_costs(s: Shapes, *, eight_bits: bool, kept_layers: int = 1) -> list[Cost]:
    """`step_costs` as served: with eight-bit linears, ``kept_layers`` at each end of the model keep sixteen bits, and
    sound enters at the first and the last of them.
    """
    kept = min(2 * kept_layers, s.layers) if eight_bits else 0
    if kept == 0:
        return step_costs(s, eight_bits=eight_bits)
    heard = min(2, kept, s.injectors)
    between = replace(s, layers=s.layers - kept, injectors=s.injectors - heard)
    return step_costs(between, eight_bits=True) + step_costs(replace(s, layers=kept, injectors=heard), eight_bits=False)


@dataclass(frozen=True, slots=True)
class Shares:
    """What of its ceiling an op is expected to reach."""

    product: float = 0.90
    """Of a large square product, those of a step."""
    attention: float = 600e12
    """Operations per second of attention: what cuDNN is reported to run on Hopper in bfloat16 (595 to 617 TFLOP/s)."""
    element: float = 0.80
    """Of a copy's bandwidth, passes over memory."""

    def expected_ms(self, costs: list[Cost], ceilings: Ceilings) -> float:
        """A step of these costs."""
        return sum(cost.calls * self._one_ms(cost, ceilings) for cost in costs)

    def _one_ms(self, cost: Cost, ceilings: Ceilings) -> float:
        floor_ms = cost.floor_ms(ceilings)
        if cost.name.startswith("attend"):
            return max(1e3 * cost.flops / self.attention, floor_ms)
        return floor_ms / (self.product if cost.arithmetic else self.element)


FA3_BF16, FA3_FP8 = 660e12, 950e12
"""FlashAttention-3 as reported on Hopper, in operations per second."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One way to serve a step, and what it is expected to take."""

    what: str
    shapes: Shapes
    eight_bits: bool
    shares: Shares
    kept_layers: int
    goal_ms: float

    def row(self, ceilings: Ceilings) -> dict[str, Any]:
        costs = served_costs(self.shapes, eight_bits=self.eight_bits, kept_layers=self.kept_layers)
        if self.shares.attention > ceilings.product["bfloat16"]:
            costs = [replace(c, arithmetic="float8_e4m3fn") if c.name == "attend" else c for c in costs]
        expected_ms = self.shares.expected_ms(costs, ceilings)
        own = [cost for cost in costs if cost.name == "attend"]
        return {
            "step": self.what,
            "expected_ms": expected_ms,
            "of_it_attention": self.shares.expected_ms(own, ceilings),
            "floor_ms": sum(cost.calls * cost.floor_ms(ceilings) for cost in costs),
            "attention_tflops": self.shares.attention / 1e12,
            "goal_ms": self.goal_ms,
            "met": "yes" if expected_ms <= self.goal_ms else "no",
        }


def predictions(s: Shapes) -> list[Prediction]:
    """The step as it is served by default, and what would bring it nearer to its goals."""
    two = replace(s, window=2)
    bare = replace(two, sink=s.tokens // s.frames)
    fa3, eight = Shares(attention=FA3_BF16), Shares(attention=FA3_FP8)
    return [
        Prediction("bf16", s, False, Shares(), 1, 165.0),
        Prediction("bf16, FlashAttention-3", s, False, fa3, 1, 165.0),
        Prediction("fp8", s, True, Shares(), 1, 110.0),
        Prediction("fp8, attention fp8", s, True, eight, 1, 110.0),
        Prediction("fp8, attention fp8, no layer kept", s, True, eight, 0, 110.0),
        Prediction("fp8, attention fp8, window 3", replace(s, window=3), True, eight, 1, 110.0),
        Prediction("fp8, window 2", two, True, Shares(), 1, 95.0),
        Prediction("fp8, attention fp8, window 2", two, True, eight, 1, 95.0),
        Prediction("fp8, attention fp8, window 2, no layer kept", two, True, eight, 0, 95.0),
        Prediction("fp8, attention fp8, window 2, no motion prefix", bare, True, eight, 1, 95.0),
        Prediction("all of these", bare, True, eight, 0, 95.0),
    ]


def measured_ceilings(device: torch.device) -> Ceilings:
    product = {"bfloat16": product_rate(device, torch.bfloat16)}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        product["float8_e4m3fn"] = product_rate(device, torch.float8_e4m3fn)
    return Ceilings(copy_bandwidth(device), product, "measured in this run")


def shapes_of(height: int, width: int, window: int, folded: int = 64) -> Shapes:
    """The 14B model on a picture of this size: three latent frames a chunk, sink of reference and packed motion."""
    rows, columns = height // 16, width // 16
    frame = rows * columns
    # The packer keeps one latent frame whole, two at half the sides and four times four at a quarter of them.
    packed = frame + (rows // 2) * (columns // 2) + 4 * (rows // 4) * (columns // 4)
    return Shapes(tokens=3 * frame, sink=frame + packed, window=window, folded=folded)


ASSUMPTIONS = """\
Assumed: {source}: copies at {copy:,.0f} GB/s, products at {bf16:,.0f} and {fp8:,.0f} TFLOP/s;
of that, products reach {product:.0%} and passes over memory {element:.0%}. Attention runs at the rate that its row
names, as reported of cuDNN and FlashAttention-3 on Hopper; nothing was measured. The residual stream has {stream} bytes
a value, the prompt {folded} keys, and with eight-bit linears two layers keep sixteen bits where the row does not say
that none is kept. The time is that of one step's graph, with nothing else on the GPU."""


def predict(shapes: Shapes, device: torch.device, save: Path | None) -> None:
    """Print what a step is expected to take on an H200, with every assumption."""
    ceilings, usual = ASSUMED["h200"], Shares()
    print(
        ASSUMPTIONS.format(
            source=ceilings.source,
            copy=ceilings.copy / 1e9,
            bf16=ceilings.product["bfloat16"] / 1e12,
            fp8=ceilings.product["float8_e4m3fn"] / 1e12,
            product=usual.product,
            element=usual.element,
            stream=shapes.stream_item,
            folded=shapes.folded,
        )
    )
    report(
        "predict",
        f"One step at 14B, predicted: {shapes.tokens} tokens over {shapes.rows}",
        [prediction.row(ceilings) for prediction in predictions(shapes)],
        machine_card(device),
        save=save,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--assume", choices=sorted(ASSUMED), help="use known ceilings instead of measuring")
    parser.add_argument("--height", type=int, default=704)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--window", type=int, default=4, help="chunks attended to, the own one included")
    parser.add_argument("--folded", type=int, default=64, help="keys of a folded prompt; 0: not folded (default 64)")
    parser.add_argument("--predict", action="store_true", help="what a step is expected to take on an H200, and why")
    parser.add_argument("--save", type=Path, help="write the JSON object here too")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.predict:
        predict(shapes_of(args.height, args.width, args.window, args.folded), device, args.save)
        return
    ceilings = ASSUMED[args.assume] if args.assume else measured_ceilings(device)
    shapes = shapes_of(args.height, args.width, args.window, args.folded)
    rows: list[dict[str, Any]] = []
    totals: dict[str, float] = {}
    for precision, eight_bits in (("bf16", False), ("fp8", True)):
        if eight_bits and "float8_e4m3fn" not in ceilings.product:
            continue
        costs = step_costs(shapes, eight_bits=eight_bits)
        total_ms = sum(cost.calls * cost.floor_ms(ceilings) for cost in costs)
        totals[precision] = total_ms
        for cost in sorted(costs, key=lambda cost: -cost.calls * cost.floor_ms(ceilings)):
            step_ms = cost.calls * cost.floor_ms(ceilings)
            rows.append(
                {
                    "op": cost.name,
                    "step": precision,
                    "calls": cost.calls,
                    "MB": cost.bytes_moved / 1e6,
                    "GFLOP": cost.flops / 1e9,
                    "bound": cost.bound(ceilings),
                    "floor_us": 1e3 * cost.floor_ms(ceilings),
                    "step_ms": step_ms,
                    "share_%": 100 * step_ms / total_ms,
                }
            )
        flops = sum(cost.calls * cost.flops for cost in costs)
        rows.append({"op": f"one step, {precision}", "GFLOP": flops / 1e9, "step_ms": total_ms})
    print(f"copy {ceilings.copy / 1e9:,.0f} GB/s, ", end="")
    print(", ".join(f"{name} {rate / 1e12:,.3g} TFLOP/s" for name, rate in ceilings.product.items()), end="")
    print(f": {ceilings.source}")
    report(
        "roofline",
        f"Floor of one step, 14B at {args.height}x{args.width}: {shapes.tokens} tokens over {shapes.rows}",
        rows,
        machine_card(device),
        save=args.save,
        ceilings={"copy": ceilings.copy, **ceilings.product, "source": ceilings.source},
        floor_ms=totals,
    )


if __name__ == "__main__":
    main()
