"""The detector of closed lips: ``streamdiff train seals`` teaches it to hear p, b and m.

    streamdiff train seals --out run/seals --budget 20min

Sentences and rare words are read aloud by a synthetic voice, whose phonemes have known times, at drawn pitch, tract and
speed; two of three get noise of drawn colour, 8 to 40 dB below the speech, and all a gain. What is drawn depends on
``(seed, number)``, a step on ``(seed, step)`` alone.

    A frames   F mel values of a frame   S samples
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from streamdiff import rng
from streamdiff.arrays import Floats
from streamdiff.avatar.cues import FRAME_SAMPLES, NUM_MEL, SILENT_MEL, State, mel_of
from streamdiff.avatar.kinematics import FPS
from streamdiff.avatar.seal import AHEAD, BILABIALS, PAST, SealDetector, spectra
from streamdiff.options import Whole
from streamdiff.training import recipe
from streamdiff.training.avatar.spoken import Talk, draw_voice
from streamdiff.training.avatar.visemes import CLOCK_HZ
from streamdiff.training.loop import Part, Trainer
from streamdiff.training.sentences import lexicon_words, sentence
from streamdiff.voice import HibariVoice, Phoneme

WEIGHTS = "seal_detector.safetensors"
_HELD_OUT_FROM = 1_000_000
"""Numbers of the readings that are judged begin here."""


def closed(phonemes: Sequence[Phoneme], num_frames: int) -> Floats:
    """Share of each frame ``[A]`` in which a bilabial is said."""
    closed_T = np.zeros(num_frames * CLOCK_HZ // FPS, np.float32)
    for symbol, start_s, end_s in phonemes:
        if symbol and symbol in BILABIALS:
            start = round(start_s * CLOCK_HZ)
            closed_T[start : max(round(end_s * CLOCK_HZ), start + 1)] = 1.0
    return closed_T.reshape(num_frames, -1).mean(axis=1)


def reading(voice: HibariVoice, number: int, *, seed: int, words: Sequence[str]) -> tuple[Floats, Sequence[Phoneme]]:
    """Some sentences read aloud: sound ``[S]`` of whole frames and phonemes; a function of (seed, number)."""
    generator = np.random.default_rng(rng.seed_of("reading", seed, number))
    draw_voice(voice, generator)
    talk = Talk()
    talk.rest(int(generator.integers(2, 20)), State.IDLE)
    for _ in range(4):
        talk.say(voice, sentence(generator, words))
        talk.say(voice, " ".join(words[int(k)] for k in generator.integers(len(words), size=8)) + ".")
    return np.concatenate(talk.sound), talk.phonemes


def with_noise(samples_S: Floats, below_db: float, colour: float, generator: np.random.Generator) -> Floats:
    """Noise under speech, ``below_db`` softer than it; its power falls with frequency to the power ``colour``."""
    power = samples_S[np.abs(samples_S) > 0.01] ** 2
    spectrum = np.fft.rfft(generator.standard_normal(len(samples_S)))
    spectrum[1:] *= np.arange(1, len(spectrum)) ** (-colour / 2)
    noise_S = np.fft.irfft(spectrum, len(samples_S))
    scale = np.sqrt(power.mean()) / noise_S.std() * 10 ** (-below_db / 20)
    return (samples_S + scale * noise_S).astype(np.float32)


def _degraded(samples_S: Floats, generator: np.random.Generator) -> Floats:
    if generator.random() < 0.67:
        samples_S = with_noise(samples_S, generator.uniform(8, 40), generator.uniform(0, 1.5), generator)
    return samples_S * np.float32(10 ** (generator.uniform(-12, 8) / 20))


def mel_with_borders(samples_S: Floats) -> Floats:
    """Log-mel of whole frames ``[PAST + A + AHEAD, F]``, silence around them."""
    mel_AF = mel_of(np.concatenate([np.zeros(FRAME_SAMPLES, np.float32), samples_S]))
    mel_AF = mel_AF[len(mel_AF) - len(samples_S) // FRAME_SAMPLES :]
    quiet = np.full((PAST, NUM_MEL), SILENT_MEL, np.float32)
    return np.concatenate([quiet, mel_AF, quiet[:AHEAD]])


class SealTask:
    """What `streamdiff.training.loop` runs: a batch of frames a step, drawn from ``minutes`` of readings."""

    def __init__(
        self, model: SealDetector, minutes: float, *, batch: int, lr: float, seed: int, device: str = "cpu"
    ) -> None:
        self.parts = {
            "seals": Part(module=model, lr=lr, betas=(0.9, 0.999), weight_decay=1e-2, average=0.998, final_lr=0.02)
        }
        self._model, self._batch, self._seed, self._device = model, batch, seed, device
        voice, words = HibariVoice(), lexicon_words()
        mel: list[Floats] = []
        truth: list[Floats] = []
        at: list[NDArray[np.int64]] = []
        while sum(map(len, at)) < minutes * 60 * FPS:
            samples_S, phonemes = reading(voice, len(at), seed=seed, words=words)
            generator = np.random.default_rng(rng.seed_of("reading noise", seed, len(at)))
            num_frames, first = len(samples_S) // FRAME_SAMPLES, sum(map(len, mel))
            mel.append(mel_with_borders(_degraded(samples_S, generator)))
            truth.append(closed(phonemes, num_frames))
            at.append(np.arange(first, first + num_frames, dtype=np.int64))
        self._mel_AF = torch.from_numpy(np.concatenate(mel))
        self._closed_A = torch.from_numpy(np.concatenate(truth))
        self._at_A = torch.from_numpy(np.concatenate(at))

    def gradients(self, step: int) -> Mapping[str, float]:
        generator = torch.Generator().manual_seed(rng.seed_of("seal batch", self._seed, step))
        chosen = torch.randint(len(self._at_A), (self._batch,), generator=generator)
        around = self._at_A[chosen, None] + torch.arange(PAST + 1 + AHEAD)
        heard = self._mel_AF[around].view(self._batch, -1, self._mel_AF.shape[1] // 4)
        # Nine frames of ten are open.
        odds_A, wanted_A = self._model(heard.to(self._device)), self._closed_A[chosen].to(self._device)
        value = F.binary_cross_entropy_with_logits(odds_A, wanted_A, pos_weight=_RARE.to(self._device))
        value.backward()
        return {"loss": float(value.detach())}


_RARE = torch.tensor(2.0)


@torch.inference_mode()
def judged(model: SealDetector, *, seed: int, readings: int = 12, below_db: float | None = None) -> dict[str, float]:
    """Share of bilabials that are heard within a frame of their time, and of open frames that are taken for one."""
    voice, words = HibariVoice(), lexicon_words()
    found = said = false = opened = 0
    for number in range(_HELD_OUT_FROM, _HELD_OUT_FROM + readings):
        samples_S, phonemes = reading(voice, number, seed=seed, words=words)
        if below_db is not None:
            noise = np.random.default_rng(rng.seed_of("reading noise", seed, number))
            samples_S = with_noise(samples_S, below_db, 0.5, noise)
        heard = spectra(mel_with_borders(samples_S)).to(next(model.parameters()).device)
        is_closed_A: Tensor = (model(heard) > 0).cpu()
        far_A = np.convolve(closed(phonemes, len(is_closed_A)) > 0, np.ones(3), "same") == 0
        false += int(is_closed_A.numpy()[far_A].sum())
        opened += int(far_A.sum())
        for symbol, start_s, end_s in phonemes:
            if symbol and symbol in BILABIALS:
                said += 1
                found += bool(is_closed_A[max(0, int(start_s * FPS) - 1) : int(end_s * FPS) + 2].any())
    return {"bilabials": said, "found": round(found / said, 3), "false": round(false / opened, 4)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``streamdiff train seals``."""
    parser.add_argument(
        "--minutes", type=Whole(1, 10_000), default=120, metavar="N", help="speech to draw (default: %(default)s)"
    )
    recipe.add_run_arguments(parser, batch=256, lr=3e-3, of="frames")


def run(args: argparse.Namespace) -> int:
    """Train the detector of closed lips."""
    recipe.set_machine(args)
    torch.manual_seed(args.seed)
    model = SealDetector().to(args.device)
    task = SealTask(model, args.minutes, batch=args.batch, lr=args.lr, seed=args.seed, device=args.device)

    def finish(trainer: Trainer) -> list[Path]:
        path = args.out / WEIGHTS
        recipe.save_average(trainer, "seals", path, dtype=torch.float16)
        with trainer.averaged("seals"):
            for below_db in (None, 25.0, 15.0):
                facts = {"noise_db": below_db, **judged(model, seed=args.seed, below_db=below_db)}
                sys.stdout.write(json.dumps(facts) + "\n")
        return [path]

    facts = {name: getattr(args, name) for name in ("seed", "batch", "lr", "minutes")}
    plan = recipe.plan_of(args, budget="20min", warmup_steps=200)
    return recipe.conduct("seals", task, args, plan, facts=facts, finish=finish)
