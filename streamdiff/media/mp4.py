"""Boxes of a fragmented MP4 (ISO/IEC 14496-12, -14, -15): a header, then one whole fragment per chunk.

Written here rather than left to a muxer library because a muxer decides by itself when a fragment is
complete (it waits for the next key frame, or for the other track), and a killed process would lose what it
was still holding. Every function returns bytes and keeps nothing; what a fragment must know of the past is
passed in. The header and every fragment are a multiple of `ALIGNMENT` long, see `streamdiff.media.video`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from struct import pack

ALIGNMENT = 8
"""Size of the head of a box (length and kind), in bytes."""

_UNITY_MATRIX = pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
_SYNC_SAMPLE = 0x02000000
_DEPENDENT_SAMPLE = 0x01010000
_MEHD_BYTES = 20

_TAGS = {
    "title": b"\xa9nam",
    "artist": b"\xa9ART",
    "comment": b"\xa9cmt",
    "date": b"\xa9day",
    "encoder": b"\xa9too",
    "description": b"desc",
    "copyright": b"cprt",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoTrack:
    """One H.264 track; ``timescale`` ticks per second, every frame lasting ``frame_ticks``."""

    width: int
    height: int
    timescale: int
    frame_ticks: int
    parameter_sets: bytes
    """SPS and PPS as the encoder gives them, with start codes (Annex B)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoundTrack:
    """One AAC track; a tick is a sample."""

    rate_hz: int
    num_channels: int
    bit_rate: int
    priming_samples: int
    """Samples that the encoder puts before the first one it was given; an edit list hides them."""
    specific_config: bytes
    """AudioSpecificConfig (ISO/IEC 14496-3)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One coded frame of a track: its bytes as stored, and how many ticks it lasts."""

    data: bytes
    ticks: int
    is_key: bool = True


def nal_units(annex_b: bytes) -> list[bytes]:
    """Split a byte stream with start codes into its NAL units (ISO/IEC 14496-10, annex B).

    >>> nal_units(bytes.fromhex("00000001 6701 000001 68"))
    [b'g\\x01', b'h']
    """
    units: list[bytes] = []
    start = annex_b.find(b"\0\0\1")
    while start >= 0:
        end = annex_b.find(b"\0\0\1", start + 3)
        unit = annex_b[start + 3 : end if end >= 0 else len(annex_b)].rstrip(b"\0")
        if unit:
            units.append(unit)
        start = end
    return units


def length_prefixed(annex_b: bytes) -> bytes:
    """The same NAL units as an MP4 stores them: each behind its length in four bytes."""
    return b"".join(pack(">I", len(unit)) + unit for unit in nal_units(annex_b))


def header(
    video: VideoTrack, sound: SoundTrack | None, tags: Mapping[str, str], *, duration_ticks: int | None = None
) -> bytes:
    """File type and movie description, without any sample.

    ``duration_ticks`` is in ticks of the video. While it is None an unused box of the same size holds its
    place, so that the header can be written again over itself once the duration is known.
    """
    tracks = _video_trak(video)
    if sound is not None:
        tracks += _sound_trak(sound, duration_ticks or 0)
    num_tracks = 1 if sound is None else 2
    if duration_ticks is None:
        duration = _box(b"free", bytes(_MEHD_BYTES - 8))
    else:
        duration = _full(b"mehd", 1, 0, pack(">Q", duration_ticks))
    extends = b"".join(_full(b"trex", 0, 0, pack(">5I", track_id, 1, 0, 0, 0)) for track_id in range(1, num_tracks + 1))
    movie = _full(
        b"mvhd",
        0,
        0,
        pack(">4I", 0, 0, video.timescale, 0)
        + pack(">IH10x", 0x10000, 0x100)
        + _UNITY_MATRIX
        + pack(">24xI", num_tracks + 1),
    )
    file_type = _box(b"ftyp", b"iso6" + pack(">I", 1) + b"iso6iso5isommp42avc1")
    described = _box(b"moov", movie + tracks + _box(b"mvex", duration + extends) + _user_data(tags))
    return file_type + described + _box(b"free", bytes(-(len(file_type) + len(described)) % ALIGNMENT))


