"""A drawn clip is a function of its seed and number; what is said about it is what was drawn."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from streamdiff.arrays import Floats
from streamdiff.avatar.head3d import HeadModel
from streamdiff.cli.main import main
from streamdiff.errors import ConfigError, InputError
from streamdiff.media.video import VideoWriter
from streamdiff.training.data.articulation import articulation, mouth_weights
from streamdiff.training.data.clip import FRAME_SAMPLES, NUM_FRAMES, PROMPTS, RATE_HZ, TRUTH
from streamdiff.training.data.drawn import DrawnClips
from streamdiff.training.data.recorded import RecordedClips
from streamdiff.training.data.score import compose
from streamdiff.training.data.shards import Shards, write_shards
from streamdiff.training.data.speech import leveled
from streamdiff.training.faces import Build, Look, Painter, Pose, badge_box

_FRAMES = 9


class _Hum:
    """A voice without a package: bursts of a tone, quiet between."""

    def sound(self, num_samples: int, generator: np.random.Generator) -> Floats:
        clock = np.arange(num_samples) / RATE_HZ
        gate = (np.sin(2 * np.pi * 2.5 * clock + generator.random()) > 0).astype(np.float32)
        return leveled((np.sin(2 * np.pi * 300 * clock) * gate).astype(np.float32))


def _ball() -> HeadModel:
    """A head that is a ball with two eyes' worth of vertices: enough to be drawn, with the real one's numbering."""
    count = 26719
    golden = np.pi * (3 - np.sqrt(5))
    order = np.arange(count)
    y = 1 - 2 * (order % 997 + 0.5) / 997
    angle = golden * order
    radius = np.sqrt(1 - y * y)
    neutral = 8 * np.stack([radius * np.cos(angle), y, radius * np.sin(angle)], 1).astype(np.float32)
    rows = np.arange(0, 9000)
    triangles = np.stack([rows, rows + 1, rows + 2], 1).astype(np.int64)
    both_ways = np.concatenate([triangles, triangles[:, ::-1]])
    jaw = np.zeros((count, 3), np.float32)
    jaw[5517, 1] = 2.0
    names = set(mouth_weights(articulation(np.zeros(FRAME_SAMPLES, np.float32))))
    stems = ("eyeBlink", "eyeLookIn", "eyeLookOut", "eyeLookUp", "eyeLookDown", "browOuterUp", "mouthSmile")
    names |= {f"{stem}{side}" for stem in (*stems, "cheekSquint") for side in ("Left", "Right")}
    shapes = {name: np.zeros((count, 3), np.float32) for name in (*names, "browInnerUp")}
    shapes["jawOpen"] = jaw
    return HeadModel(neutral, both_ways, np.zeros((3, count, 3), np.float32), shapes)


@pytest.fixture(scope="module")
def head() -> HeadModel:
    return _ball()


def _source(head: HeadModel, count: int = 4, first: int = 0) -> DrawnClips:
    return DrawnClips(head, _Hum(), count=count, size=32, looks=2, first=first, num_frames=_FRAMES)  # type: ignore[arg-type]


@pytest.mark.heavy
def test_a_clip_is_the_same_alone_and_among_others(head: HeadModel) -> None:
    alone = _source(head).clip(3)
    among = list(_source(head).clips(0, 4))[3]
    assert np.array_equal(alone.frames_THWC, among.frames_THWC)
    assert np.array_equal(alone.sound_S, among.sound_S)
    assert alone.prompt == among.prompt


@pytest.mark.heavy
def test_looks_share_motion_and_sound_but_not_pixels(head: HeadModel) -> None:
    a, b, other = list(_source(head).clips(0, 3))
    assert np.array_equal(a.sound_S, b.sound_S)
    assert a.truth_TE is not None
    assert b.truth_TE is not None
    moving = [i for i, name in enumerate(TRUTH) if name != "badge"]
    assert np.array_equal(a.truth_TE[:, moving], b.truth_TE[:, moving])
    assert not np.array_equal(a.frames_THWC, b.frames_THWC)
    assert not np.array_equal(a.sound_S, other.sound_S)


@pytest.mark.heavy
def test_far_numbers_give_other_people(head: HeadModel) -> None:
    assert not np.array_equal(_source(head).clip(0).photo_HWC, _source(head, first=1_000_000).clip(0).photo_HWC)


def test_a_mouth_opens_with_the_sound_and_not_before_it_is_heard() -> None:
    sound = np.zeros(20 * FRAME_SAMPLES, np.float32)
    clock = np.arange(10 * FRAME_SAMPLES) / RATE_HZ
    sound[10 * FRAME_SAMPLES :] = 0.1 * np.sin(2 * np.pi * 600 * clock)
    opened = articulation(sound)["open"]
    assert opened[:9].max() == 0
    assert opened[12:18].min() > 0.5
    # A frame hears nothing beyond its own end.
    cut = articulation(sound[: 12 * FRAME_SAMPLES])["open"]
    longer = articulation(np.concatenate([sound[: 12 * FRAME_SAMPLES], 0.5 * np.ones(FRAME_SAMPLES, np.float32)]))
    assert np.allclose(cut[:11], longer["open"][:11], atol=1e-6)


def test_truth_names_what_the_action_does(head: HeadModel) -> None:
    sound = np.zeros(40 * FRAME_SAMPLES, np.float32)
    for action, column, size in (("hand", "hand", 0.9), ("smile", "smile", 0.8), ("aside", "yaw", 0.15)):
        score = compose(head, sound, np.random.default_rng(1), action=action, calm=True)
        assert np.abs(score.truth_TE[:, TRUTH.index(column)]).mean() > size, action
        assert score.action == action
    still = compose(head, sound, np.random.default_rng(1), action="plain", calm=True)
    nods = compose(head, sound, np.random.default_rng(1), action="nod", calm=True)
    pitch = TRUTH.index("pitch")
    assert nods.truth_TE[:, pitch].std() > 2 * still.truth_TE[:, pitch].std()


def test_every_action_has_prompts() -> None:
    assert set(PROMPTS) == {"plain", "nod", "shake", "smile", "aside", "hand"}
    assert len({text for texts in PROMPTS.values() for text in texts}) == sum(map(len, PROMPTS.values()))


@pytest.mark.heavy
def test_a_raised_hand_hides_the_badge(head: HeadModel) -> None:
    generator = np.random.default_rng(0)
    painter = Painter(head, Build.draw(generator, 3), size=64)
    look = next(look for look in (Look.draw(generator) for _ in range(50)) if look.has_badge)
    rows, columns = badge_box(64)
    turn = np.zeros(3, np.float32)
    shown = painter.dress(painter.body(Pose({}, turn)), look)[rows, columns].reshape(-1, 3).astype(float)
    hidden = painter.dress(painter.body(Pose({}, turn, hand=1.0)), look)[rows, columns].reshape(-1, 3).astype(float)
    badge = 255 * np.clip(look.badge_3 * (look.ambient + 0.6 * (1 - look.ambient)), 0, 1) ** (1 / 2.2)
    assert np.abs(shown.mean(0) - badge).max() < 12
    assert np.abs(hidden.mean(0) - badge).max() > 20


@pytest.mark.slow
def test_shards_give_back_what_was_written_and_are_kept(head: HeadModel, tmp_path: Path) -> None:
    source = _source(head)
    write_shards(source, tmp_path, per_shard=3)
    shards = Shards(tmp_path)
    assert len(shards) == 4
    for index in range(4):
        mine, there = source.clip(index), shards.clip(index)
        assert np.array_equal(mine.frames_THWC, there.frames_THWC)
        assert np.array_equal(mine.photo_HWC, there.photo_HWC)
        assert np.abs(mine.sound_S - there.sound_S).max() <= 1 / 32767
        assert mine.prompt == there.prompt
        assert mine.truth_TE is not None
        assert there.truth_TE is not None
        assert np.array_equal(mine.truth_TE, there.truth_TE)
    before = {path: path.stat().st_mtime_ns for path in shards.paths}
    write_shards(source, tmp_path, per_shard=3)
    assert before == {path: path.stat().st_mtime_ns for path in shards.paths}


@pytest.mark.heavy
def test_two_parts_make_one_whole(head: HeadModel, tmp_path: Path) -> None:
    for part in range(2):
        write_shards(_source(head), tmp_path, per_shard=1, part=(part, 2))
    assert len(Shards(tmp_path)) == 4


def test_a_folder_without_clips_says_how_to_make_some(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="streamdiff train data"):
        Shards(tmp_path)
    (tmp_path / "faces-00000.safetensors").write_bytes(b"not a shard")
    with pytest.raises(InputError, match="remove it and make it anew"):
        Shards(tmp_path)


def test_recorded_clips_have_the_same_interface(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with VideoWriter(path, width=48, height=32, fps=25, rate_hz=RATE_HZ) as film:
        for frame in range(12):
            picture = torch.full((1, 32, 48, 3), 20 * frame, dtype=torch.uint8)
            film.write(picture, torch.zeros(FRAME_SAMPLES) + 0.1 * (frame % 2))
    clips = RecordedClips([path], size=16, num_frames=5)
    assert len(clips) == 2
    both = list(clips.clips(0, 2))
    assert [round(c.frames_THWC[0].mean() / 100) for c in both] == [0, 1]
    clip = clips.clip(1)
    np.testing.assert_array_equal(clip.frames_THWC, both[1].frames_THWC)
    np.testing.assert_array_equal(clip.photo_HWC, both[0].frames_THWC[0])
    assert clip.frames_THWC.shape == (5, 16, 16, 3)
    assert clip.sound_S.shape == (5 * FRAME_SAMPLES,)
    assert abs(int(clip.frames_THWC[0].mean()) - 100) < 8
    with pytest.raises(InputError, match="a clip needs 97"):
        RecordedClips([path], size=16)
    with pytest.raises(ConfigError, match="one prompt"):
        RecordedClips([path], prompts=["a", "b"], size=16, num_frames=5)


@pytest.mark.heavy
def test_videos_become_shards_from_the_command_line(tmp_path: Path) -> None:
    path, out = tmp_path / "film.mp4", tmp_path / "faces"
    with VideoWriter(path, width=48, height=32, fps=25, rate_hz=RATE_HZ) as film:
        for frame in range(2 * NUM_FRAMES + 3):
            film.write(torch.full((1, 32, 48, 3), frame, dtype=torch.uint8), 0.1 * torch.ones(FRAME_SAMPLES))
    asked = ["train", "data", "--video", str(path), "--prompt", "Somebody waits.", "--size", "16", "--out", str(out)]
    assert main(asked) == 0
    shards = Shards(out)
    assert len(shards) == 2
    assert shards.clip(1).prompt == "Somebody waits."
    assert shards.clip(1).truth_TE is None
    assert abs(int(shards.frames(1)[0].float().mean()) - NUM_FRAMES) < 8


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([], "--head .* draws them, --video"),
        (["--head", "head.npz", "--video", "film.mp4"], "--head .* draws them, --video"),
        (["--head", "head.npz", "--prompt", "A face."], "drawn clips have prompts of their own"),
    ],
)
def test_clips_come_from_one_place(
    wrong: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "data", *wrong, "--out", str(tmp_path)]) == 2
    assert re.search(says, capsys.readouterr().err)
