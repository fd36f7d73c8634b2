"""Train the causal video VAE on clips, then encode clips for the video model.

    streamdiff train codec --data faces --out codec
    streamdiff train encode --data faces --codec codec/codec.safetensors --out latents

The codec is `streamdiff.models.vae` at small size, encoder and decoder together: patches of 16x16 pixels and 4 frames
folded into channels, causal convolutions that stream, and past them a linear projection. It begins as the principal
components of patches (`principal_start`), which alone reach what convolutions from random weights need hours for; the
convolutions then learn what is left. Loss: squared and absolute error of pixels and absolute error of their differences
to the neighbours in space and time, heavier around the mouth; the posterior's divergence from a unit normal, so lightly
that it only keeps latents in bounds.

Channels are scaled by their deviation to the power 0.7, not 1: the first components, which carry most of the picture,
stay larger than the last, and a video model that errs by the same amount everywhere errs less where it is seen.

Axes: B clips, C channels, T frames, H height, W width, N clips on disk, Z hidden states, E width, A video frames.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from streamdiff import checkpoint, presets, rng
from streamdiff.config import VAEConfig
from streamdiff.errors import ConfigError
from streamdiff.models import vae
from streamdiff.models.audio import LogMelFeatures
from streamdiff.models.vae import VAEDecoder, VAEEncoder, from_rgb8
from streamdiff.options import Number, Whole
from streamdiff.output import alone_in
from streamdiff.tensorfile import save_tensors
from streamdiff.training import recipe
from streamdiff.training.data.clip import ALL_PROMPTS, FPS, FRAME_SAMPLES
from streamdiff.training.data.shards import Shards
from streamdiff.training.loop import Part, Trainer

logger = logging.getLogger(__name__)

DIVERGENCE = 1e-4
SQUARES, EDGES, MOTION, BORDER = 20.0, 0.5, 1.0, 3.0
"""Weights of squared error, and of differences between neighbours in the picture and in time, beside that of the
absolute error; and how much more the last counts from one latent frame to the next, where pictures tend to jump."""
_SCALE_POWER = 0.7
_FIRST_LOG_VARIANCE = -6.0


class Codec(nn.Module):
    """Encoder and decoder under the names of the published file."""

    def __init__(self, config: VAEConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.enc, self.dec = VAEEncoder(config), VAEDecoder(config)
        vae.initialise(self.enc, seed=seed)
        vae.initialise(self.dec, seed=seed)

    def posterior(self, frames_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents of whole clips, ``[B, C, 1 + (T - 1) / factor, h, w]``."""
        size = frames_BCTHW.shape[3:]
        pasts = self.enc.initial_state(height=size[0], width=size[1], num_streams=len(frames_BCTHW)).pasts
        factor, moments = self.config.temporal_factor, []
        for group in frames_BCTHW[:, :, :1], *frames_BCTHW[:, :, 1:].split(factor, dim=2):
            x_BCTHW, pasts = self.enc.encoder(vae.fold(group, self.config), pasts, first=not moments)
            moments.append(self.enc.conv1(x_BCTHW))
        mean, log_variance = torch.cat(moments, 2).chunk(2, dim=1)
        return mean, log_variance.clamp(-12.0, 4.0)

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Frames of whole clips, not clamped."""
        h, w = latents_BCTHW.shape[3:]
        pasts = self.dec.initial_state(latent_h=h, latent_w=w, num_streams=len(latents_BCTHW)).pasts
        frames: list[Tensor] = []
        for z_BC1HW in latents_BCTHW.split(1, dim=2):
            x_BCTHW, pasts = self.dec.decoder(self.dec.conv2(vae.channels_last(z_BC1HW)), pasts, first=not frames)
            frames.append(vae.unfold(x_BCTHW, self.config, first=not frames))
        return torch.cat(frames, 2)


@torch.no_grad()
def visibility(codec: Codec, latents_BCTHW: Tensor) -> Tensor:
    """How much a small error in each channel of these latents changes pixels, ``[C]``; 1 in the root mean square."""
    shown = codec.decode(latents_BCTHW)
    changes: list[Tensor] = []
    for channel in range(latents_BCTHW.shape[1]):
        other = latents_BCTHW.clone()
        other[:, channel] += 0.1 * rng.normal(tuple(other[:, channel].shape), "visibility", channel).to(other)
        changes.append((codec.decode(other) - shown).square().mean())
    change_C = torch.stack(changes)
    return (change_C / change_C.mean()).sqrt()


def attention_map(size: int) -> Tensor:
    """How much a pixel ``[H, W]`` of a portrait matters: the face twice, the mouth ten times as much as the wall."""
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    x, y = axis[None, :], axis[:, None]
    face = (((x - 0.5) / 0.26) ** 2 + ((y - 0.5) / 0.32) ** 2 < 1).float()
    mouth = torch.exp(-(((x - 0.5) / 0.13) ** 2 + ((y - 0.63) / 0.09) ** 2))
    return 1 + face + 8 * mouth


def disturbance(shape: tuple[int, ...], largest: float, *key: int | str) -> Tensor:
    """Errors such as a video model makes, up to ``largest``: of each latent value, and of each of its patches of 2x2.

    What neighbouring patches disagree on is seen as tiles; a decoder that has met it smooths it away.
    """
    B, C, T, H, W = shape
    each = rng.normal(shape, "disturb", *key)
    patches = rng.normal((B, C, T, (H + 1) // 2, (W + 1) // 2), "disturb patches", *key)
    patches = patches.repeat_interleave(2, 3).repeat_interleave(2, 4)[..., :H, :W]
    generator = torch.Generator().manual_seed(rng.seed_of("disturb how much", *key))
    amount = largest * torch.rand(B, 1, 1, 1, 1, generator=generator)
    return amount * (0.6 * each + 0.8 * patches)


def codec_loss(
    codec: Codec, frames_BCTHW: Tensor, noise: Tensor, disturbed: Tensor | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch and what it is made of.

    ``noise``: standard normal, shaped like the latents. ``disturbed``: what is added to the latents instead; then the
    encoder does not learn.
    """
    with torch.set_grad_enabled(disturbed is None):
        mean, log_variance = codec.posterior(frames_BCTHW)
    drawn = codec.decode(mean + ((0.5 * log_variance).exp() * noise if disturbed is None else disturbed))
    weight_HW = attention_map(frames_BCTHW.shape[3]).to(frames_BCTHW)
    error = (drawn - frames_BCTHW) * weight_HW
    pixels = error.abs().mean()
    squares = (weight_HW * (drawn - frames_BCTHW).square()).mean()
    edges = error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()
    steps_T = error.diff(dim=2).abs().mean((0, 1, 3, 4))
    at_border_T = torch.arange(len(steps_T), device=steps_T.device) % codec.config.temporal_factor == 0
    motion = torch.where(at_border_T, BORDER * steps_T, steps_T).mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    loss = pixels + SQUARES * squares + EDGES * edges + MOTION * motion + DIVERGENCE * divergence
    psnr = -10 * torch.log10(F.mse_loss(drawn.detach().clamp(-1, 1), frames_BCTHW) / 4)
    facts = {"pixels": pixels, "edges": edges, "motion": motion, "divergence": divergence, "psnr_db": psnr}
    return loss, {name: float(value.detach()) for name, value in facts.items()}


