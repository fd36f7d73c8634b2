"""Shared by the distillation recipes: options, clips, and how a student is served, sampled and saved."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from streamdiff import flow
from streamdiff.config import EngineConfig, sparse
from streamdiff.errors import ConfigError
from streamdiff.models.dit import CausalDiT
from streamdiff.models.text import HashedText
from streamdiff.options import Whole
from streamdiff.tensorfile import save_tensors
from streamdiff.training import recipe, samples, sequence
from streamdiff.training.codec import load_codec
from streamdiff.training.latents import Batch, LatentClips
from streamdiff.training.loop import Trainer

WEIGHTS = "dit.safetensors"


def add_arguments(parser: argparse.ArgumentParser, *, lr: float) -> None:
    """Options of every recipe that makes a student."""
    recipe.add_training_arguments(parser, data="folder with latents.safetensors", batch=8, lr=lr)
    add = parser.add_argument
    add("--chunks", type=Whole(1, 64), default=7, help="chunks of a clip (default: %(default)s)")
    add(
        "--frames-per-chunk",
        type=Whole(1, 7),
        metavar="T",
        help="latent frames of a chunk, 1..7 (default: the preset's)",
    )
    add(
        "--levels",
        type=Whole(1, 50),
        metavar="N",
        help="denoising steps of the student, shift 3 (default: the preset's steps)",
    )
    add("--renoise", action=argparse.BooleanOptionalAction, help="the student's sampler (default: the preset's)")
    add("--sparse", action="store_true", help="the student sees the first, the previous and its own chunk")
    add(
        "--held-out",
        type=Whole(0, 100_000),
        default=16,
        metavar="N",
        help="clips never trained on (default: %(default)s)",
    )
    add("--bf16", action="store_true", help="multiply in bfloat16: about 1.7 times as fast on a CPU that has it")
    add("--recompute", action="store_true", help="keep one layer of activations: less memory, a third more work")
    add("--codec", type=Path, metavar="FILE", help="trained codec; with it, pictures of samples while it runs")


def served_config(args: argparse.Namespace) -> EngineConfig:
    """The preset, served as the options say."""
    config = recipe.preset_of(args)
    if args.chunks < 1:
        raise ConfigError(f"--chunks counts the chunks of a clip, at least 1, got {args.chunks}")
    if args.frames_per_chunk is not None:
        config = dataclasses.replace(config, frames_per_chunk=args.frames_per_chunk)
    if args.levels is not None:
        config = dataclasses.replace(config, sigmas=flow.shifted_grid(args.levels))
    if args.renoise is not None:
        config = dataclasses.replace(config, renoise=args.renoise)
    return config


class StudentRun:
    """The data and the tools of one run."""

    def __init__(self, args: argparse.Namespace, config: EngineConfig) -> None:
        self._args, self._config = args, config
        encoder = HashedText(config.dit.text_dim, max_tokens=config.dit.text_len)
        self.clips = LatentClips(args.data, config, encoder, held_out=args.held_out)
        self.visit = sequence.recomputed if args.recompute else sequence.directly
        self._codec = None if args.codec is None else load_codec(args.codec, config.vae)

    def load(self, path: Path) -> CausalDiT:
        """A model from a file of weights; what its clips never reach is left as it is."""
        dit = CausalDiT(self._config.dit)
        recipe.load_weights(dit, path)
        for name, parameter in dit.named_parameters():
            if name.startswith("frame_packer.") or name == "cond_encoder.weight":
                parameter.requires_grad_(False)
        return dit.to(self._args.device)

    def facts(self) -> dict[str, object]:
        """What a resumed run must agree on."""
        args, config = self._args, self._config
        served = {"sigmas": config.sigmas, "renoise": config.renoise, "frames_per_chunk": config.frames_per_chunk}
        asked = {name: getattr(args, name) for name in ("seed", "batch", "lr", "bf16", "chunks", "sparse", "init")}
        return {"preset": config.name, **served, **asked, "clips": self.clips.num_clips}

    def sample(self, dit: CausalDiT, step: int) -> None:
        """A picture of what the student makes of clips it never saw, beside the clips themselves."""
        if self._codec is None or not self.clips.held_out:
            return
        batch = self.clips.held_out_batch(self._args.chunks).to(dit.device)
        config = sparse(self._config) if self._args.sparse else self._config
        samples.draw_samples(dit, self._codec, config, batch, self._args.out / f"samples_{step:06d}.png")

    def save(self, tensors: dict[str, Tensor], trainer: Trainer) -> Path:
        """Write weights and how they are to be served."""
        path = self._args.out / WEIGHTS
        about = {**trainer.facts, "steps": str(trainer.step)}
        kept = {name: tensor.detach().cpu().float().clone().contiguous() for name, tensor in tensors.items()}
        return save_tensors(kept, path, {"facts": json.dumps(about)})


def silent(batch: Batch, empty_text_1PC: Tensor) -> Batch:
    """Unconditional batch for guidance: the same clips without sound and prompt, as the teacher was trained on."""
    return dataclasses.replace(
        batch,
        audio_BZEA=torch.zeros_like(batch.audio_BZEA),
        text_BPC=empty_text_1PC.to(batch.text_BPC).expand(len(batch.text_BPC), -1, -1),
    )


def frozen(dit: CausalDiT) -> CausalDiT:
    """A copy that never learns."""
    return copy.deepcopy(dit).requires_grad_(requires_grad=False)
