"""What an encoder says of a voice does not depend on how the voice was cut into blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamdiff.errors import ConfigError, InputError
from streamdiff.media import frame_boundary
from streamdiff.models.audio import AudioChunker, AudioEncoder, FeatureStream, LogMelFeatures, chunks


def speech_like(num_samples: int, seed: int = 0, level: float = 0.05) -> Tensor:
    """Noise with the tilt and the syllable rate of speech."""
    generator = torch.Generator().manual_seed(seed)
    noise_S = torch.randn(num_samples + 9, generator=generator)
    tilted_S = noise_S.unfold(0, 9, 1).mean(-1)[:num_samples] * 3
    time_s = torch.arange(num_samples) / 16_000
    return tilted_S * (0.5 + 0.5 * torch.sin(2 * torch.pi * 4 * time_s)) * level * 2


def cut(samples_S: Tensor, sizes: list[int]) -> list[Tensor]:
    """Blocks of the given sizes, over and over."""
    blocks: list[Tensor] = []
    start = index = 0
    while start < len(samples_S):
        blocks.append(samples_S[start : start + sizes[index % len(sizes)]])
        start, index = start + sizes[index % len(sizes)], index + 1
    return blocks


def streamed(stream: FeatureStream, blocks: list[Tensor]) -> Tensor:
    return torch.cat([*(stream.push(block_S) for block_S in blocks), stream.finish()], dim=-1)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=6),
    num_samples=st.integers(0, 20_000),
    fps=st.sampled_from([10, 24, 25, 30, 40]),
)
def test_log_mel_is_the_same_bits_in_any_partition(sizes: list[int], num_samples: int, fps: int) -> None:
    encoder = LogMelFeatures()
    samples_S = speech_like(num_samples)
    whole_BZEA = encoder.encode_whole(samples_S, fps)
    assert torch.equal(streamed(encoder.stream(fps), cut(samples_S, sizes)), whole_BZEA)
    num_frames = whole_BZEA.shape[-1]
    assert frame_boundary(num_frames, fps, 16_000) >= num_samples
    assert num_frames == 0 or frame_boundary(num_frames - 1, fps, 16_000) < num_samples


def test_log_mel_does_not_hear_the_future() -> None:
    encoder = LogMelFeatures()
    samples_S = speech_like(16_000)
    other_S = torch.cat([samples_S[:6400], speech_like(9600, seed=1)])
    first_BZEA, second_BZEA = (encoder.encode_whole(sound, 25) for sound in (samples_S, other_S))
    assert torch.equal(first_BZEA[..., :10], second_BZEA[..., :10])
    assert not torch.equal(first_BZEA[..., 10], second_BZEA[..., 10])
    assert encoder.stream(25).push(samples_S[:6400]).shape[-1] == 10


@pytest.mark.parametrize("level", [0.0, 1e-5, 0.05, 1.0, 1000.0])
def test_log_mel_is_well_scaled(level: float) -> None:
    features = LogMelFeatures().encode_whole(speech_like(32_000, level=level), 25)
    assert bool(torch.isfinite(features).all())
    assert float(features.abs().max()) <= 4.0
    if level == 0.05:
        assert abs(float(features[:, 0].mean())) < 1.0
        assert 0.3 < float(features[:, 0].std()) < 1.5
    if level == 0.0:
        assert float(features[:, 0].abs().max()) < 3.0
        assert not features[:, 1:].any()


def test_a_tone_lands_in_its_band() -> None:
    encoder = LogMelFeatures(num_bands=31)
    peaks: list[int] = []
    for hz in (200, 500, 1000, 2000, 4000):
        tone_S = 0.3 * torch.sin(2 * torch.pi * hz * torch.arange(16_000) / 16_000)
        peaks.append(int(encoder.encode_whole(tone_S, 25)[0, 0, :31, 12].argmax()))
    assert peaks == sorted(set(peaks))
    mel = [2595 * torch.log10(torch.tensor(1 + hz / 700)) for hz in (60, 200, 500, 1000, 2000, 4000, 7600)]
    expected = [float((m - mel[0]) / (mel[-1] - mel[0]) * 32 - 1) for m in mel[1:-1]]
    assert peaks == pytest.approx(expected, abs=0.75)


def test_an_onset_shows_in_its_frame() -> None:
    samples_S = torch.zeros(16_000)
    samples_S[6400:] = speech_like(9600)
    level_A = LogMelFeatures().encode_whole(samples_S, 25)[0, 0].mean(0)
    change_A = LogMelFeatures().encode_whole(samples_S, 25)[0, 1].mean(0)
    assert bool((level_A[10:] > level_A[:10].max()).all())
    assert int(change_A.argmax()) == 10


@pytest.mark.parametrize("frames_per_chunk", [1, 12])
@pytest.mark.parametrize(("fps", "num_samples"), [(25, 20_000), (25, 15_360), (24, 20_000), (25, 1)])
def test_chunks_hold_every_sample_once_and_end_in_silence(fps: int, num_samples: int, frames_per_chunk: int) -> None:
    encoder = LogMelFeatures()
    samples_S = speech_like(num_samples)
    made = list(chunks(cut(samples_S, [700, 33]), encoder, frames_per_chunk=frames_per_chunk, fps=fps))
    sound_S = torch.cat([sound for _, sound in made])
    assert torch.equal(sound_S[:num_samples], samples_S)
    assert not sound_S[num_samples:].any()
    assert len(sound_S) == frame_boundary(len(made) * frames_per_chunk, fps, 16_000)
    assert len(sound_S) - num_samples < -(-frames_per_chunk * 16_000 // fps)
    assert all(audio.shape == (1, 3, 64, frames_per_chunk) for audio, _ in made)
    whole_BZEA = encoder.encode_whole(sound_S, fps)
    assert torch.equal(torch.cat([audio for audio, _ in made], dim=-1), whole_BZEA)
    for index, (_, sound) in enumerate(made):
        start, end = (frame_boundary((index + step) * frames_per_chunk, fps, encoder.rate_hz) for step in (0, 1))
        assert len(sound) == end - start


def test_a_live_voice_gets_its_chunk_with_its_last_sample() -> None:
    chunker = AudioChunker(LogMelFeatures(), frames_per_chunk=12, fps=25)
    samples_S = speech_like(7680 * 2)
    assert chunker.push(samples_S[:7679]) == []
    assert len(chunker.push(samples_S[7679:7680])) == 1
    assert len(chunker.push(samples_S[7680:])) == 1
    assert chunker.finish() == []


def test_an_empty_voice_has_no_chunks() -> None:
    assert list(chunks([], LogMelFeatures(), frames_per_chunk=12, fps=25)) == []
    assert list(chunks([torch.zeros(0)], LogMelFeatures(), frames_per_chunk=12, fps=25)) == []


def test_memory_does_not_grow_with_the_voice() -> None:
    chunker = AudioChunker(LogMelFeatures(), frames_per_chunk=12, fps=25)
    block_S = speech_like(1600)

    def most_kept_bytes(num_blocks: int) -> int:
        kept: list[int] = []
        for _ in range(num_blocks):
            chunker.push(block_S)
            kept.append(_tensor_bytes(chunker) + _tensor_bytes(chunker._stream))
        return max(kept)

    first = most_kept_bytes(48)
    most_kept_bytes(200)
    assert most_kept_bytes(48) == first


def _tensor_bytes(owner: Any) -> int:
    total = 0
    for value in vars(owner).values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Tensor):
                total += item.untyped_storage().nbytes()
    return total


def test_bad_sound_says_so() -> None:
    encoder: AudioEncoder = LogMelFeatures()
    with pytest.raises(InputError, match="one row of mono samples"):
        encoder.stream(25).push(torch.zeros(2, 100))
    with pytest.raises(InputError, match="NaN"):
        encoder.stream(25).push(torch.tensor([0.0, float("nan")]))
    with pytest.raises(ConfigError, match="fps"):
        encoder.stream(0)
    with pytest.raises(ConfigError, match="at least one frame"):
        AudioChunker(encoder, frames_per_chunk=0, fps=25)
    with pytest.raises(ConfigError, match="num_bands"):
        LogMelFeatures(num_bands=200)
