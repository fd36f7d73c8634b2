"""The probe is taught what is true of each frame, can learn it, and refuses what it cannot read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from streamdiff import rng
from streamdiff.errors import InputError
from streamdiff.training import probe as probing
from streamdiff.training.data.clip import TRUTH, Clip
from streamdiff.training.data.shards import Shards, write_shards
from streamdiff.training.faces import Build, Look
from streamdiff.training.probe import (
    FEATURES,
    IDENTITY,
    WEIGHTS,
    KnownFaces,
    Probe,
    ProbeTask,
    identity_of,
    load_probe,
    probe_loss,
)

NUM_FRAMES, MODES = 5, 20


class Numbered:
    """Clips whose frames show their clip and time as grey levels, and whose mouth is as open as the time."""

    size = 128

    def __len__(self) -> int:
        return 6

    def clip(self, index: int) -> Clip:
        frames = np.zeros((NUM_FRAMES, 128, 128, 3), np.uint8)
        frames[..., 0] = 10 * index
        frames[..., 1] = 50 * np.arange(NUM_FRAMES)[:, None, None]
        truth = np.zeros((NUM_FRAMES, len(TRUTH)), np.float32)
        truth[:, TRUTH.index("opening_cm")] = np.arange(NUM_FRAMES)
        truth[:, TRUTH.index("badge")] = index % 2
        return Clip(frames, frames[0], np.zeros(640 * NUM_FRAMES, np.float32), "talk", truth)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("faces")
    write_shards(Numbered(), folder, per_shard=4)
    return Shards(folder)


def test_a_frame_is_taught_with_its_own_truth(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_worn", lambda picture, _: picture)
    faces = KnownFaces(shards, num_modes=MODES, first=70)
    frames, truth, identity = faces.batch(40, "some", 3)
    spread = probing.TRUTH_SPREAD
    for picture, seen, who in zip(frames, truth, identity, strict=True):
        clip = round((float(picture[0, 0, 0]) + 1) * 127.5 / 10)
        t = round((float(picture[1, 0, 0]) + 1) * 127.5 / 50)
        assert float(seen[0]) * spread[0] == pytest.approx(t, abs=1e-5)
        assert float(seen[-1]) * spread[-1] == pytest.approx(clip % 2)
        assert np.allclose(who, identity_of(70 + clip // 4, clip % 4, num_modes=MODES, seed=0))


def test_batches_depend_on_their_key_alone(shards: Shards) -> None:
    faces = KnownFaces(shards, num_modes=MODES)
    first, again, other = faces.batch(8, 0, 1), faces.batch(8, 0, 1), faces.batch(8, 0, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_identity_is_what_the_draws_say() -> None:
    build = Build.draw(np.random.default_rng(rng.seed_of("drawn clip", 0, 9)), MODES)
    looks = [Look.draw(np.random.default_rng(rng.seed_of("look", 0, 9, m))) for m in (0, 1)]
    one, other = (identity_of(9, m, num_modes=MODES, seed=0) for m in (0, 1))
    skull = IDENTITY.index("wall b") - 11
    assert np.array_equal(one[:skull], other[:skull]), "one skull in two looks"
    assert float(one[0]) == pytest.approx(build.identity_K[0] / 0.9, abs=1e-6)
    assert float(one[IDENTITY.index("skin g")]) * 0.2 == pytest.approx(
        float(np.clip(looks[0].colours_C3[0, 1] * looks[0].tint_3[1], 0, 1) ** (1 / 2.2)), abs=1e-5
    )
    assert not np.array_equal(one[skull:], other[skull:])


def test_a_badge_behind_a_hand_is_not_asked_for() -> None:
    answer = torch.zeros(2, len(TRUTH) + len(IDENTITY), requires_grad=True)
    truth = torch.ones(2, len(TRUTH))
    truth[0, TRUTH.index("hand")] = 0.0
    seen, _ = probe_loss(answer, truth, torch.zeros(2, len(IDENTITY)))
    seen.backward()
    assert answer.grad is not None
    badge = answer.grad[:, TRUTH.index("badge")]
    assert badge[0] != 0
    assert badge[1] == 0


@pytest.mark.heavy
def test_it_learns(shards: Shards) -> None:
    probe = Probe()
    probing._initialise(probe, seed=0)
    task = ProbeTask(probe, KnownFaces(shards, num_modes=MODES), batch=8, lr=2e-3, seed=0)
    optimiser = torch.optim.AdamW(probe.parameters(), lr=2e-3)
    losses: list[float] = []
    for step in range(40):
        optimiser.zero_grad()
        losses.append(task.gradients(step)["loss"])
        optimiser.step()
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:8])


def test_a_reading_has_named_columns_and_refuses_other_sizes() -> None:
    probe = Probe().eval()
    assert sum(p.numel() for p in probe.parameters()) < 250_000
    frames = torch.randint(0, 256, (5, 128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reading = probe.read(frames, batch=2)
    assert reading.truth_NE.shape == (5, len(TRUTH))
    assert reading.identity_NE.shape == (5, len(IDENTITY))
    assert reading.features_NF.shape == (5, FEATURES)
    assert torch.equal(reading.column("yaw"), reading.truth_NE[:, TRUTH.index("yaw")])
    assert torch.allclose(probe.read(frames).truth_NE, reading.truth_NE, atol=1e-5)
    with pytest.raises(InputError, match="128x128x3"):
        probe.read(frames[:, ::2])


def test_clips_of_unknown_truth_are_refused(tmp_path: Path) -> None:
    class Unknown(Numbered):
        def clip(self, index: int) -> Clip:
            known = super().clip(index)
            return Clip(known.frames_THWC, known.photo_HWC, known.sound_S, known.prompt, None)

    write_shards(Unknown(), tmp_path)
    with pytest.raises(InputError, match="nobody knows"):
        KnownFaces(Shards(tmp_path), num_modes=MODES)


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="the probe's weights are not there")
def test_the_shipped_probe_is_small_and_fits() -> None:
    assert WEIGHTS.stat().st_size < 1_000_000
    assert not any(p.requires_grad for p in load_probe().parameters())