def fragment(
    sequence: int,
    video: Sequence[Sample],
    video_start_ticks: int,
    sound: Sequence[Sample] = (),
    sound_start_ticks: int = 0,
) -> bytes:
    """One movie fragment with its data: whole by itself, readable as soon as its last byte is on disk."""
    video_data = b"".join(sample.data for sample in video)
    sound_data = b"".join(sample.data for sample in sound)

    def describe(data_offset: int) -> bytes:
        described = _full(b"mfhd", 0, 0, pack(">I", sequence))
        if video:
            described += _traf(1, video, video_start_ticks, data_offset)
        if sound:
            described += _traf(2, sound, sound_start_ticks, data_offset + len(video_data))
        return _box(b"moof", described)

    # Offsets count from the first byte of the moof box; its size does not depend on their value.
    data_offset = len(describe(0)) + 8
    padding = bytes(-(data_offset + len(video_data) + len(sound_data)) % ALIGNMENT)
    return describe(data_offset) + _box(b"mdat", video_data + sound_data + padding)


def _box(kind: bytes, body: bytes) -> bytes:
    return pack(">I4s", 8 + len(body), kind) + body


def _full(kind: bytes, version: int, flags: int, body: bytes) -> bytes:
    return _box(kind, pack(">I", version << 24 | flags) + body)


def _traf(track_id: int, samples: Sequence[Sample], start_ticks: int, data_offset: int) -> bytes:
    default_base_is_moof = 0x020000
    offset_duration_size_flags = 0x000701
    rows = b"".join(
        pack(">3I", sample.ticks, len(sample.data), _SYNC_SAMPLE if sample.is_key else _DEPENDENT_SAMPLE)
        for sample in samples
    )
    return _box(
        b"traf",
        _full(b"tfhd", 0, default_base_is_moof, pack(">I", track_id))
        + _full(b"tfdt", 1, 0, pack(">Q", start_ticks))
        + _full(b"trun", 0, offset_duration_size_flags, pack(">Ii", len(samples), data_offset) + rows),
    )


def _trak(
    track_id: int,
    *,
    timescale: int,
    handler: tuple[bytes, bytes],
    media_header: bytes,
    sample_entry: bytes,
    size: tuple[int, int] = (0, 0),
    edits: bytes = b"",
) -> bytes:
    enabled_in_movie = 3
    volume = 0x100 if handler[0] == b"soun" else 0
    track = _full(
        b"tkhd",
        0,
        enabled_in_movie,
        pack(">5I8x", 0, 0, track_id, 0, 0)
        + pack(">4H", 0, 0, volume, 0)
        + _UNITY_MATRIX
        + pack(">2I", size[0] << 16, size[1] << 16),
    )
    undetermined_language = 0x55C4
    media = _full(b"mdhd", 0, 0, pack(">4IHH", 0, 0, timescale, 0, undetermined_language, 0))
    media += _full(b"hdlr", 0, 0, pack(">I4s12x", 0, handler[0]) + handler[1] + b"\0")
    in_this_file = _full(b"url ", 0, 1, b"")
    no_samples = b"".join(_full(kind, 0, 0, bytes(4)) for kind in (b"stts", b"stsc")) + (
        _full(b"stsz", 0, 0, bytes(8)) + _full(b"stco", 0, 0, bytes(4))
    )
    media += _box(
        b"minf",
        media_header
        + _box(b"dinf", _full(b"dref", 0, 0, pack(">I", 1) + in_this_file))
        + _box(b"stbl", _full(b"stsd", 0, 0, pack(">I", 1) + sample_entry) + no_samples),
    )
    return _box(b"trak", track + edits + _box(b"mdia", media))


