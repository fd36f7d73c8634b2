"""How long the decoding of one chunk takes: the Wan VAE and the light TAE, plain, with fused norms, as one graph, and
compiled.

    python perf/bench_decoder.py                   on CUDA 704x384 in bfloat16, elsewhere tiny shapes in float32
    python perf/bench_decoder.py --preset tiny     tiny shapes anywhere
    python perf/bench_decoder.py --compile         torch.compile too (minutes, once)
    python perf/bench_decoder.py --convolutions    also the decoder's largest convolutions, one by one, in three ways

Weights are random: time does not depend on them. A chunk is three latent frames, twelve video frames, and its time
includes the conversion to uint8 RGB. Every way of running a decoder is compared with the plain one before it is timed.
The ceiling is stated first: measured copy bandwidth and arithmetic rate of this machine, and the time below which
no decoder of this arithmetic and traffic can come on it. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import Timing, copy_bandwidth, machine_card, product_rate, report, show, time_call
from torch import Tensor

from streamdiff.config import VAEConfig
from streamdiff.models import tae, vae
from streamdiff.models.served.decoder import ServedDecoder, pack_weights
from streamdiff.models.tae import TAEConfig, TAEDecoder, tae_flops
from streamdiff.models.vae import CausalConv3d, VAEDecoder, VideoDecoder, to_rgb8
from streamdiff.models.vae_cost import vae_bytes, vae_flops

LATENTS_PER_CHUNK = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """What is decoded, and by what."""

    height: int
    width: int
    dtype: torch.dtype
    vae: VAEConfig
    tae: TAEConfig


PRESETS = {
    "full": Shapes(height=704, width=384, dtype=torch.bfloat16, vae=VAEConfig(), tae=TAEConfig()),
    "tiny": Shapes(
        height=128,
        width=128,
        dtype=torch.float32,
        vae=VAEConfig(base_dim=8, num_res_blocks=1),
        tae=TAEConfig(widths=(32, 16, 16, 16)),
    ),
}


def times(call: Callable[[], object], device: torch.device, *, repeats: int) -> Timing:
    """Exactly ``repeats`` calls, one after the other as in a stream, with nothing between them."""
    return time_call(call, device, max_runs=max(3, repeats), budget_s=3600, flush=False)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Copy bandwidth (bytes read plus bytes written, per second), and the better rate of two large products.

    A matrix product and a wide convolution, because libraries differ in which of them they do well.
    """
    width, edge = (512, 192) if device.type == "cuda" else (128, 48)
    wide = CausalConv3d(width, width, (3, 3, 3)).to(device, dtype)
    pack_weights(wide)
    x = torch.randn(1, width, 6, edge, edge, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    wide_ms = times(lambda: wide(x), device, repeats=10).best
    rates = (product_rate(device, dtype) / 1e12, 2 * 27 * width**2 * 4 * edge**2 / wide_ms / 1e9)
    return {"copy_gbps": copy_bandwidth(device) / 1e9, "tflops": max(rates)}


def decoder_of(kind: str, shapes: Shapes, device: torch.device) -> VideoDecoder:
    decoder: VideoDecoder
    if kind == "vae":
        decoder = VAEDecoder(shapes.vae)
        vae.initialise(decoder, seed=0)
    else:
        decoder = TAEDecoder(shapes.tae)
        tae.initialise(decoder, seed=0)
    return decoder.to(device, shapes.dtype).eval().requires_grad_(False)


def cost(kind: str, shapes: Shapes) -> dict[str, float]:
    """Arithmetic of a chunk, and for the VAE the least it must move."""
    latent_h, latent_w = shapes.height // 8, shapes.width // 8
    if kind == "tae":
        return {"tflop": LATENTS_PER_CHUNK * tae_flops(shapes.tae, latent_h, latent_w) / 1e12}
    size = shapes.dtype.itemsize
    return {
        "tflop": LATENTS_PER_CHUNK * vae_flops(shapes.vae, "decoder", latent_h, latent_w) / 1e12,
        "gbyte": LATENTS_PER_CHUNK * vae_bytes(shapes.vae, "decoder", latent_h, latent_w, element_bytes=size) / 1e9,
    }


def bench(
    kind: str, ways: list[str], shapes: Shapes, device: torch.device, ceiling: dict[str, float], repeats: int
) -> list[dict[str, Any]]:
    """Rows of the table for one decoder."""
    plain = decoder_of(kind, shapes, device)
    pack_weights(plain)
    generator = torch.Generator().manual_seed(0)
    size = (1, 16, LATENTS_PER_CHUNK, shapes.height // 8, shapes.width // 8)
    latents = torch.randn(size, generator=generator).to(device)
    _, state = plain.decode(latents)
    expected, _ = plain.decode(latents, state)
    fused: Tensor | None = None
    if not torch.isfinite(expected).all() or expected.float().std() < 0.02:
        raise SystemExit(f"the {kind} paints nothing with these weights: nothing was timed")

    work = cost(kind, shapes)
    floor_ms = 1e3 * max(work["tflop"] / ceiling["tflops"], work.get("gbyte", 0.0) / ceiling["copy_gbps"])
    rows: list[dict[str, Any]] = []
    for way in ways:
        decoder = plain
        if way != "plain":
            decoder = ServedDecoder(decoder_of(kind, shapes, device), graph="graph" in way, compile="compiled" in way)
        found, _ = decoder.decode(latents, state)
        if way == "fused":
            fused = found
        if way == "graph" and fused is not None and not torch.equal(found, fused):
            raise SystemExit(f"{kind} replayed differs from {kind} called: nothing was timed")
        difference = (found.float() - expected.float()).abs().max().item()
        limit = 0.0 if way == "plain" else 0.1 if shapes.dtype == torch.bfloat16 else 1e-3
        if not difference <= limit:
            raise SystemExit(f"{kind} {way} differs from plain by {difference:.1e}: nothing was timed")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

        # The state goes round as in a stream, so that memory is allocated and freed as it is there.
        carried = state

        def one_chunk(decoder: VideoDecoder = decoder) -> Tensor:
            nonlocal carried
            frames, carried = decoder.decode(latents, carried)
            return to_rgb8(frames)

        timing = times(one_chunk, device, repeats=repeats)
        p50 = timing.p50
        row = {
            "decoder": kind,
            "way": way,
            "p50_ms": round(p50, 3),
            "p95_ms": round(timing.p95, 3),
            "p99_ms": round(timing.p99, 3),
            "fps": round(1e3 * expected.shape[2] / p50, 1),
            "tflops": round(work["tflop"] / p50 * 1e3, 3),
            "floor_ms": round(floor_ms, 3),
            "share_of_floor": round(floor_ms / p50, 3),
            "state_mib": round(carried.bytes / 2**20, 1),
            "max_difference": difference,
        }
        if device.type == "cuda":
            row["peak_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
        rows.append(row)
    return rows


def convolutions(shapes: Shapes, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """The 3x3x3 convolutions of the VAE's decoder by size: in three dimensions, and as one or three in two."""
    base = shapes.vae.base_dim
    rows: list[dict[str, Any]] = []
    for mult, frames, scale in ((1, 4, 8), (2, 4, 4), (4, 2, 2), (4, 1, 1)):
        C, H, W = base * mult, shapes.height // 8 * scale, shapes.width // 8 * scale
        x = torch.randn(1, C, frames + 2, H, W, device=device).to(shapes.dtype)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        w = (torch.randn(C, C, 3, 3, 3, device=device) / (27 * C) ** 0.5).to(shapes.dtype)
        conv = CausalConv3d(C, C, (3, 3, 3)).to(device, shapes.dtype)
        conv.weight.data, conv.bias = w.contiguous(memory_format=torch.channels_last_3d), None
        folded = w.permute(0, 2, 1, 3, 4).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        taps = [w[:, :, k].contiguous(memory_format=torch.channels_last) for k in range(3)]
        pictures = x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)

        def cube(x: Tensor = x, conv: CausalConv3d = conv) -> Tensor:
            return conv(x)[0].transpose(0, 1)

        def one_flat(p: Tensor = pictures, w: Tensor = folded) -> Tensor:
            return F.conv2d(torch.cat([p[:-2], p[1:-1], p[2:]], 1), w, padding=1)

        def three_flat(p: Tensor = pictures, taps: list[Tensor] = taps) -> Tensor:
            y = F.conv2d(p[:-2], taps[0], padding=1)
            y += F.conv2d(p[1:-1], taps[1], padding=1)
            y += F.conv2d(p[2:], taps[2], padding=1)
            return y

        flop = 2 * 27 * C * C * frames * H * W
        limit = 2e-2 if shapes.dtype == torch.bfloat16 else 1e-4
        for name, run in (("conv3d", cube), ("conv2d folded", one_flat), ("conv2d x3", three_flat)):
            if (run().float() - cube().float()).abs().max() > limit * 5:
                raise SystemExit(f"{name} disagrees with conv3d at {C} channels: nothing was timed")
            p50 = times(run, device, repeats=repeats).p50
            rows.append(
                {
                    "channels": C,
                    "size": [frames, H, W],
                    "way": name,
                    "p50_ms": round(p50, 4),
                    "tflops": round(flop / p50 / 1e9, 3),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", choices=list(PRESETS), default="full" if cuda else "tiny")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--decoders", nargs="+", choices=["vae", "tae"], default=["vae", "tae"])
    parser.add_argument("--compile", action="store_true", help="time torch.compile too, alone and in a graph")
    parser.add_argument("--convolutions", action="store_true", help="time single convolutions too")
    parser.add_argument("--pick-algorithms", action="store_true", help="let cuDNN measure (other bits per machine)")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = args.pick_algorithms
    device = torch.device(args.device)
    shapes = PRESETS[args.preset]
    ways = ["plain"]
    if device.type == "cuda":
        ways += ["fused", "graph"]
    if args.compile:
        ways += ["compiled", "compiled graph"] if device.type == "cuda" else ["compiled"]

    with torch.inference_mode():
        ceiling = {name: round(value, 3) for name, value in ceilings(device, shapes.dtype).items()}
        print(f"ceilings: copy {ceiling['copy_gbps']:.1f} GB/s, arithmetic {ceiling['tflops']:.3f} TFLOP/s")
        rows = [row for kind in args.decoders for row in bench(kind, ways, shapes, device, ceiling, args.repeats)]
        single = convolutions(shapes, device, args.repeats) if args.convolutions else []
    if single:
        show(single)
    report(
        "decoder",
        f"Decoding a chunk of {LATENTS_PER_CHUNK} latent frames at {shapes.height}x{shapes.width}, {shapes.dtype}",
        rows,
        machine_card(device),
        preset=args.preset,
        ceilings=ceiling,
        pick_algorithms=args.pick_algorithms,
        convolutions=single,
    )


if __name__ == "__main__":
    main()
