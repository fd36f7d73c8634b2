"""What comes in and goes out of a stream: a picture, a voice, a video that outlives a killed writer."""

from streamdiff.media.picture import contact_sheet, read_image
from streamdiff.media.sound import audio_duration_s, read_audio
from streamdiff.media.video import SYNTHETIC_MARK, VideoWriter, frame_boundary

__all__ = [
    "SYNTHETIC_MARK",
    "VideoWriter",
    "audio_duration_s",
    "contact_sheet",
    "frame_boundary",
    "read_audio",
    "read_image",
]
