"""A voice takes the timbre of a speaker, and keeps its own rhythm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from streamdiff.cli.main import main, parser
from streamdiff.errors import CheckpointError, ConfigError, InputError
from streamdiff.voice import Phoneme, timbre
from streamdiff.voice.encoder import GE2EEncoder, mel_spectra
from streamdiff.voice.kokoro import kokoro_names, kokoro_styles
from streamdiff.voice.timbre import adapt_timbre, fit_timbre


def test_a_timbre_is_found_among_the_mixtures_of_voices() -> None:
    rng = np.random.default_rng(0)
    voices_V256 = rng.standard_normal((5, 256)).astype(np.float32)
    wanted = 0.6 * voices_V256[1, :128] + 0.4 * voices_V256[3, :128]

    def similarity(timbre: np.ndarray) -> float:
        return -float(np.square(timbre - wanted).mean())

    found, score = fit_timbre(voices_V256, similarity, num_rounds=20)
    assert found.shape == (128,)
    assert score > 0.1 * max(similarity(v[:128]) for v in voices_V256)


def test_the_search_is_never_worse_than_the_best_known_voice() -> None:
    rng = np.random.default_rng(1)
    voices_V256 = rng.standard_normal((4, 256)).astype(np.float32)
    asked: list[np.ndarray] = []

    def similarity(timbre: np.ndarray) -> float:
        asked.append(timbre)
        return -float(np.abs(timbre - voices_V256[2, :128]).max())

    found, score = fit_timbre(voices_V256, similarity, num_rounds=3, population=5)
    assert score == 0.0
    assert np.array_equal(found, voices_V256[2, :128])
    # Mixtures only: nothing outside the hull is ever asked for.
    low, high = voices_V256[:, :128].min(axis=0), voices_V256[:, :128].max(axis=0)
    assert all((t >= low - 1e-5).all() and (t <= high + 1e-5).all() for t in asked)
    with pytest.raises(ConfigError, match="256"):
        fit_timbre(np.zeros((3, 128), np.float32), similarity)


class OneTone:
    """A voice whose timbre is a pitch."""

    rate_hz = 24_000

    def __init__(self) -> None:
        self.timbre: np.ndarray | None = None

    def phonemes(self, sentence: str) -> str:
        return sentence

    def say_phonemes(self, phonemes: str, *, breath: int = 0) -> tuple[np.ndarray, tuple[Phoneme, ...]]:
        assert self.timbre is not None
        return np.full(24_000, self.timbre[0], np.float32), ()


class Level:
    """An encoder that hears nothing but the mean."""

    def embed(self, samples_S: np.ndarray, rate_hz: int) -> np.ndarray:
        angle = float(samples_S.mean())
        return np.array([np.cos(angle), np.sin(angle)], np.float32)


def test_a_voice_is_adapted_to_a_recording() -> None:
    voices_V256 = np.zeros((3, 256), np.float32)
    voices_V256[:, 0] = [0.0, 0.5, 1.0]
    voice = OneTone()
    score = adapt_timbre(voice, voices_V256, np.full(16_000, 0.7, np.float32), 16_000, Level())  # type: ignore[arg-type]
    assert score > 0.9999
    assert voice.timbre is not None
    assert voice.timbre[0] == pytest.approx(0.7, abs=0.01)


class NamedTone(OneTone):
    """The same, opened by files as Kokoro is."""

    def __init__(self, model_path: Path, voices_path: Path, *, voice: str | None) -> None:
        super().__init__()
        self.styles_P256 = kokoro_styles(voices_path, voice)


def test_a_recording_becomes_a_voice_that_the_command_line_can_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    voices = {name: np.full((70, 1, 256), level, np.float32) for name, level in (("a", 0.0), ("b", 0.5), ("c", 1.0))}
    np.savez(tmp_path / "voices.npz", **voices)
    monkeypatch.setattr(timbre, "KokoroVoice", NamedTone)
    monkeypatch.setattr("streamdiff.voice.encoder.GE2EEncoder", lambda _: Level())
    monkeypatch.setattr("streamdiff.media.read_audio", lambda *_: iter([torch.full((24_000,), 0.7)]))
    line = f"avatar voice --recording me.wav --model k.onnx --voices {tmp_path}/voices.npz --encoder e.pt --base c"
    args = parser(line.split()).parse_args([*line.split(), "--out", str(tmp_path / "me.npz")])
    assert args.run(args) == 0
    said = capsys.readouterr().out
    assert f"kokoro:k.onnx:{tmp_path}/me.npz" in said
    assert kokoro_names(tmp_path / "me.npz") == ["me"]
    styles_P256 = kokoro_styles(tmp_path / "me.npz")
    assert styles_P256.shape == (70, 256)
    assert styles_P256[:, :128] == pytest.approx(0.7, abs=0.01)
    assert (styles_P256[:, 128:] == 1.0).all()
    for wrong in (["--rounds", "0"], ["--out", str(tmp_path / "me.bin")]):
        assert main([*line.split(), "--out", str(tmp_path / "me.npz"), *wrong]) == 2


def saved_encoder(path: Path) -> Path:
    torch.manual_seed(0)
    lstm, linear = torch.nn.LSTM(40, 256, 3, batch_first=True), torch.nn.Linear(256, 256)
    state = {f"lstm.{k}": v for k, v in lstm.state_dict().items()}
    state |= {f"linear.{k}": v for k, v in linear.state_dict().items()}
    torch.save({"model_state": {**state, "similarity_weight": torch.ones(1)}}, path)
    return path


def test_a_speaker_encoder_reads_the_published_layout(tmp_path: Path) -> None:
    encoder = GE2EEncoder(saved_encoder(tmp_path / "pretrained.pt"))
    rng = np.random.default_rng(0)
    sound_S = rng.uniform(-0.2, 0.2, 48_000).astype(np.float32)
    embedding_D = encoder.embed(sound_S, 24_000)
    assert embedding_D.shape == (256,)
    assert np.linalg.norm(embedding_D) == pytest.approx(1.0, abs=1e-5)
    assert np.array_equal(encoder.embed(sound_S, 24_000), embedding_D)
    with pytest.raises(InputError, match="at least"):
        encoder.embed(sound_S[:1000], 24_000)


def test_a_file_that_is_no_speaker_encoder_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Resemblyzer"):
        GE2EEncoder(tmp_path / "none.pt")
    torch.save({"model_state": {}}, tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("empty.pt", "text.pt"):
        with pytest.raises(CheckpointError, match="Resemblyzer's speaker encoder"):
            GE2EEncoder(tmp_path / name)


def test_mel_bands_hold_the_power_of_their_tones() -> None:
    at = np.arange(16_000) / 16_000
    low, high = (mel_spectra(np.sin(2 * np.pi * hz * at).astype(np.float32))[20:80].mean(axis=0) for hz in (300, 3000))
    assert low.shape == (40,)
    assert int(low.argmax()) < int(high.argmax())
    # Area normalisation: the same power gives a smaller value in the wider, higher band.
    assert low.max() > high.max()