def _video_trak(video: VideoTrack) -> bytes:
    bt709_limited = _box(b"colr", b"nclx" + pack(">3HB", 1, 1, 1, 0))
    entry = _box(
        b"avc1",
        pack(">6xH16x", 1)
        + pack(">HHIIIH32xHh", video.width, video.height, 0x480000, 0x480000, 0, 1, 0x18, -1)
        + _box(b"avcC", _decoder_configuration(video.parameter_sets))
        + bt709_limited,
    )
    return _trak(
        1,
        timescale=video.timescale,
        handler=(b"vide", b"video"),
        media_header=_full(b"vmhd", 0, 1, bytes(8)),
        sample_entry=entry,
        size=(video.width, video.height),
    )


def _decoder_configuration(parameter_sets: bytes) -> bytes:
    """AVCDecoderConfigurationRecord (ISO/IEC 14496-15, 5.3.3.1)."""
    by_type = {7: list[bytes](), 8: list[bytes]()}
    for unit in nal_units(parameter_sets):
        by_type.get(unit[0] & 0x1F, []).append(unit)
    sequence_sets, picture_sets = by_type[7], by_type[8]
    assert sequence_sets, "the encoder was opened without global headers"
    profile, constraints, level = sequence_sets[0][1:4]
    four_byte_lengths = 0xFC | 3
    record = bytes([1, profile, constraints, level, four_byte_lengths, 0xE0 | len(sequence_sets)])
    record += b"".join(pack(">H", len(unit)) + unit for unit in sequence_sets)
    record += bytes([len(picture_sets)]) + b"".join(pack(">H", len(unit)) + unit for unit in picture_sets)
    if profile in (100, 110, 122, 144):
        record += bytes([0xFC | 1, 0xF8, 0xF8, 0])  # 4:2:0, 8 bits of luma, 8 of chroma, no extension sets
    return record


def _sound_trak(sound: SoundTrack, movie_ticks: int) -> bytes:
    entry = _box(
        b"mp4a",
        pack(">6xH8x", 1) + pack(">4HI", sound.num_channels, 16, 0, 0, sound.rate_hz << 16) + _esds(sound),
    )
    # A duration of 0 lets the edit last as long as the fragments do (14496-12, 8.6.6).
    skip_priming = _full(b"elst", 1, 0, pack(">IQqI", 1, movie_ticks, sound.priming_samples, 0x10000))
    return _trak(
        2,
        timescale=sound.rate_hz,
        handler=(b"soun", b"sound"),
        media_header=_full(b"smhd", 0, 0, bytes(4)),
        sample_entry=entry,
        edits=_box(b"edts", skip_priming),
    )


def _esds(sound: SoundTrack) -> bytes:
    """Elementary stream descriptor (ISO/IEC 14496-1, 7.2.6.5)."""

    def descriptor(tag: int, body: bytes) -> bytes:
        assert len(body) < 128
        return bytes([tag, len(body)]) + body

    aac, audio_stream = 0x40, 0x15
    decoder = pack(">BB3xII", aac, audio_stream, sound.bit_rate, sound.bit_rate)
    decoder += descriptor(5, sound.specific_config)
    predefined_sync = descriptor(6, b"\2")
    return _full(b"esds", 0, 0, descriptor(3, pack(">HB", 2, 0) + descriptor(4, decoder) + predefined_sync))


def _user_data(tags: Mapping[str, str]) -> bytes:
    """Tags where players look: the iTunes item list; names without a code of their own as free-form items."""
    utf8 = 1
    items = b""
    for name, value in tags.items():
        data = _box(b"data", pack(">II", utf8, 0) + value.encode())
        if name in _TAGS:
            items += _box(_TAGS[name], data)
        else:
            items += _box(
                b"----",
                _full(b"mean", 0, 0, b"com.apple.iTunes") + _full(b"name", 0, 0, name.encode()) + data,
            )
    handler = _full(b"hdlr", 0, 0, pack(">I4s", 0, b"mdir") + b"appl" + bytes(9))
    return _box(b"udta", _full(b"meta", 0, 0, handler + _box(b"ilst", items)))
