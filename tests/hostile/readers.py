"""Readers of files without the commands that use them, as one more command: ``read KIND FILE``.

A reader answers in a hundredth of the time that its command takes, so that a fuzzer gets further; and some files are
read by commands only beside weights that do not come with the package.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from streamdiff.errors import StreamdiffError


def _picture(path: Path) -> None:
    from streamdiff.media import read_image

    assert bool(read_image(path, 64, 64).isfinite().all())


def _sound(path: Path) -> None:
    from streamdiff.media import read_audio

    for block_S in itertools.islice(read_audio(path), 3000):
        assert bool(block_S.isfinite().all())


def _footage(path: Path) -> None:
    from streamdiff.training.avatar import footage

    _, frames = footage._open(path)
    for frame in itertools.islice(frames, 50):
        assert frame.ndim == 3


def _recorded(path: Path) -> None:
    from streamdiff.training.data.recorded import RecordedClips

    clips = RecordedClips([path], size=32, num_frames=8)
    clips.clip(0)


def _recordings(path: Path) -> None:
    from streamdiff.training.data.speech import recordings_of

    recordings_of([path])


def _bundle(path: Path) -> None:
    import json

    from streamdiff.avatar.bundle import IdentityBundle
    from streamdiff.avatar.kinematics import arkit64
    from streamdiff.avatar.render import WarpRenderer

    bundle = IdentityBundle.load(path)
    json.dumps(bundle.inspect())
    assert WarpRenderer(bundle).render(arkit64().rest_E[None]).shape == (1, bundle.size, bundle.size, 3)


def _motion(path: Path) -> None:
    from streamdiff.avatar.window import load_motion

    load_motion(path)


def _light_decoder(path: Path) -> None:
    from streamdiff import presets
    from streamdiff.checkpoint import load_light_decoder
    from streamdiff.models.tae import TAEConfig, TAEDecoder

    load_light_decoder(TAEDecoder(TAEConfig(z_dim=presets.tiny().vae.z_dim)), path)


def _styles(path: Path) -> None:
    from streamdiff.voice.kokoro import kokoro_styles

    kokoro_styles(path)


def _speaker(path: Path) -> None:
    from streamdiff.voice.encoder import GE2EEncoder

    GE2EEncoder(path)


def _head(path: Path) -> None:
    from streamdiff.avatar.head3d import HeadModel

    HeadModel.load(path).vertices({"jawOpen": 1.0})


def _track(path: Path) -> None:
    from streamdiff.avatar.kinematics import arkit64, read_json_lines
    from streamdiff.tensorfile import read_bytes

    text = read_bytes(path, 1 << 24).decode("utf-8", "replace")
    read_json_lines(text.splitlines(), arkit64())


def _clips(path: Path) -> None:
    """A shard of clips, all of it."""
    from streamdiff.training.data.shards import Shards

    shards = Shards(path.parent)
    for index in range(len(shards)):
        clip = shards.clip(index)
        assert clip.frames_THWC.ndim == 4
        assert clip.sound_S.ndim == 1


def _credentials(path: Path) -> None:
    from streamdiff.trust.credentials import verify_film

    verify_film(path)


def _statement(path: Path) -> None:
    from streamdiff.trust.keys import read_small, unseal

    unseal(read_small(path, "a statement").decode("utf-8", "replace"))


def _log(path: Path) -> None:
    from streamdiff.trust.audit import verify_log

    verify_log(path)


READERS: Mapping[str, Callable[[Path], None]] = {
    "picture": _picture,
    "sound": _sound,
    "footage": _footage,
    "recorded": _recorded,
    "recordings": _recordings,
    "bundle": _bundle,
    "motion": _motion,
    "light decoder": _light_decoder,
    "styles": _styles,
    "speaker": _speaker,
    "head": _head,
    "track": _track,
    "clips": _clips,
    "credentials": _credentials,
    "statement": _statement,
    "log": _log,
}


def main(kind: str, file: str) -> int:
    """Read a file; what is wrong with it is said as the command line says it."""
    try:
        READERS[kind](Path(file))
    except StreamdiffError as error:
        print(f"streamdiff: error: {error}", file=sys.stderr)
        # Status 1 is of commands that were interrupted; here whatever is wrong is the file.
        return 2
    return 0
