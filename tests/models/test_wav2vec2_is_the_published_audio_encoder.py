"""The whole-file encoding is the published one, and the stream tends to it as it may hear more."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff.errors import BackendError, CheckpointError, ConfigError
from streamdiff.models.audio import Wav2Vec2Features, chunks
from tests.models.test_audio_streams_equal_whole_files import cut, speech_like, streamed

transformers = pytest.importorskip("transformers")


def tiny_config(stable: bool = True, **changes: Any) -> Any:
    """Every stride and kernel as published, two dozen times narrower."""
    return transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16,) * 7,
        feat_extract_norm="layer" if stable else "group",
        conv_bias=stable,
        do_stable_layer_norm=stable,
        num_conv_pos_embeddings=128,
        num_conv_pos_embedding_groups=4,
        vocab_size=12,
        **changes,
    )


@pytest.fixture(scope="module", params=[True, False], ids=["large", "base"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return transformers.Wav2Vec2Model(tiny_config(stable=request.param)).eval().requires_grad_(False)


def published(model: Any, samples_S: Tensor, fps: int, batch_frames: int) -> Tensor:
    """The published functions in turn: processor, hidden states, 50 to 30 Hz, index per frame, zeros."""
    sound = samples_S.numpy()
    sound = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)
    output = model(torch.from_numpy(sound)[None], output_hidden_states=True)
    layers = list(output.hidden_states)
    # transformers 4, which the published code pins, ends the list with the normalised state.
    states_ZTE = torch.cat([*layers[: model.config.num_hidden_layers], output.last_hidden_state])
    num_moments = int(states_ZTE.shape[1] / 50.0 * 30)
    moments_ZTE = F.interpolate(
        states_ZTE.transpose(1, 2), size=num_moments, align_corners=True, mode="linear"
    ).transpose(1, 2)
    num_batches = int(num_moments / (batch_frames * (30 / fps))) + 1
    num_frames = num_batches * batch_frames
    times_s = np.linspace(0, num_frames / fps, num_frames, endpoint=False)
    columns: list[Tensor] = []
    for index in np.round(times_s * 30).astype(int):
        inside = index < num_moments
        columns.append(moments_ZTE[:, index] if inside else torch.zeros_like(moments_ZTE[:, 0]))
    return torch.stack(columns, dim=-1)[None]


def largest(x: Tensor) -> float:
    return float(x.abs().max())


@pytest.mark.parametrize("fps", [25, 16, 30])
@pytest.mark.parametrize("num_samples", [8_000, 16_000, 47_123])
def test_whole_files_are_encoded_as_published(model: Any, num_samples: int, fps: int) -> None:
    samples_S = speech_like(num_samples)
    expected_BZEA = published(model, samples_S, fps, batch_frames=48)
    encoder = Wav2Vec2Features(model)
    got_BZEA = encoder.encode_whole(samples_S, fps, num_frames=expected_BZEA.shape[-1])
    assert got_BZEA.shape == (1, encoder.num_features, encoder.feature_dim, expected_BZEA.shape[-1])
    assert largest(got_BZEA - expected_BZEA) <= 1e-5 * largest(expected_BZEA)
    unpadded_BZEA = encoder.encode_whole(samples_S, fps)
    assert torch.equal(unpadded_BZEA, got_BZEA[..., : unpadded_BZEA.shape[-1]])
    assert not got_BZEA[..., unpadded_BZEA.shape[-1] :].any()


@pytest.mark.parametrize("num_samples", [1, 399, 400, 720, 1_500])
def test_the_shortest_sounds_have_columns(model: Any, num_samples: int) -> None:
    encoder = Wav2Vec2Features(model)
    samples_S = speech_like(num_samples)
    assert bool(torch.isfinite(encoder.encode_whole(samples_S, 25)).all())
    columns_BZEA = streamed(encoder.stream(25), [samples_S])
    assert columns_BZEA.shape[-1] == -(-num_samples // 640)
    assert bool(torch.isfinite(columns_BZEA).all())


def test_a_stream_that_hears_everything_equals_the_whole_file(model: Any) -> None:
    samples_S = speech_like(47_123)
    encoder = Wav2Vec2Features(model, context_s=math.inf, lookahead_s=math.inf, statistics_s=math.inf)
    stream = encoder.stream(25, total_samples=len(samples_S))
    got_BZEA = streamed(stream, cut(samples_S, [1000, 7]))
    whole_BZEA = encoder.encode_whole(samples_S, 25)
    assert got_BZEA.shape[-1] == -(-len(samples_S) // 640)
    assert largest(got_BZEA[..., : whole_BZEA.shape[-1]] - whole_BZEA) <= 1e-5 * largest(whole_BZEA)


def test_a_stream_is_the_same_bits_in_any_partition(model: Any) -> None:
    encoder = Wav2Vec2Features(model, context_s=0.7, lookahead_s=0.16)
    samples_S = speech_like(30_000)
    first_BZEA = streamed(encoder.stream(25), [samples_S])
    for sizes in ([160], [7680], [1, 5000, 333]):
        assert torch.equal(streamed(encoder.stream(25), cut(samples_S, sizes)), first_BZEA)


@pytest.mark.heavy
def test_more_context_and_look_ahead_come_closer_to_the_whole_file(model: Any) -> None:
    samples_S = speech_like(6 * 16_000)

    def error(context_s: float, lookahead_s: float) -> float:
        encoder = Wav2Vec2Features(model, context_s=context_s, lookahead_s=lookahead_s)
        whole_BZEA = encoder.encode_whole(samples_S, 25)
        stream = encoder.stream(25, total_samples=len(samples_S))
        difference = streamed(stream, [samples_S])[..., : whole_BZEA.shape[-1]] - whole_BZEA
        return float(difference.square().mean().sqrt() / whole_BZEA.square().mean().sqrt())

    assert error(0.0, 0.0) > error(1.4, 0.4) > error(5.0, 1.4)
    assert error(5.0, 1.4) < 0.2


def test_chunks_come_as_soon_as_their_look_ahead_is_heard(model: Any) -> None:
    encoder = Wav2Vec2Features(model, context_s=1.0, lookahead_s=0.1)
    samples_S = speech_like(40_000)
    stream = encoder.stream(25)
    assert stream.push(samples_S[: 7680 + 1599]).shape[-1] == 0
    assert stream.push(samples_S[7680 + 1599 : 7680 + 1600]).shape[-1] == 12

    other_S = samples_S.clone()
    other_S[2 * 7680 + 1600 :] = 0.5
    first_BZEA, second_BZEA = (streamed(encoder.stream(25), [sound]) for sound in (samples_S, other_S))
    assert torch.equal(first_BZEA[..., :24], second_BZEA[..., :24])
    assert not torch.equal(first_BZEA[..., 24:36], second_BZEA[..., 24:36])


def test_sound_before_the_context_is_forgotten(model: Any) -> None:
    encoder = Wav2Vec2Features(model, context_s=0.5, lookahead_s=0.0, normalise=False)
    samples_S = speech_like(5 * 7680)
    other_S = samples_S.clone()
    other_S[:7680] = 0.3
    first_BZEA, second_BZEA = (streamed(encoder.stream(25), [sound]) for sound in (samples_S, other_S))
    assert torch.equal(first_BZEA[..., 36:], second_BZEA[..., 36:])
    assert not torch.equal(first_BZEA[..., 12:24], second_BZEA[..., 12:24])


def test_cost_and_memory_per_chunk_are_flat(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Wav2Vec2Features(model, context_s=1.0, lookahead_s=0.16)
    window_samples: list[int] = []
    original = encoder.hidden_states

    def counted(samples_S: Tensor) -> Tensor:
        window_samples.append(len(samples_S))
        return original(samples_S)

    monkeypatch.setattr(encoder, "hidden_states", counted)
    stream: Any = encoder.stream(25)
    kept: list[int] = []
    for _ in range(40):
        stream.push(speech_like(7680))
        kept.append(sum(len(block_S) for block_S in stream._blocks))
    assert set(window_samples[3:]) == {16_000 + 7680 + 2560}
    assert len(set(kept[4:])) == 1
    assert kept[-1] <= 16_000 + 2 * 7680 + 2560


def test_the_length_of_a_file_moves_its_end_by_at_most_40_ms(model: Any) -> None:
    """The published interpolation pins both ends; a stream of unknown length keeps the ratio 5:3."""
    encoder = Wav2Vec2Features(model)
    drifts_ms: list[float] = []
    for num_samples in (16_000, 47_123, 160_000, 1_600_000):
        pinned, endless = encoder._time_map(num_samples), encoder._time_map(None)
        assert pinned.last is not None
        last_frame = max(i for i in range(num_samples // 640 + 2) if pinned.moment(i, 25) <= pinned.last)
        difference = pinned.position(last_frame, 25) - endless.position(last_frame, 25)
        drifts_ms.append(1000 * float(difference) / 50)
        assert pinned.position(0, 25) == endless.position(0, 25) == 0
    assert all(0 <= drift_ms <= 40 for drift_ms in drifts_ms)
    assert max(drifts_ms) > 10


def test_the_last_state_is_the_normalised_one() -> None:
    torch.manual_seed(0)
    model = transformers.Wav2Vec2Model(tiny_config()).eval().requires_grad_(False)
    model.encoder.layer_norm.weight.zero_()
    model.encoder.layer_norm.bias.fill_(3.0)
    states_ZTE = Wav2Vec2Features(model).hidden_states(speech_like(4000))
    assert states_ZTE.shape[0] == 4
    assert bool((states_ZTE[-1] == 3.0).all())
    assert not (states_ZTE[-2] == 3.0).any()


def test_running_statistics_forget(model: Any) -> None:
    """After a loud minute, a quiet voice is soon heard as if it had always been alone."""
    quiet_S, loud_S = speech_like(15 * 7680, level=0.002), speech_like(15 * 7680, level=0.2)

    def last_chunk(statistics_s: float, samples_S: Tensor) -> Tensor:
        encoder = Wav2Vec2Features(model, context_s=0.5, lookahead_s=0.0, statistics_s=statistics_s)
        return streamed(encoder.stream(25), [samples_S])[..., -12:]

    alone = last_chunk(1.0, quiet_S)
    after_loud, never_forgotten = (last_chunk(s, torch.cat([loud_S, quiet_S])) for s in (1.0, math.inf))
    assert largest(after_loud - alone) < largest(never_forgotten - alone)


def test_chunks_carry_25_hz_columns_and_their_sound(model: Any) -> None:
    encoder = Wav2Vec2Features(model, context_s=1.0)
    samples_S = speech_like(20_000)
    made = list(chunks(cut(samples_S, [512]), encoder, frames_per_chunk=12, fps=25))
    assert [tuple(audio.shape) for audio, _ in made] == [(1, 4, 32, 12)] * 3
    assert torch.equal(torch.cat([sound for _, sound in made])[:20_000], samples_S)


def _save(directory: Path, **preprocessor: Any) -> Any:
    torch.manual_seed(1)
    published_model = transformers.Wav2Vec2ForCTC(tiny_config()).eval()
    published_model.save_pretrained(directory)
    settings = {"do_normalize": True, "sampling_rate": 16_000, **preprocessor}
    transformers.Wav2Vec2FeatureExtractor(**settings).save_pretrained(directory)
    return published_model.wav2vec2


def test_a_published_directory_loads(tmp_path: Path) -> None:
    model = _save(tmp_path)
    samples_S = speech_like(8000)
    loaded = Wav2Vec2Features.load(tmp_path, context_s=2.0, hop_frames=6)
    assert loaded.normalise
    assert (loaded.context_s, loaded.hop_frames, loaded.num_features, loaded.feature_dim) == (2.0, 6, 4, 32)
    expected_BZEA = Wav2Vec2Features(model.requires_grad_(False)).encode_whole(samples_S, 25)
    assert torch.equal(loaded.encode_whole(samples_S, 25), expected_BZEA)


def test_a_model_that_was_trained_on_raw_sound_hears_raw_sound(tmp_path: Path) -> None:
    _save(tmp_path, do_normalize=False)
    assert not Wav2Vec2Features.load(tmp_path).normalise


def test_what_is_not_a_wav2vec2_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"needs config\.json"):
        Wav2Vec2Features.load(tmp_path / "none")
    _save(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    del weights["wav2vec2.encoder.layers.1.attention.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing .*layers\.1\.attention\.q_proj\.weight"):
        Wav2Vec2Features.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights" * 100)
    with pytest.raises(CheckpointError, match="cannot load wav2vec2"):
        Wav2Vec2Features.load(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackendError, match=r"pip install 'streamdiff\[encoders\]'"):
        Wav2Vec2Features.load(tmp_path)


def test_impossible_settings_say_so(model: Any) -> None:
    for settings in ({"context_s": -1.0}, {"lookahead_s": -0.1}, {"statistics_s": 0.0}, {"hop_frames": 0}):
        with pytest.raises(ConfigError, match="must"):
            Wav2Vec2Features(model, **settings)
    odd = transformers.Wav2Vec2Model(tiny_config(conv_stride=(5, 2, 2, 2, 2, 2, 1)))
    with pytest.raises(CheckpointError, match="50 hidden states per second"):
        Wav2Vec2Features(odd)
