"""Compare the engine with tensors computed by the published model.

    python perf/parity.py FOLDER

FOLDER holds ``case.json`` (model configuration and stream), ``weights.safetensors`` (official names),
``inputs.safetensors`` and ``outputs.safetensors``. The chunks run through the same `DenoiseStage` that serves streams.
Prints a table, then one JSON object; exits 1 when a relative difference is above 1e-4.

Relative: largest absolute difference over largest absolute reference value of the same chunk (and step).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from streamdiff.checkpoint import load_strict
from streamdiff.config import AudioInjectionConfig, DiTConfig, EngineConfig, MemoryConfig, VAEConfig
from streamdiff.errors import StreamdiffError
from streamdiff.models.dit import CausalDiT
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.packet import Command, Packet, RefreshSink, SetReference, SwitchPrompt

LIMIT = 1e-4


def engine_config(case: dict[str, Any], *, audio_features: int) -> EngineConfig:
    """The case's stream as the engine's own configuration."""
    model = case["config"]
    latent_h, latent_w = case["latent_hw"]
    return EngineConfig(
        name="parity",
        dit=DiTConfig(
            dim=model["dim"],
            ffn_dim=model["ffn_dim"],
            num_heads=model["num_heads"],
            num_layers=model["num_layers"],
            text_dim=model["text_dim"],
            text_len=model["text_len"],
            freq_dim=model["freq_dim"],
            in_dim=model["in_dim"],
            out_dim=model["out_dim"],
            cond_dim=model["cond_dim"],
            audio=AudioInjectionConfig(
                feature_dim=model["audio_dim"],
                num_features=audio_features,
                num_tokens=model["num_audio_token"],
                inject_layers=tuple(sorted(model["audio_inject_layers"])),
            ),
        ),
        vae=VAEConfig(z_dim=model["in_dim"]),
        memory=MemoryConfig(window_chunks=case["window_blocks"]),
        sigmas=tuple(case["sigmas"]),
        height=latent_h * 8,
        width=latent_w * 8,
        frames_per_chunk=case["latent_frames_per_block"],
    )


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def compare(folder: Path) -> dict[str, float]:
    """Run the case; the largest relative differences of velocities, finished latents and the first sink."""
    case = json.loads((folder / "case.json").read_text())
    inputs = load_file(folder / "inputs.safetensors")
    outputs = load_file(folder / "outputs.safetensors")
    config = engine_config(case, audio_features=inputs["audio"].shape[1])
    dit = CausalDiT(config.dit)
    load_strict(dit, load_file(folder / "weights.safetensors"), what=str(folder / "weights.safetensors"))
    velocities: list[Tensor] = []
    stage = DenoiseStage(dit, config, range(config.num_steps), on_velocity=lambda _, v: velocities.append(v.clone()))
    frames, columns = config.frames_per_chunk, config.video_frames_per_chunk
    worst = {"max_rel_velocity": 0.0, "max_rel_latent": 0.0, "max_rel_sink": 0.0}
    first: Tensor | None = None
    print(f"{'chunk':>5}  {'velocity':>9}  {'latent':>9}")
    for chunk in range(case["blocks"]):
        commands: list[Command] = []
        if chunk == 0:
            commands += [
                SetReference(inputs["ref_latent"], inputs["motion_latents"]),
                SwitchPrompt(inputs["text"][None]),
            ]
        if chunk == case.get("sink_refresh_before_block"):
            assert first is not None
            commands.append(RefreshSink(source_chunk=0, latent_BCTHW=first[:, :, :1]))
        velocities.clear()
        packet = stage.step(
            Packet(
                chunk=chunk,
                epoch=0,
                lead=case["sink_lead"],
                latent_BCTHW=inputs["noise"][None, :, chunk * frames : (chunk + 1) * frames],
                audio_BZEA=inputs["audio"][..., chunk * columns : (chunk + 1) * columns],
                commands=tuple(commands),
            )
        )
        if chunk == 0:
            first = packet.latent_BCTHW
            worst["max_rel_sink"] = relative(stage.sink.keys(0), outputs["sink_k_layer0"])
        velocity = max(
            relative(ours[0], theirs) for ours, theirs in zip(velocities, outputs["velocity"][chunk], strict=True)
        )
        latent = relative(packet.latent_BCTHW[0], outputs["latent"][chunk])
        print(f"{chunk:>5}  {velocity:9.2e}  {latent:9.2e}")
        worst["max_rel_velocity"] = max(worst["max_rel_velocity"], velocity)
        worst["max_rel_latent"] = max(worst["max_rel_latent"], latent)
    return worst


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    if not (folder / "case.json").is_file():
        print(f"error: {folder} has no case.json; give the folder of a reference case", file=sys.stderr)
        return 2
    try:
        worst = compare(folder)
    except (StreamdiffError, OSError, KeyError, ValueError) as error:
        print(f"error: {folder} is not a complete case ({type(error).__name__}: {error})", file=sys.stderr)
        return 2
    print(json.dumps({"case": folder.name, "limit": LIMIT, **worst}))
    return int(any(not value <= LIMIT for value in worst.values()))


if __name__ == "__main__":
    sys.exit(main())
