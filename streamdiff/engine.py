"""Config in, running stream out: builds what each rank needs, and nothing more.

Only the head loads encoders, only DiT ranks load the DiT, only the decoding rank loads the VAE's decoder; what they
have to know of each other travels in packets.

    engine = Engine(presets.portrait())
    async with engine.open(image_HWC, "a person is talking") as session:
        session.push_audio(samples_S)
        async for shown in session:
            play(shown.frames_THWC, shown.sound_S)
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamdiff import checkpoint
from streamdiff.config import EngineConfig
from streamdiff.errors import ConfigError
from streamdiff.models import cost, vae
from streamdiff.models.audio import AudioChunk, AudioEncoder, Levelled, LogMelFeatures, Wav2Vec2Features
from streamdiff.models.dit import CausalDiT, initialise
from streamdiff.models.served.decoder import ServedDecoder
from streamdiff.models.served.options import StepOptions
from streamdiff.models.served.step import ServedWeights
from streamdiff.models.tae import TAEConfig, TAEDecoder
from streamdiff.models.text import HashedText, TextEncoder, UMT5Text
from streamdiff.models.vae import VAEDecoder, VAEEncoder, VideoDecoder, from_rgb8
from streamdiff.pipeline.decode import PRIMING_LATENTS, DecodeStage
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.intake import Intake
from streamdiff.pipeline.line import Line
from streamdiff.pipeline.packet import Packet, SetReference
from streamdiff.pipeline.run import LocalRanks
from streamdiff.pipeline.schedule import Role, chunks_under_way, plan
from streamdiff.pipeline.stage import Chain, KeptStage
from streamdiff.pipeline.stream import PLAYOUT_S, Ranks, VideoStream
from streamdiff.pipeline.thread_line import ThreadLine
from streamdiff.session import Opening
from streamdiff.trace import Observer
from streamdiff.voice import Synthesizer

_LARGEST_RANDOM = 200_000_000
"""Parameters above which random weights are surely a mistake, and an expensive one."""

CODEC_FILE = "codec.safetensors"
"""Where a folder of small weights keeps its codec; one that has it reads prompts and sound without weights."""

_LEAST_LIKENESS_DB = 27.0
"""PSNR through a small codec: of nine drawn heads 31.9 at least, of a photograph 20.6."""

SPEECH_FOLDER = "wav2vec2-large-xlsr-53-english"
"""Where a downloaded Wan2.2-S2V-14B keeps its speech encoder."""

logger = logging.getLogger(__name__)

_Module = TypeVar("_Module", bound=nn.Module)
_Part = TypeVar("_Part")
_Line = TypeVar("_Line", bound=Line)
_Half = TypeVar("_Half", VAEEncoder, VAEDecoder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Where the weights come from."""

    folder: Path | None = None
    """A downloaded Wan2.2-S2V-14B, or small weights of `streamdiff.training` (``diffusion_pytorch_model.safetensors``
    and ``codec.safetensors``). None: those that come with the preset, or else random ones, which paint noise."""
    lora: Path | None = None
    light_decoder: Path | None = None
    """A published TAE-kind decoder (``taew2_1``) instead of the VAE's: rougher, and many times faster."""
    seed: int = 0
    """Of random weights."""


Loading = Callable[[int, int, str], None]
"""Told while weights are loaded: parts done, parts in all, and the next one's name."""


