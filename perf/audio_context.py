"""How far a wav2vec2 stream is from encoding the whole file, against what it may hear; and what that costs.

    python perf/audio_context.py --checkpoint ckpt/Wan2.2-S2V-14B/wav2vec2-large-xlsr-53-english

Without ``--checkpoint`` a model of random weights stands in (the published architecture, narrower): it shows
the machinery, not the numbers of the real encoder. Differences are root mean squares over all hidden states,
relative to the whole-file encoding. The ratio 5:3 is not an error of the stream: the published interpolation
reads later and later hidden states towards the end of a file. The last line is one JSON object.

    python perf/audio_context.py --calibrate

measures the constants by which `LogMelFeatures` scales its values instead.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamdiff import demo
from streamdiff.errors import InputError
from streamdiff.media import read_audio
from streamdiff.models.audio import LogMelFeatures, Wav2Vec2Features, log_mel

FPS = 25
CONTEXTS_S = (0.0, 1.0, 2.0, 4.0, 8.0)
LOOKAHEADS_S = (0.0, 0.08, 0.16, 0.32, 0.64, 1.28)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, help="a published wav2vec2 directory")
    parser.add_argument("--audio", type=Path, help="any speech; default: the voice of the demo")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calibrate", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.audio or demo.demo_audio()
    samples_S = torch.cat(list(read_audio(path)))[: int(arguments.seconds * 16_000)]
    if arguments.calibrate:
        calibrate(samples_S)
        return
    model, weights = load(arguments.checkpoint, arguments.device)
    settings = {"model": model, "normalise": True}
    report: dict[str, Any] = {
        "weights": weights,
        "audio": path.name,
        "seconds": round(len(samples_S) / 16_000, 2),
        "device": arguments.device,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    report |= windows(settings, samples_S)
    report |= other_differences(settings, samples_S)
    print(json.dumps(report))


def load(checkpoint: Path | None, device: str) -> tuple[Any, str]:
    if checkpoint is not None:
        return Wav2Vec2Features.load(checkpoint, device=device)._model, str(checkpoint.name)
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=192,
        num_hidden_layers=8,
        num_attention_heads=6,
        intermediate_size=768,
        conv_dim=(96,) * 7,
        conv_bias=True,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    return Wav2Vec2Model(config).eval().requires_grad_(False).to(device), "random, 8 layers of 192"


def windows(settings: dict[str, Any], samples_S: Tensor) -> dict[str, Any]:
    """The table: rows of context, columns of look-ahead."""
    whole_BZEA = Wav2Vec2Features(**settings).encode_whole(samples_S, FPS)
    print(f"{len(samples_S) / 16_000:.1f} s of sound; relative difference from the whole file, all states\n")
    print("context s | look-ahead ms: " + "".join(f"{1000 * s:8.0f}" for s in LOOKAHEADS_S) + "   ms per chunk")
    table: dict[str, dict[str, float]] = {}
    cost_ms: dict[str, float] = {}
    for context_s in CONTEXTS_S:
        row: dict[str, float] = {}
        for lookahead_s in LOOKAHEADS_S:
            encoder = Wav2Vec2Features(**settings, context_s=context_s, lookahead_s=lookahead_s, statistics_s=math.inf)
            started_s = time.perf_counter()
            streamed_BZEA = stream(encoder, samples_S, total_samples=len(samples_S))
            chunk_ms = 1000 * (time.perf_counter() - started_s) / (len(samples_S) / 7680)
            row[f"{1000 * lookahead_s:.0f}"] = round(difference(streamed_BZEA, whole_BZEA), 4)
            cost_ms[f"{context_s:g}"] = round(chunk_ms, 1)
        table[f"{context_s:g}"] = row
        print(f"{context_s:9.1f} | {'':14}" + "".join(f"{value:8.4f}" for value in row.values()), end="")
        print(f"   {cost_ms[f'{context_s:g}']:8.1f}")
    return {"difference_by_context_s_and_lookahead_ms": table, "ms_per_chunk_by_context_s": cost_ms}


def other_differences(settings: dict[str, Any], samples_S: Tensor) -> dict[str, Any]:
    """What remains when the window is as long as the file: statistics and interpolation, each by itself."""
    everything = {"context_s": math.inf, "lookahead_s": math.inf}
    encoder = Wav2Vec2Features(**settings, **everything, statistics_s=math.inf)
    whole_BZEA = encoder.encode_whole(samples_S, FPS)
    known_BZEA = stream(encoder, samples_S, total_samples=len(samples_S))
    endless_BZEA = stream(encoder, samples_S)
    # The widest window that still streams, with the statistics of the whole file and with running ones.
    near = {"context_s": 1e6, "lookahead_s": 1.28}
    by_statistics: dict[str, float] = {}
    for statistics_s in (2.0, 8.0, 30.0, math.inf):
        running = Wav2Vec2Features(**settings, **near, statistics_s=statistics_s)
        standard = Wav2Vec2Features(**{**settings, "normalise": False}, **near)
        standard_S = (samples_S - samples_S.mean()) / (samples_S.var(correction=0) + 1e-7).sqrt()
        by_statistics[f"{statistics_s:g}"] = round(
            difference(stream(running, samples_S), stream(standard, standard_S)), 4
        )
    report = {
        "difference_hearing_everything": difference(known_BZEA, whole_BZEA),
        "difference_by_ratio_5_to_3": round(difference(endless_BZEA, whole_BZEA), 4),
        "difference_by_running_statistics_s": by_statistics,
    }
    print()
    for name, value in report.items():
        print(f"{name.replace('_', ' ')}: {value}")
    return report


def stream(encoder: Wav2Vec2Features, samples_S: Tensor, **options: Any) -> Tensor:
    opened = encoder.stream(FPS, **options)
    return torch.cat([opened.push(samples_S), opened.finish()], dim=-1)


def difference(one_BZEA: Tensor, other_BZEA: Tensor) -> float:
    A = min(one_BZEA.shape[-1], other_BZEA.shape[-1])
    one_BZEA, other_BZEA = one_BZEA[..., :A], other_BZEA[..., :A]
    return float((one_BZEA - other_BZEA).square().mean().sqrt() / other_BZEA.square().mean().sqrt())


def calibrate(samples_S: Tensor) -> None:
    """Mean and deviation of what `LogMelFeatures` sees, speech brought to -26 dBFS."""
    samples_S = samples_S * 10 ** (-26 / 20) / samples_S.square().mean().sqrt()
    features_ZEA = LogMelFeatures().encode_whole(samples_S, FPS)[0]
    moments_Z2EA = features_ZEA.unflatten(1, (2, -1))
    bands_ZA, energy_ZA = moments_Z2EA[:, :, :-1].flatten(1), moments_Z2EA[:, :, -1].flatten(1)
    report = {
        "scaled_band_mean": round(float(bands_ZA[0].mean()), 3),
        "scaled_band_std_level_change_turn": [round(float(row.std()), 3) for row in bands_ZA],
        "scaled_energy_mean": round(float(energy_ZA[0].mean()), 3),
        "scaled_energy_std": round(float(energy_ZA[0].std()), 3),
        "constants": {
            "band": [log_mel._BAND_MEAN, log_mel._BAND_STD],
            "energy": [log_mel._ENERGY_MEAN, log_mel._ENERGY_STD],
            "change": list(log_mel._CHANGE_STD),
        },
    }
    print(json.dumps(report))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"InputError: {error}") from error
