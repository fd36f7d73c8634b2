"""Any rate, channel count and container arrives as 16 kHz mono blocks, in time; what cannot says why."""

from __future__ import annotations

import io
import os
import tracemalloc
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from streamdiff.errors import InputError
from streamdiff.media import audio_duration_s, read_audio
from tests.media.made_files import tone, write_film, write_sound


def _read(path: Path) -> torch.Tensor:
    return torch.cat(list(read_audio(path)))


def _frequency(samples_S: torch.Tensor, rate_hz: int = 16_000) -> float:
    spectrum = torch.fft.rfft(samples_S * torch.hann_window(len(samples_S))).abs()
    return float(spectrum.argmax()) * rate_hz / len(samples_S)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_rates(tmp_path: Path, rate_hz: int) -> None:
    path = write_sound(tmp_path / "voice.wav", tone(1.5, rate_hz), rate_hz)
    samples_S = _read(path)
    assert samples_S.dtype == torch.float32
    assert abs(len(samples_S) - 24_000) <= 2
    assert _frequency(samples_S) == pytest.approx(440, abs=1)
    assert float(samples_S[2000:-2000].abs().max()) == pytest.approx(0.5, rel=0.02)
    assert audio_duration_s(path) == pytest.approx(1.5, abs=1e-4)


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 22_050, 44_100, 48_000, 192_000])
def test_resampling_does_not_move_a_click(tmp_path: Path, rate_hz: int) -> None:
    samples_NS = np.zeros((1, rate_hz), dtype=np.float32)
    middle = rate_hz // 2
    width = max(1, rate_hz // 8000)
    samples_NS[0, middle : middle + width] = 0.9
    path = write_sound(tmp_path / "voice.wav", samples_NS, rate_hz, codec="pcm_f32le")
    energy_S = _read(path).double().square()
    centre = float((energy_S * torch.arange(len(energy_S))).sum() / energy_S.sum())
    expected = (middle + (width - 1) / 2) / rate_hz * 16_000
    assert centre == pytest.approx(expected, abs=1.0)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg", ".m4a"])
def test_containers(tmp_path: Path, suffix: str) -> None:
    rate_hz = 48_000
    path = write_sound(tmp_path / f"voice{suffix}", tone(1.0, rate_hz, channels=2), rate_hz, layout="stereo")
    samples_S = _read(path)
    assert abs(len(samples_S) - 16_000) < 2_500
    assert _frequency(samples_S) == pytest.approx(440, abs=3)
    assert audio_duration_s(path) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    "codec", ["pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le", "pcm_mulaw"]
)
def test_sample_formats_share_one_scale(tmp_path: Path, codec: str) -> None:
    path = write_sound(tmp_path / "voice.wav", tone(0.5, 16_000), 16_000, codec=codec)
    samples_S = _read(path)
    assert torch.allclose(samples_S, torch.from_numpy(tone(0.5, 16_000)[0]), atol=0.02)


@pytest.mark.parametrize(("layout", "channels"), [("mono", 1), ("stereo", 2), ("5.1", 6), ("7.1", 8)])
def test_channels_are_averaged(tmp_path: Path, layout: str, channels: int) -> None:
    samples_NS = np.zeros((channels, 16_000), dtype=np.float32)
    samples_NS[0] = tone(1.0, 16_000)[0]
    path = write_sound(tmp_path / "voice.wav", samples_NS, 16_000, layout=layout)
    expected_S = torch.from_numpy(tone(1.0, 16_000)[0]) / channels
    assert torch.allclose(_read(path), expected_S, atol=1e-4)


def test_eight_planar_channels(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "voice.m4a", tone(1.0, 48_000, channels=8), 48_000, layout="7.1")
    samples_S = _read(path)
    assert _frequency(samples_S) == pytest.approx(440, abs=3)
    assert float(samples_S[4000:-4000].abs().max()) == pytest.approx(0.5, rel=0.3)


def test_an_unusual_channel_count(tmp_path: Path) -> None:
    path = tmp_path / "voice.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(11)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.full((1600, 11), 8192, dtype="<i2").tobytes())
    assert torch.allclose(_read(path), torch.full((1600,), 0.25))


def test_the_sound_of_a_film_can_be_read(tmp_path: Path) -> None:
    write_film(tmp_path / "film.mp4", num_chunks=2, flash_frame=10)
    samples_S = _read(tmp_path / "film.mp4")
    loud = int((samples_S.abs() > 0.3).nonzero()[0])
    assert loud / 16_000 == pytest.approx(10 / 25, abs=0.002)


def test_an_open_file_can_be_read(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "voice.wav", tone(1.0, 16_000), 16_000)
    whole_S = _read(path)
    with path.open("rb") as file:
        assert torch.equal(torch.cat(list(read_audio(file))), whole_S)
    memory = io.BytesIO(path.read_bytes())
    assert audio_duration_s(memory) == pytest.approx(1.0)


@pytest.mark.heavy
def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(48_000)
        for _ in range(300):
            file.writeframes(b"\x01\x10" * 48_000)
    blocks: Iterator[torch.Tensor] = read_audio(path)
    total = sum(len(next(blocks)) for _ in range(50))
    tracemalloc.start()
    for block_S in blocks:
        total += len(block_S)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert abs(total - 300 * 16_000) <= 2
    assert peak < 500_000, "five minutes are 19 MB"