class Engine:
    """Makes the parts of a stream for one machine.

    ``device`` is where this process computes; ``dtype`` defaults to bfloat16 on CUDA and float32 elsewhere; ``options``
    say how steps are computed.
    ``plan_only`` accepts a preset whose weights are not there, for counting and forecasting.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        weights: Weights | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        options: StepOptions | None = None,
        plan_only: bool = False,
    ) -> None:
        self.config = config
        self.options = options or StepOptions()
        self.weights = weights = weights or Weights()
        if weights.folder is None and (shipped := checkpoint.shipped(config)) is not None:
            self.weights = weights = dataclasses.replace(weights, folder=shipped)
        self.device = torch.device(device)
        self._parts: dict[str, object] = {}
        self._loading = threading.RLock()
        self._numbers = itertools.count()
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        if weights.lora is not None and weights.folder is None:
            raise ConfigError("a LoRA needs the checkpoint that it adapts; give --checkpoint as well")
        if weights.folder is None and not self.is_small and not plan_only:
            raise ConfigError(
                f"preset {config.name} has {cost.dit_parameters(config.dit) / 1e9:.1f} billion parameters and no "
                "weights of its own; give --checkpoint with the downloaded Wan2.2-S2V-14B"
            )

    @property
    def encoder_folder(self) -> Path | None:
        """Where the weights of the prompt's and the sound's encoders are; None: this model's have none."""
        folder = self.weights.folder
        return None if folder is None or (folder / CODEC_FILE).is_file() else folder

    @property
    def is_small(self) -> bool:
        """Whether random weights make sense: for trying the engine, not for wasting 30 GiB."""
        return cost.dit_parameters(self.config.dit) <= _LARGEST_RANDOM

    def load(self, progress: Loading | None = None) -> Engine:
        """Load all that streams in this process need: slow, once; opening streams afterwards is cheap. Returns itself.

        ``progress`` is told how many parts are loaded, of how many, and which is next. Safe to call again, and from any
        thread.
        """
        parts: dict[str, Callable[[], object]] = {
            "video model": self._served_weights,
            "decoder": self._kept_decoder,
            "picture encoder": self._kept_encoder,
            "text encoder": self._kept_text_encoder,
            "audio encoder": self._kept_audio_encoder,
        }
        for number, (name, load) in enumerate(parts.items()):
            if progress is not None:
                progress(number, len(parts), name)
            load()
        if progress is not None:
            progress(len(parts), len(parts), "ready")
        return self

    def stage(self, role: Role, *, seed: int = 0, stream: int = 0, observer: Observer | None = None) -> KeptStage:
        """What one rank does to a packet: its denoising steps, the decoding, or both in this order.

        Stages of one engine share its weights; each has its own memory.
        """
        stages: list[KeptStage] = []
        if role.steps:
            denoise = DenoiseStage(
                self._kept_dit(),
                self.config,
                role.steps,
                seed=seed,
                stream=stream,
                options=self.options,
                weights=self._served_weights(),
                observer=observer,
            )
            denoise.warm()
            stages.append(denoise)
        if role.decodes:
            decode = DecodeStage(self.decoder(), self.config, observer=observer)
            decode.warm()
            stages.append(decode)
        return stages[0] if len(stages) == 1 else Chain(stages)

    def intake(self, image_HWC: Tensor, prompt: str, *, seed: int = 0, stream: int = 0) -> Intake:
        """Encode the reference and the prompt, then let those encoders go: a single stream rarely needs them again.

        ``image_HWC`` is uint8 RGB of the configured size.
        """
        return Intake(
            self.config,
            self.encode_reference(image_HWC),
            self.encode_prompt(prompt),
            seed=seed,
            stream=stream,
        )

    def open(
        self,
        image_HWC: Tensor | NDArray[np.uint8],
        prompt: str,
        *,
        num_ranks: int = 1,
        seed: int = 0,
        stream: int | None = None,
        live: bool = True,
        voice: Synthesizer | None = None,
        slack_chunks: int | None = None,
        playout_s: float = PLAYOUT_S,
        deadline_s: float = 60.0,
        line: Line | None = None,
    ) -> Opening:
        """A session: ``async with engine.open(...) as session``; see `stream` for the arguments."""
        return Opening(
            lambda: self.stream(
                image_HWC,
                prompt,
                num_ranks=num_ranks,
                seed=seed,
                stream=stream,
                live=live,
                voice=voice,
                slack_chunks=slack_chunks,
                playout_s=playout_s,
                deadline_s=deadline_s,
                line=line,
            )
        )

    def stream(
        self,
        image_HWC: Tensor | NDArray[np.uint8],
        prompt: str,
        *,
        num_ranks: int = 1,
        seed: int = 0,
        stream: int | None = None,
        live: bool = False,
        voice: Synthesizer | None = None,
        slack_chunks: int | None = None,
        playout_s: float = PLAYOUT_S,
        deadline_s: float = 60.0,
        line: Line | None = None,
    ) -> VideoStream:
        """A synchronous stream in this process, its ranks as threads; see `VideoStream`. Loads what is not loaded yet.

        Args:
            image_HWC: uint8 RGB of the configured size: whose face it is.
            prompt: what happens.
            num_ranks: 1 to ``num_steps + 1``; the bits are the same.
            seed: of all noise.
            stream: number that keys the noise beside the seed; None: one that this engine has not given yet, so that
                two streams do not look alike. Same seed and number, same noise.
            live: whether time matters: a live stream fills in silence when nothing is said; otherwise sound is waited
                for.
            voice: says what `VideoStream.say` is given; None: only sound is taken.
            slack_chunks: how many chunks an interruption can take back. None: all that can be under way and one that
                a player holds, so that the stream resumes right after the last chunk played; a player that holds more
                needs as many more. At 14B each costs 2.4 GiB per step; give fewer, and an interruption resumes later.
            playout_s: playout buffer for live sound; see `streamdiff.pipeline.playout`.
            deadline_s: a rank that works longer on one chunk has failed.
            line: ranks to share with other streams, made by `line` or `streamdiff.line`, which has its own number of
                ranks, slack and deadline. None: ranks of its own.

        Raises LineFull when the line has no place for it.
        """
        number = next(self._numbers) if stream is None else stream
        seat = None
        if line is None:
            engine = self.with_slack(num_ranks, slack_chunks)
            start = engine._own_ranks(num_ranks, seed=seed, stream=number, deadline_s=deadline_s)
        else:
            engine = self._on(line, num_ranks, slack_chunks)
            seat = line.join(seed=seed, stream=number, live=live)
            start = seat.start
        try:
            text = self._kept_text_encoder()
            reference = engine.encode_reference(torch.as_tensor(image_HWC), self._kept_encoder())
            return VideoStream(
                engine.config,
                Intake(engine.config, reference, _encoded(text, prompt), seed=seed, stream=number),
                self._kept_audio_encoder(),
                start,
                encode_prompt=lambda prompt: _encoded(text, prompt),
                prompt=prompt,
                voice=voice,
                live=live,
                playout_s=playout_s,
            )
        except BaseException:
            if seat is not None:
                seat.close()
            raise

    def line(
        self, *, seats: int = 4, num_ranks: int = 1, slack_chunks: int | None = None, deadline_s: float = 60.0
    ) -> Line:
        """Ranks that many streams share, as threads of this process: loaded and warmed once, then given to `open` or
        `stream`. Close it when no stream needs it any more; it is a context manager.

        Args:
            seats: streams that may be on the line at once; each has memory of its own on every rank.
            num_ranks, slack_chunks, deadline_s: as in `stream`, for all of them.
        """
        if seats < 1:
            raise ConfigError(f"a line needs a seat for at least one stream, got seats={seats}")
        engine = self.with_slack(num_ranks, slack_chunks)
        schedule = plan(num_steps=self.config.num_steps, num_ranks=num_ranks, refresh_chunk=self.config.refresh_chunk)
        stages = [[engine.stage(role) for role in schedule.roles] for _ in range(seats)]
        return engine.rehearsed(ThreadLine(engine.config, schedule, stages, deadline_s=deadline_s))

    def rehearsed(self, line: _Line) -> _Line:
        """A line that has shown something; it is closed when it cannot."""
        try:
            self._rehearse(line)
        except BaseException:
            line.close()
            raise
        return line

    def with_slack(self, num_ranks: int, slack_chunks: int | None) -> Engine:
        """This engine, with memory for interruptions that take back all that may be under way on so many ranks."""
        memory = self.config.memory
        if slack_chunks is None:
            slack_chunks = max(memory.slack_chunks, chunks_under_way(num_ranks) + 1)
        engine = copy.copy(self)
        memory = dataclasses.replace(memory, slack_chunks=slack_chunks)
        engine.config = dataclasses.replace(self.config, memory=memory)
        return engine

    def _on(self, line: Line, num_ranks: int, slack_chunks: int | None) -> Engine:
        """This engine, with the memory that streams on a line have."""
        if num_ranks != 1 or slack_chunks is not None:
            raise ConfigError(
                f"a line has its own ranks and slack, got num_ranks={num_ranks} and slack_chunks={slack_chunks} as "
                "well; give them to Engine.line"
            )
        if dataclasses.replace(line.config, memory=self.config.memory) != self.config:
            raise ConfigError(
                f"the line serves preset {line.config.name}, configured otherwise; make it with this engine"
            )
        engine = copy.copy(self)
        engine.config = line.config
        return engine

    def _own_ranks(
        self, num_ranks: int, *, seed: int, stream: int, deadline_s: float
    ) -> Callable[[Iterator[Packet]], Ranks]:
        """Makes ranks for one stream, when it has packets."""
        config = self.config
        schedule = plan(num_steps=config.num_steps, num_ranks=num_ranks, refresh_chunk=config.refresh_chunk)
        stages = [self.stage(role, seed=seed, stream=stream) for role in schedule.roles]
        return lambda packets: LocalRanks(schedule, stages, packets, deadline_s=deadline_s, patient=True)

    def _rehearse(self, line: Line) -> None:
        """Let a stream of zeros pass, seen by nobody: what is made at its first use is there when a stream comes, and
        the line knows how long its ranks take.
        """
        config = self.config
        num_latents = max(config.motion_latents, PRIMING_LATENTS)
        still_BCTHW = torch.zeros(1, config.vae.z_dim, num_latents, *config.latent_hw)
        intake = Intake(
            config, SetReference(still_BCTHW[:, :, :1], still_BCTHW), torch.zeros(1, 1, config.dit.text_dim)
        )
        encoder = self._kept_audio_encoder()
        shape = (1, encoder.num_features, encoder.feature_dim, config.video_frames_per_chunk)
        silence = AudioChunk(torch.zeros(shape), torch.zeros(round(config.chunk_s * encoder.rate_hz)))
        seat = line.join(live=False).start(intake.packets([silence] * 3))
        try:
            while seat.get() is not None:
                pass
        finally:
            seat.close()

    @torch.inference_mode()
    def encode_reference(self, image_HWC: Tensor, encoder: VAEEncoder | None = None) -> SetReference:
        """The photograph as a latent, and as the still motion that precedes the stream and opens the decoder."""
        expected = (self.config.height, self.config.width, 3)
        if tuple(image_HWC.shape) != expected:
            raise ConfigError(f"the reference must be {list(expected)}, got {list(image_HWC.shape)}; resize it")
        encoder = self.encoder() if encoder is None else encoder
        photo_BCTHW = from_rgb8(image_HWC[None, None]).to(self.device, self.dtype)
        reference_BCTHW, _ = encoder.encode(photo_BCTHW)
        self._warn_of_a_photograph(photo_BCTHW, reference_BCTHW)
        # Without a motion prefix, the decoder still begins with a face that has long been there.
        num_latents = self.config.motion_latents or PRIMING_LATENTS
        still = 1 + (num_latents - 1) * self.config.vae.temporal_factor
        motion_BCTHW, _ = encoder.encode(photo_BCTHW.expand(-1, -1, still, -1, -1))
        return SetReference(reference_BCTHW.cpu(), motion_BCTHW.cpu())

    def _warn_of_a_photograph(self, photo_BCTHW: Tensor, reference_BCTHW: Tensor) -> None:
        """Say it when a model of our own cannot show this picture: its codec knows drawn heads only."""
        if self.weights.folder is None or not (self.weights.folder / CODEC_FILE).is_file():
            return
        frames_BCTHW, _ = self._kept_decoder().decode(reference_BCTHW)
        kept_db = _psnr_db(frames_BCTHW[:, :, -1:], photo_BCTHW)
        if kept_db < _LEAST_LIKENESS_DB:
            logger.warning(
                "%s will show this picture as a mosaic: it learned from drawn heads only, and keeps it with a PSNR of "
                "%.0f dB (drawn heads: 32 or more); for a photograph use `streamdiff talk --image`",
                self.config.name,
                kept_db,
            )

    def encode_prompt(self, prompt: str) -> Tensor:
        """Prompt embedding ``[1, P, C]``, not padded."""
        return _encoded(self.text_encoder(), prompt)

    def dit(self) -> CausalDiT:
        config = self.config.dit
        if self.weights.folder is not None:
            return checkpoint.load_dit(
                config, self.weights.folder, lora=self.weights.lora, dtype=self.dtype, device=self.device
            )
        dit = CausalDiT(config)
        initialise(dit, seed=self.weights.seed)
        return self._placed(dit)

    def encoder(self) -> VAEEncoder:
        return self._vae(VAEEncoder(self.config.vae))

    def decoder(self) -> VideoDecoder:
        """The decoder of one stream; what it captures is its own, its weights are the engine's."""
        return ServedDecoder(self._kept_decoder())

    def _read_decoder(self) -> VideoDecoder:
        if self.weights.light_decoder is None:
            return self._vae(VAEDecoder(self.config.vae))
        light = TAEDecoder(TAEConfig(z_dim=self.config.vae.z_dim))
        checkpoint.load_light_decoder(light, self.weights.light_decoder)
        return self._placed(light)

    def text_encoder(self) -> TextEncoder:
        config = self.config.dit
        if (folder := self.encoder_folder) is not None:
            return UMT5Text.load(folder)
        return HashedText(config.text_dim, max_tokens=config.text_len)

    def audio_encoder(self) -> AudioEncoder:
        audio = self.config.dit.audio
        if audio is None:
            raise ConfigError(f"preset {self.config.name} does not listen; choose one that does, such as portrait")
        if (folder := self.encoder_folder) is not None:
            return Wav2Vec2Features.load(
                folder / SPEECH_FOLDER,
                device=self.device,
                hop_frames=self.config.video_frames_per_chunk,
            )
        encoder = LogMelFeatures(num_bands=audio.feature_dim // 2 - 1)
        if (encoder.num_features, encoder.feature_dim) != (audio.num_features, audio.feature_dim):
            raise ConfigError(
                f"log-mel features come {encoder.num_features} x {encoder.feature_dim} at a time, but preset "
                f"{self.config.name} reads {audio.num_features} x {audio.feature_dim}; change its audio config"
            )
        return Levelled(encoder)  # they learned from speech at one level

    def _kept(self, name: str, load: Callable[[], _Part]) -> _Part:
        with self._loading:
            if name not in self._parts:
                self._parts[name] = load()
            return cast(_Part, self._parts[name])

    def _kept_dit(self) -> CausalDiT:
        return self._kept("dit", self.dit)

    def _served_weights(self) -> ServedWeights:
        with torch.inference_mode():
            return self._kept("served weights", lambda: ServedWeights(self._kept_dit(), self.options))

    def _kept_decoder(self) -> VideoDecoder:
        return self._kept("decoder", self._read_decoder)

    def _kept_encoder(self) -> VAEEncoder:
        return self._kept("encoder", self.encoder)

    def _kept_text_encoder(self) -> TextEncoder:
        return self._kept("text encoder", self.text_encoder)

    def _kept_audio_encoder(self) -> AudioEncoder:
        return self._kept("audio encoder", self.audio_encoder)

    def _vae(self, half: _Half) -> _Half:
        if (folder := self.weights.folder) is not None:
            small = folder / CODEC_FILE
            checkpoint.load_vae(half, small if small.is_file() else folder / "Wan2.1_VAE.pth")
        else:
            vae.initialise(half, seed=self.weights.seed)
        return self._placed(half)

    def _placed(self, module: _Module) -> _Module:
        return module.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)


@torch.inference_mode()
def _encoded(encoder: TextEncoder, prompt: str) -> Tensor:
    return encoder.encode(prompt).cpu()


def _psnr_db(found: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures in -1..1."""
    error = float((found.float().clamp(-1, 1) - expected.float()).square().mean())
    return 10 * math.log10(4 / max(error, 1e-12))