def codec_batch(shards: Shards, step: int, *, seed: int, size: int, latents: int, factor: int) -> Tensor:
    """Frames ``[B, 3, 1 + (latents - 1) * factor, H, W]`` in [-1, 1]; a function of (seed, step)."""
    generator = np.random.default_rng(rng.seed_of("codec batch", seed, step))
    length = 1 + (latents - 1) * factor
    clips: list[Tensor] = []
    for _ in range(size):
        index = int(generator.integers(len(shards)))
        first = int(generator.integers(shards.num_frames - length + 1))
        clips.append(shards.frames(index, first, length))
    return from_rgb8(torch.stack(clips))


@torch.no_grad()
def principal_start(codec: Codec, frames_BCTHW: Tensor) -> float:
    """Initialise the projections as principal components of these clips' patches, and the convolutions as zero.

    Patches count by `attention_map`. Returns the PSNR in dB that the components reach on the clips themselves.
    """
    config, z = codec.config, codec.config.z_dim
    if not config.projects:
        raise ConfigError("principal components need a codec that projects patches; set projects=True in its config")
    patches_NC = vae.fold(frames_BCTHW[:, :, 1:], config).movedim(1, -1).flatten(0, 3)
    cells_HW = attention_map(frames_BCTHW.shape[3]).unflatten(1, (-1, config.patch)).unflatten(0, (-1, config.patch))
    weight_N = cells_HW.mean((1, 3)).flatten().repeat(len(patches_NC) // cells_HW.shape[0] // cells_HW.shape[2])
    mean_C = (weight_N @ patches_NC) / weight_N.sum()
    centred_NC = (patches_NC - mean_C) * weight_N.sqrt().unsqueeze(1)
    covariance = centred_NC.T @ centred_NC / weight_N.sum()
    values, vectors = torch.linalg.eigh(covariance.double())
    basis_CZ = vectors[:, -z:].flip(1).float()
    # A sign that does not depend on the linear algebra library.
    basis_CZ *= basis_CZ.gather(0, basis_CZ.abs().argmax(0, keepdim=True)).sign()
    std_Z = values[-z:].flip(0).clamp_min(1e-8).sqrt().float() ** _SCALE_POWER
    std_Z *= (values[-z:].flip(0).float().clamp_min(1e-8) / std_Z.square()).mean().sqrt()
    enc, dec = codec.enc.encoder, codec.dec.decoder
    assert enc.projection is not None
    assert dec.projection is not None
    for trunk in (enc, dec):
        *_, (_, last) = trunk.head.pairs()
        last.weight.zero_()
        _bias(last).zero_()
    for conv in (codec.enc.conv1, codec.dec.conv2):
        conv.weight.copy_(torch.eye(len(conv.weight)).view_as(conv.weight))
        _bias(conv).zero_()
    enc.projection.weight.zero_()
    enc.projection.weight[:z, :, 0, 0, 0] = basis_CZ.T / std_Z.unsqueeze(1)
    offset_Z = _bias(enc.projection)
    offset_Z[:z] = -(mean_C @ basis_CZ) / std_Z
    offset_Z[z:] = _FIRST_LOG_VARIANCE
    dec.projection.weight[:, :, 0, 0, 0] = basis_CZ * std_Z
    _bias(dec.projection).copy_(mean_C)
    drawn = codec.decode(codec.posterior(frames_BCTHW[:8])[0]).clamp(-1, 1)
    return float(-10 * torch.log10(F.mse_loss(drawn, frames_BCTHW[:8]) / 4))


def _bias(conv: nn.Conv3d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def save_codec(codec: Codec, path: Path, *, facts: Mapping[str, object]) -> None:
    """Both halves in one fp16 file, under the names of the published VAE; the config goes along."""
    tensors = {name: value.half().contiguous() for half in (codec.enc, codec.dec)
               for name, value in half.state_dict().items()}  # fmt: skip
    config = {name: value for name, value in dataclasses.asdict(codec.config).items() if value != ()}
    save_tensors(tensors, path, {"vae": json.dumps(config), "facts": json.dumps(dict(facts))})


def load_codec(path: Path, config: VAEConfig) -> Codec:
    """A trained codec. Raises CheckpointError when the file is of another shape."""
    codec = Codec(config)
    stored = checkpoint.read_safetensors(path)
    halves = [(half, half.state_dict()) for half in (codec.enc, codec.dec)]
    expected = {name: tuple(t.shape) for _, own in halves for name, t in own.items()}
    checkpoint.check_names_and_shapes(expected, {n: tuple(t.shape) for n, t in stored.items()}, what=str(path))
    for half, own in halves:
        checkpoint.load_strict(half, {name: stored[name] for name in own}, what=str(path))
    return codec.eval().requires_grad_(False)


@torch.inference_mode()
def encode_clips(codec: Codec, shards: Shards, encoder: LogMelFeatures, *, progress: Callable[[], object] | None = None
                 ) -> tuple[dict[str, Tensor], dict[str, str]]:  # fmt: skip
    """Latents, references, sound and prompts of all clips, and metadata; fp16.

    The first frame of a clip only opens the codec's stream: its latent is dropped, and its sound with it.
    """
    latents, references, sounds, prompts = [], [], [], []
    texts = {text: i for i, text in enumerate(ALL_PROMPTS)}
    for index in range(len(shards)):
        clip = shards.clip(index)
        frames = from_rgb8(torch.from_numpy(clip.frames_THWC)[None])
        photo = from_rgb8(torch.from_numpy(clip.photo_HWC)[None, None])
        latents.append(codec.enc.encode(frames)[0][0, :, 1:].half())
        references.append(codec.enc.encode(photo)[0][0, :, 0].half())
        features = encoder.encode_whole(torch.from_numpy(clip.sound_S), FPS)[0]
        sounds.append(features[..., 1 : len(clip.sound_S) // FRAME_SAMPLES].half())
        prompts.append(texts.setdefault(clip.prompt, len(texts)))
        if progress is not None:
            progress()
    tensors = {
        "latent": torch.stack(latents),
        "reference": torch.stack(references),
        "audio": torch.stack(sounds),
        "prompt": torch.tensor(prompts),
        "visibility": visibility(codec, torch.stack([latent[:, :4] for latent in latents[:2]]).float()),
    }
    return tensors, {"prompts": json.dumps(list(texts))}


class CodecTask:
    """What `streamdiff.training.loop` runs: one batch a step."""

    def __init__(
        self,
        codec: Codec,
        shards: Shards,
        *,
        batch: int,
        latents: int,
        lr: float,
        seed: int,
        disturb: float | None = None,
    ) -> None:
        self.codec = codec
        if disturb is not None:
            codec.enc.requires_grad_(False)
        self.parts = {"codec": Part(module=codec, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, average=0.995)}
        self._shards, self._batch, self._latents, self._seed = shards, batch, latents, seed
        self._disturb = disturb

    def frames(self, step: int) -> Tensor:
        """The batch of a step."""
        factor = self.codec.config.temporal_factor
        frames = codec_batch(
            self._shards, step, seed=self._seed, size=self._batch, latents=self._latents, factor=factor
        )
        return frames.to(self.codec.enc.conv1.weight.device)

    def gradients(self, step: int) -> Mapping[str, float]:
        frames_BCTHW = self.frames(step)
        cells = frames_BCTHW.shape[3] // self.codec.config.spatial_factor
        shape = (len(frames_BCTHW), self.codec.config.z_dim, self._latents, cells, cells)
        noise = rng.normal(shape, "codec noise", self._seed, step).to(frames_BCTHW.device)
        disturbed = None
        if self._disturb is not None:
            disturbed = disturbance(shape, self._disturb, self._seed, step).to(noise)
        loss, facts = codec_loss(self.codec, frames_BCTHW, noise, disturbed)
        loss.backward()
        return {"loss": float(loss.detach()), **facts}

    @torch.no_grad()
    def held_out_psnr_db(self) -> float:
        """Of whole clips at the end of the shards."""
        errors: list[Tensor] = []
        for index in range(max(0, len(self._shards) - 8), len(self._shards)):
            frames = from_rgb8(self._shards.frames(index)[None]).to(self.codec.enc.conv1.weight.device)
            drawn = self.codec.decode(self.codec.posterior(frames)[0]).clamp(-1, 1)
            errors.append(F.mse_loss(drawn, frames))
        return float(-10 * torch.log10(torch.stack(errors).mean() / 4))


_START_BATCHES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``streamdiff train codec``."""
    recipe.add_training_arguments(parser, data="folder of clips (streamdiff train data)", batch=6, lr=4e-4)
    add = parser.add_argument
    add("--latents", type=Whole(2, 64), default=5, help="latent frames of a clip (default: %(default)s)")
    add("--disturb", type=Number(0, 10, above=True), metavar="SIZE",
        help="teach the decoder of --init, and it alone, to bear errors of this size in its latents")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train the codec."""
    config = recipe.preset_of(args)
    shards = Shards(args.data)
    if shards.size != config.height or shards.size != config.width:
        raise ConfigError(
            f"the clips are {shards.size} pixels wide, the preset {config.name} shows {config.width}x{config.height}; "
            "draw clips of that size, or choose another preset"
        )
    if args.disturb is not None and (args.init is None or args.disturb <= 0):
        raise ConfigError(
            "--disturb teaches a trained codec's decoder: give that codec with --init, and a size above 0"
        )
    codec = Codec(config.vae, seed=args.seed) if args.init is None else load_codec(args.init, config.vae)
    codec.requires_grad_(True).to(args.device)
    task = CodecTask(
        codec, shards, batch=args.batch, latents=args.latents, lr=args.lr, seed=args.seed, disturb=args.disturb
    )
    if args.init is None and config.vae.projects and not args.resume:
        first = torch.cat([task.frames(-1 - number) for number in range(_START_BATCHES)])
        logger.info("principal components alone: %.1f dB", principal_start(codec, first))

    def sample(trainer: Trainer) -> None:
        with trainer.averaged("codec"):
            trainer.note({"held_out_psnr_db": task.held_out_psnr_db()})

    def finish(trainer: Trainer) -> list[Path]:
        path = args.out / "codec.safetensors"
        with trainer.averaged("codec"):
            facts = {**trainer.facts, "steps": trainer.step, "held_out_psnr_db": round(task.held_out_psnr_db(), 2)}
            save_codec(codec, path, facts=facts)
        return [path]

    facts = {"preset": config.name, "seed": args.seed, "batch": args.batch, "latents": args.latents, "lr": args.lr,
             "clips": len(shards), "init": args.init, "disturb": args.disturb}  # fmt: skip
    plan = recipe.plan_of(args, budget="10min", warmup_steps=50)
    return recipe.conduct("codec", task, args, plan, facts=facts, sample=sample, finish=finish)


def add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``streamdiff train encode``."""
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder of clips (streamdiff train data)")
    add("--codec", type=Path, required=True, metavar="FILE", help="trained codec (streamdiff train codec)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for latents.safetensors")
    add("--preset", default="portrait", choices=sorted(presets.PRESETS), help="which model (default: %(default)s)")


def run_encode(args: argparse.Namespace) -> int:
    """Encode clips for the video model."""
    config = presets.preset(args.preset)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    audio = config.dit.audio
    if audio is None:
        raise ConfigError(f"preset {config.name} does not listen; choose one that does, such as portrait")
    codec, shards = load_codec(args.codec, config.vae), Shards(args.data)
    with tqdm(total=len(shards), unit="clip", disable=None) as bar:
        encoder = LogMelFeatures(num_bands=audio.feature_dim // 2 - 1)
        tensors, facts = encode_clips(codec, shards, encoder, progress=bar.update)
    path = args.out / "latents.safetensors"
    with alone_in(args.out, "latents"):
        save_tensors(tensors, path, {**facts, "config": config.name})
    logger.info("wrote %s: %d clips", path, len(shards))
    return 0