def test_what_is_not_sound_says_so_at_once(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("hello")
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "face.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    cases = {"none.wav": "no such file", "empty.wav": "empty", "text.wav": "not a sound or video file"}
    for name, what in cases.items():
        for function in (read_audio, audio_duration_s):
            with pytest.raises(InputError, match=what) as caught:
                function(tmp_path / name)
            assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="not a file"):
        read_audio(tmp_path)
    with pytest.raises(InputError, match="cannot read sound"):
        read_audio(tmp_path / "face.png")


def test_a_film_without_sound_says_so(tmp_path: Path) -> None:
    from streamdiff.media import VideoWriter

    with VideoWriter(tmp_path / "film.mp4", width=64, height=64, fps=25, rate_hz=None) as writer:
        writer.write(torch.zeros(3, 64, 64, 3, dtype=torch.uint8))
    with pytest.raises(InputError, match="no audio track"):
        read_audio(tmp_path / "film.mp4")


def test_a_track_without_samples_says_so(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "voice.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
    with pytest.raises(InputError, match=r"its audio track is empty|not a sound or video file"):
        read_audio(tmp_path / "voice.wav")


@pytest.mark.parametrize("rate_hz", [4_000, 384_000])
def test_rates_beyond_hearing_say_so(tmp_path: Path, rate_hz: int) -> None:
    path = write_sound(tmp_path / "voice.wav", tone(0.5, rate_hz), rate_hz)
    with pytest.raises(InputError, match=f"its rate is {rate_hz} Hz"):
        read_audio(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 32768.0])
def test_numbers_that_are_not_sound_say_where(tmp_path: Path, bad: float) -> None:
    samples_NS = tone(2.0, 16_000)
    samples_NS[0, 20_000] = bad
    path = write_sound(tmp_path / "voice.wav", samples_NS, 16_000, codec="pcm_f32le")
    with pytest.raises(InputError, match=r"s into it, (holds NaN|reaches 32768)"):
        list(read_audio(path))


def test_a_cut_off_file_gives_what_it_has(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "voice.wav", tone(2.0, 16_000), 16_000)
    path.write_bytes(path.read_bytes()[: 44 + 16_000])
    assert 7_000 <= len(_read(path)) <= 8_100


@pytest.mark.parametrize("suffix", [".wav", ".m3u8", ".txt"])
@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{voice}\n",
        "ffconcat version 1.0\nfile {voice}\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    ],
)
def test_a_list_of_other_files_is_not_read(tmp_path: Path, text: str, suffix: str) -> None:
    write_sound(tmp_path / "voice.wav", tone(0.5, 16_000), 16_000)
    (tmp_path / f"list{suffix}").write_text(text.format(voice="voice.wav"))
    with pytest.raises(InputError, match="not a sound or video file"):
        read_audio(tmp_path / f"list{suffix}")


@pytest.mark.parametrize(
    "name", ["concat:voice.wav|voice.wav", "subfile,,start,44,end,99,,:voice.wav", "tcp:127.0.0.1:1"]
)
def test_a_name_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_sound(tmp_path / "voice.wav", tone(0.5, 16_000), 16_000)
    with pytest.raises(InputError, match="no such file"):
        read_audio(name)
    Path(name).write_bytes(Path("voice.wav").read_bytes())
    assert sum(map(len, read_audio(name))) == 8_000


def test_ffmpeg_opens_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two locks: no container that is read names another file, and if one did, it would be a file."""
    path = write_sound(tmp_path / "voice.wav", tone(0.5, 16_000), 16_000)
    asked: list[dict[str, str]] = []
    opened = av.open

    def spied(*args: Any, options: dict[str, str], **rest: Any) -> Any:
        asked.append(options)
        return opened(*args, options=options, **rest)

    monkeypatch.setattr(av, "open", spied)
    assert len(_read(path)) == 8_000
    assert [options["protocol_whitelist"] for options in asked] == ["file"]
    opens_others = {"ALL", "concat", "dash", "hls", "image2", "imf", "lavfi", "rtsp", "sap", "sdp", "applehttp"}
    assert not opens_others & set(asked[0]["format_whitelist"].split(","))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "voice.wav")
    with pytest.raises(InputError, match="not a file"):
        read_audio(tmp_path / "voice.wav")


def test_what_a_container_claims_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_sound(tmp_path / "voice.flac", tone(0.5, 16_000), 16_000)
    data = bytearray(path.read_bytes())
    at = data.index(b"fLaC") + 8 + 13
    data[at] |= 0x0F
    data[at + 1 : at + 5] = b"\xff" * 4  # 2**36 - 1 samples: fifty days
    path.write_bytes(data)
    assert audio_duration_s(path) == 0.5
    assert not caplog.messages
    assert len(_read(path)) == 8_000
    (message,) = caplog.messages  # a long name is shortened
    assert message.endswith(" holds 0.50 s of sound, not the 4.295e+06 s that it claims")
