"""Renderer: coefficients to pixels, by warping the reference picture, with a learned mouth behind its lips.

No frame knows of another: the same coefficients give the same bits, in minute thirty as in second one. Work
is done backwards, from the pixel that is wanted to the place in the picture that it shows:

    pixel q  -- head pose undone -->  p  -- expression undone -->  place in the reference

Where lips or lids part, the reference has nothing to show: there the mouth decoder, and the eyeballs, show
through an opening whose edge is anti-aliased. All of it is torch on the bundle's device; nothing is copied
to the host.

    A frames   E coefficients   K drivers (1 + shapes)   G cells along a side of the flow grid   H, W pixels
    U, V pixels of a window around mouth or eyes   L points along a lid or lip
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from streamdiff.avatar.bundle import GRID, IRISES, SIDES_DIFFER, SLITS, IdentityBundle
from streamdiff.avatar.kinematics import KinematicSpec, arkit64
from streamdiff.avatar.mouth import (
    EXTENT_CM,
    FACE_EXTENT_CM,
    FACE_LEFT_CM,
    FACE_TOP_CM,
    LEFT_CM,
    TOP_CM,
    LowerFaceDecoder,
    MouthDecoder,
    face_window,
    paint,
    static_conditions,
)
from streamdiff.errors import CheckpointError, InputError
from streamdiff.packaged import packaged

MAX_TURN = 0.4
"""Radians; beyond, a warp of one picture tears, so that larger turns are eased towards this."""
MAX_SHIFT = 0.3
"""Distances between the outer eye corners; likewise."""
POSE_LIMITS = (MAX_TURN,) * 3 + (MAX_SHIFT,) * 2
EYE_RADIUS_CM = 1.2
_TEETH_DROP_CM = 0.2
_JAW_DROP_CM = 3.7
_POSE_STEPS = (0.504, 3.748, 0.772, 1.048, 0.540, 2.516, 0.621, 1.565)
_CHEBYSHEV = (0.563, 0.282, 1.334, 0.396, 0.889, 0.315)
"""Step lengths that solve ``flow(q) = -forward(q + flow(q))`` for slopes of -0.3 .. 2.6 (nodes of the Chebyshev
polynomial over one plus the slope): eyelid skin stretches that much, and plain repetition would swing. The steps of
pose, likewise, for slopes of -0.75 .. 1."""
_CURVE_STEPS = 4


def as_motion(motion_AE: Tensor | NDArray[np.float32], spec: KinematicSpec) -> Tensor:
    """Motion as float32 ``[A, E]``, checked.

    Raises `InputError` for another width, or, where it is on the host, for numbers that are not finite.
    """
    if motion_AE.ndim != 2 or motion_AE.shape[1] != spec.num_coefs:
        raise InputError(f"motion of {spec.name!r} is [A, {spec.num_coefs}], got {list(motion_AE.shape)}")
    if isinstance(motion_AE, np.ndarray):
        motion_AE = torch.from_numpy(np.array(motion_AE, np.float32))  # torch takes no read-only memory
    motion = motion_AE.float()
    if motion.device.type == "cpu" and not bool(torch.isfinite(motion).all()):
        raise InputError("motion holds values that are not finite; find the frame with numpy.isfinite")
    return motion


@functools.cache
def _bundled_mouth() -> dict[str, Tensor]:
    return load_file(packaged("mouth_decoder.safetensors"))


def load_mouth_decoder(device: torch.device | str = "cpu") -> MouthDecoder:
    """The mouth decoder that comes with the library, ready to run."""
    decoder = MouthDecoder()
    decoder.load_state_dict({name: value.float() for name, value in _bundled_mouth().items()})
    return decoder.to(device).eval().requires_grad_(False)


def _person_decoder(bundle: IdentityBundle, device: torch.device) -> LowerFaceDecoder | None:
    if not bundle.decoder:
        return None
    decoder = LowerFaceDecoder()
    try:
        decoder.load_state_dict({name: value.float() for name, value in bundle.decoder.items()})
    except RuntimeError as error:
        raise CheckpointError(f"the decoder of bundle {bundle.name!r} does not fit: {error}; fit it again") from error
    return decoder.to(device).eval().requires_grad_(False)


@dataclass(frozen=True)
class _Slit:
    """A mouth or an eye: landmarks of its two edges, and the axes in which they are functions of x."""

    edges_2L: Tensor
    curve_ML: Tensor
    """From the landmarks of an edge to a denser, smooth curve through them."""
    low: float
    span: float
    x_64: Tensor
    """Where along the slit heights are kept."""
    depth: float
    """How far below the edges, in levelled pixels, the two sides of the cut may differ."""


class WarpRenderer:
    """Draws one `IdentityBundle`. Holds no state between frames; one object per device and thread.

    ``spec`` names the columns of the motion it will be given. The learned mouth comes from the bundle when
    it was fitted to a person, else from the library.
    """

    def __init__(
        self,
        bundle: IdentityBundle,
        *,
        spec: KinematicSpec | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.bundle = bundle
        self.spec = spec or arkit64()
        self.device = torch.device(device)
        self._size = bundle.size
        self._face_columns = self.spec.part("face")
        self._face_names = self.spec.names[self._face_columns]
        self._keep_pictures()
        self._keep_placement()
        self._keep_mouth()
        self._keep_flow()
        self._keep_windows()

    def _keep_pictures(self) -> None:
        bundle, on = self.bundle, functools.partial(torch.Tensor.to, device=self.device)
        self._picture = on(bundle.reference_3HW.float())[None]
        self._eyes_picture = on(bundle.eyes_3HW.float())[None]
        self._points_J2 = on(bundle.landmarks_J3[:, :2].float())
        self._motion_KJ2 = on(bundle.motion_KJ2.float())
        self._pose = on(bundle.pose_2GG.float())[None]
        pixel = torch.arange(self._size, device=self.device) + 0.5
        self._pixels = torch.stack(torch.meshgrid(pixel, pixel, indexing="xy"))[None]

    def _keep_placement(self) -> None:
        place = self.bundle.placement
        cos, sin = math.cos(place.roll), math.sin(place.roll)
        self._level = torch.tensor([[cos, sin], [-sin, cos]], device=self.device)
        """Rows: along the lips, across the lips (downwards)."""
        self._stomion = torch.tensor(place.stomion, device=self.device)
        pivot = torch.tensor(place.pivot, device=self.device)
        self._pivot = pivot[:2].view(1, 2, 1, 1)
        self._eye_2 = torch.eye(2, device=self.device)
        self._pose_limits = torch.tensor(POSE_LIMITS, device=self.device)

    def _keep_mouth(self) -> None:
        place = self.bundle.placement
        self._mouth = load_mouth_decoder(self.device)
        self._lower_face = _person_decoder(self.bundle, self.device)
        self._face_cover = face_window().to(self.device)[None, None]
        self._look = place.look
        self._light = torch.tensor(static_conditions(place.look), device=self.device)
        self._teeth, self._flesh = (torch.tensor(c, device=self.device) for c in (place.look.teeth, place.look.flesh))
        self._gain = torch.tensor(place.gain, device=self.device).view(1, 3, 1, 1)
        corners = ((LEFT_CM, TOP_CM + _TEETH_DROP_CM), (FACE_LEFT_CM, FACE_TOP_CM))
        self._mouth_corner, self._face_corner = torch.tensor(corners, device=self.device).view(2, 1, 2, 1, 1)
        self._jaw = [
            (1 + self._face_names.index(name)) for name in ("jawOpen", "jawForward", "jawLeft", "jawRight", "tongueOut")
        ]
        self._close_and_jaw = [1 + self._face_names.index(name) for name in ("mouthClose", "jawOpen")]

    def _keep_flow(self) -> None:
        """The flow is zero far from the face: keep the part that is not."""
        bundle = self.bundle
        fields = torch.stack([bundle.upper_K2GG, bundle.lower_K2GG], 1).float()
        busy = (fields.abs().amax((0, 1, 2)) > 0.02).nonzero()
        (top, left), (bottom, right) = busy.amin(0).tolist(), (busy.amax(0) + 1).tolist()
        self._box = (top, bottom, left, right)
        fields = fields[..., top:bottom, left:right].contiguous()
        self._flow_KN = fields.flatten(1).to(self.device)
        self._flow_shape = (2, 2, bottom - top, right - left)
        cell = self._size / GRID
        axis = (torch.arange(GRID, device=self.device) + 0.5) * cell
        self._cells = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))[None]
        self._coarse_cells = functional.avg_pool2d(self._cells, 2)
        self._box_cells = self._cells[..., top:bottom, left:right].contiguous()
        self._box_low = torch.tensor([left, top], device=self.device).view(1, 2, 1, 1) * cell
        self._box_span = torch.tensor([right - left, bottom - top], device=self.device).view(1, 2, 1, 1) * cell

    def _keep_windows(self) -> None:
        self._slits = [
            self._make_slit(upper, lower, differ) for (upper, lower), differ in zip(SLITS, SIDES_DIFFER, strict=True)
        ]
        self._mouth_window = self._window(SLITS[:1], reach=1.1)
        self._face_box = self._around(FACE_LEFT_CM, FACE_TOP_CM, FACE_EXTENT_CM)
        self._eyes_window = self._window(SLITS[1:], reach=0.35)
        self._iris_2 = [self._points_J2[j] for j in IRISES]

    @property
    def size(self) -> int:
        """Side of a frame, pixels."""
        return self._size

    def _make_slit(self, upper: tuple[int, ...], lower: tuple[int, ...], differ: float) -> _Slit:
        edges = torch.tensor([upper, lower], device=self.device)
        points = (self._points_J2[edges] - self._stomion) @ self._level.T
        low, high = float(points[..., 0].min()), float(points[..., 0].max())
        margin = 0.4 * (high - low)
        depth = float(points[..., 1].max()) + differ * (high - low)
        curve, x = _smooth_curve(len(upper)), low - margin + torch.linspace(0, high - low + 2 * margin, 64)
        on = functools.partial(torch.Tensor.to, device=self.device)
        return _Slit(edges, on(curve), low - margin, high - low + 2 * margin, on(x), depth)

    def _window(self, slits: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], reach: float) -> tuple[slice, slice]:
        """Rows and columns of the frame that these slits can reach, moved by expression and pose."""
        points = self.bundle.landmarks_J3[[j for slit in slits for side in slit for j in side], :2]
        low, high = points.amin(0), points.amax(0)
        width = float(high[0] - low[0])
        wander = 0.55 * self.bundle.placement.eye_distance
        x0, x1 = float(low[0]) - wander - 0.2 * width, float(high[0]) + wander + 0.2 * width
        y0, y1 = float(low[1]) - wander - 0.3 * reach * width, float(high[1]) + wander + reach * width
        clip = functools.partial(min, self._size)
        return slice(max(int(y0), 0), clip(math.ceil(y1))), slice(max(int(x0), 0), clip(math.ceil(x1)))

    def _around(self, left_cm: float, top_cm: float, extent_cm: float) -> tuple[slice, slice]:
        """Rows and columns of the frame that a square of the head can reach, however the head is posed."""
        place = self.bundle.placement
        wander = 0.55 * place.eye_distance
        x, y = place.stomion
        x0, x1 = (x + v * place.pixels_per_cm for v in (left_cm, left_cm + extent_cm))
        y0, y1 = (y + v * place.pixels_per_cm for v in (top_cm, top_cm + extent_cm))
        clip = functools.partial(min, self._size)
        rows = slice(max(int(y0 - wander), 0), clip(math.ceil(y1 + wander)))
        return rows, slice(max(int(x0 - wander), 0), clip(math.ceil(x1 + wander)))

    @torch.inference_mode()
    def render(self, motion_AE: Tensor | NDArray[np.float32]) -> Tensor:
        """Frames ``[A, H, W, 3]``, uint8 sRGB, on the renderer's device.

        Raises `InputError` for motion of another width, or, where it is on the host, for numbers that are not
        finite. Shapes are held to 0..1; turns and shifts beyond what one picture can show are eased.
        """
        motion = as_motion(motion_AE, self.spec)
        motion = motion.to(self.device)
        frames = torch.empty(len(motion), self._size, self._size, 3, dtype=torch.uint8, device=self.device)
        # One by one: a sum over a batch of another size may differ in its last bit.
        for frame, coefs_E in zip(frames, motion, strict=True):
            frame.copy_(self.draw(coefs_E))
        return frames

    def draw(self, coefs_E: Tensor) -> Tensor:
        """One frame ``[H, W, 3]`` of checked coefficients on this device, without the checks of `render`."""
        drivers_K = self._drive(coefs_E)
        pose = self._head(coefs_E)
        upper, lower, head = self._places(drivers_K, *pose)
        points_J2 = self._points_J2 + torch.tensordot(drivers_K, self._motion_KJ2, 1)
        slits = [self._open(slit, points_J2) for slit in self._slits]
        mouth_rows, mouth_columns = self._mouth_window
        eye_rows, eye_columns = self._eyes_window
        mouth_place = self._levelled(head[..., mouth_rows, mouth_columns])
        eye_head = head[..., eye_rows, eye_columns]
        eye_place = self._levelled(eye_head)
        mouth_cover, mouth_below = _coverage(slits[0], self._slits[0], mouth_place)
        eyes = [_coverage(s, k, eye_place) for s, k in zip(slits[1:], self._slits[1:], strict=True)]
        for window, below in ((self._mouth_window, mouth_below), (self._eyes_window, eyes[0][1] | eyes[1][1])):
            above = upper[(..., *window)]
            above.copy_(torch.where(below, lower[(..., *window)], above))
        frame = self._sample(self._picture, upper)

        inside, over = self._inside_mouth(drivers_K, coefs_E, slits[0], mouth_place)
        mouth_cover = mouth_cover + (1 - mouth_cover) * over
        frame[..., mouth_rows, mouth_columns].lerp_(inside, mouth_cover)

        if self._lower_face is not None:
            rows, columns = self._face_box
            frame[..., rows, columns] += self._own_lower_face(
                self._lower_face, drivers_K, pose[0], head[..., rows, columns]
            )

        gaze = self._sample(self._eyes_picture, self._gaze(coefs_E, eye_head))
        frame[..., eye_rows, eye_columns].lerp_(gaze, eyes[0][0] + eyes[1][0])
        return frame[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)

    def _places(self, drivers_K: Tensor, turn: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each pixel shows, as places ``[1, 2, H, W]`` of the reference.

        Above the slits, below them, and with the pose alone undone.
        """
        unposed = self._undo_pose(_rotation(turn), shift, scale)
        sides = self._undo_expression(drivers_K)
        # Both sides of the slits, sampled where the pose puts them.
        place = (unposed - self._box_low) / self._box_span * 2 - 1
        moved = functional.grid_sample(
            sides, place.permute(0, 2, 3, 1).expand(2, -1, -1, -1), align_corners=False, padding_mode="zeros"
        )
        still = unposed - self._cells
        flow = functional.interpolate(
            torch.cat([still + moved[:1], still + moved[1:], still]),
            size=(self._size, self._size),
            mode="bilinear",
            align_corners=False,
        )
        upper, lower, head = (self._pixels + part for part in flow.split(1))
        return upper, lower, head

    def _drive(self, coefs_E: Tensor) -> Tensor:
        """Drivers ``[K]``: one that is always on, then the shapes, held to 0..1."""
        drivers_K = torch.cat([coefs_E.new_ones(1), coefs_E[self._face_columns].clamp(0, 1)])
        # ARKit's mouthClose undoes a jaw's opening; without one it would carry the lower lip over the nose.
        close, jaw = self._close_and_jaw
        drivers_K[close] = torch.minimum(drivers_K[close], drivers_K[jaw])
        return drivers_K

    def _sample(self, picture: Tensor, place: Tensor) -> Tensor:
        grid = (place * (2 / self._size) - 1).permute(0, 2, 3, 1)
        return functional.grid_sample(picture, grid, align_corners=False, padding_mode="border")

    def _head(self, coefs_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotation vector, shift in pixels, scale; each eased towards what a warp can show."""
        asked = torch.cat([coefs_E[self.spec.part("rotation")], coefs_E[self.spec.part("translation")]])
        turn, shift = ease_pose(asked, self._pose_limits).split((3, 2))
        scale = coefs_E[self.spec.part("scale")].clamp(0.88, 1.15)
        return turn, shift * self.bundle.placement.eye_distance, scale

    @torch.inference_mode()
    def pose(self, coefs_E: Tensor, place: Tensor) -> Tensor:
        """Where the head's pose carries places ``[1, 2, U, V]`` of the unturned picture, pixels."""
        turn, shift, scale = self._head(coefs_E.to(self.device))
        return place + self._displacement(_rotation(turn), shift, scale, place)

    def _displacement(self, turn: Tensor, shift: Tensor, scale: Tensor, place: Tensor) -> Tensor:
        scaled = scale * turn
        grid = (place * (2 / self._size) - 1).permute(0, 2, 3, 1)
        pose = functional.grid_sample(self._pose, grid, align_corners=False, padding_mode="border")
        moved = torch.einsum("ij,bjyx->biyx", scaled[:2, :2] - self._eye_2, place - self._pivot)
        return pose[:, :1] * (moved + shift.view(1, 2, 1, 1)) + pose[:, 1:] * scaled[:2, 2].view(1, 2, 1, 1)

    def _undo_pose(self, turn: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """The place ``[1, 2, G, G]`` in the unturned picture that the turned head shows in each cell."""
        # On every other cell: a pose is smooth, and a place beside the border takes all these looks to settle.
        wanted = self._coarse_cells
        place = wanted
        for step in _POSE_STEPS:
            place = torch.lerp(place, wanted - self._displacement(turn, shift, scale, place), step)
        back = functional.interpolate(place - wanted, size=(GRID, GRID), mode="bilinear", align_corners=False)
        return self._cells + back

    def _undo_expression(self, drivers_K: Tensor) -> Tensor:
        """Backward flow ``[2, 2, g, g]`` above and below the slits, within the box around the face."""
        forward = (drivers_K @ self._flow_KN).view(self._flow_shape)
        flow = -_CHEBYSHEV[0] * forward
        for step in _CHEBYSHEV[1:]:
            grid = ((self._box_cells + flow - self._box_low) / self._box_span * 2 - 1).permute(0, 2, 3, 1)
            there = functional.grid_sample(forward, grid, align_corners=False, padding_mode="border")
            flow = (1 - step) * flow - step * there
        return flow

    def _levelled(self, place: Tensor) -> Tensor:
        """Pixels to axes along and across the lips, from the middle of the lip line."""
        out = place - self._stomion.view(1, 2, 1, 1)
        return torch.einsum("ij,bjyx->biyx", self._level, out)

    def _open(self, slit: _Slit, points_J2: Tensor) -> Tensor:
        """Height of both edges of a slit over its span, ``[2, 64]``, levelled; met where they would cross."""
        edges = (points_J2[slit.edges_2L] - self._stomion) @ self._level.T
        curves = torch.einsum("ml,elc->emc", slit.curve_ML, edges)
        upper, lower = (_heights(curve, slit.x_64) for curve in curves)
        middle = (upper + lower) / 2
        return torch.stack([torch.minimum(upper, middle), torch.maximum(lower, middle)])

    def _inside_mouth(
        self, drivers_K: Tensor, coefs_E: Tensor, opening: Tensor, place: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Colours (0..255) of the mouth's inside over the window, and how much of it lies over the lips."""
        placement = self.bundle.placement
        per_cm = 1 / placement.pixels_per_cm
        jaw, forward, left, right, tongue = (drivers_K[column] for column in self._jaw)
        rotation = coefs_E[self.spec.part("rotation")]
        yaw = (placement.yaw + rotation[1]).clamp(-0.4, 0.4)
        pitch = (placement.pitch + rotation[0]).clamp(-0.4, 0.4)
        slit = self._slits[0]
        points = self._points_J2[slit.edges_2L] + torch.tensordot(drivers_K, self._motion_KJ2[:, slit.edges_2L], 1)
        edges = (points - self._stomion) @ self._level.T
        middle = edges.shape[1] // 2
        # Lowering the square shows the edge of the upper teeth, as lively lips do; the lower teeth stay.
        jaw = (jaw - _TEETH_DROP_CM / _JAW_DROP_CM).clamp(min=0)
        conditions = torch.stack(
            [
                *(jaw, forward, left - right, tongue, yaw, pitch),
                *(edges[:, middle, 1] * per_cm),
                (edges[0, -1, 0] - edges[0, 0, 0]) * (per_cm / 2),
                (edges[0, -1, 0] + edges[0, 0, 0]) * (per_cm / 2),
            ]
        )
        parts = self._mouth(torch.cat([conditions, self._light])[None])
        colours = paint(parts, self._teeth, self._flesh, self._look.gloss) * self._gain
        picture = torch.cat([colours.clamp(0, 1) * 255, parts[:, 3:]], 1)
        grid = ((place * per_cm - self._mouth_corner) * (2 / EXTENT_CM) - 1).permute(0, 2, 3, 1)
        inside = functional.grid_sample(picture, grid, align_corners=False, padding_mode="border")
        return inside[:, :3], inside[:, 3:]

    def _own_lower_face(self, decoder: LowerFaceDecoder, drivers_K: Tensor, turn: Tensor, place: Tensor) -> Tensor:
        """What the person's own lower face adds to a window of the frame (of 255)."""
        lacking = decoder(torch.cat([drivers_K[1:], turn])[None]) * (255 * self._face_cover)
        levelled = self._levelled(place) / self.bundle.placement.pixels_per_cm
        grid = ((levelled - self._face_corner) * (2 / FACE_EXTENT_CM) - 1).permute(0, 2, 3, 1)
        return functional.grid_sample(lacking, grid, align_corners=False, padding_mode="zeros")

    def _gaze(self, coefs_E: Tensor, place: Tensor) -> Tensor:
        """Where in the picture each pixel of the eyes' window looks for its eyeball."""
        gaze = torch.sin(coefs_E[self.spec.part("gaze")].clamp(-0.5, 0.5))
        reach = EYE_RADIUS_CM * self.bundle.placement.pixels_per_cm
        out = place
        # The spec names the left eye first; slits and irises have the right eye first.
        for eye, (yaw, pitch) in ((0, (gaze[2], gaze[3])), (1, (gaze[0], gaze[1]))):
            corner = self._points_J2[self._slits[1 + eye].edges_2L[0]]
            half = (corner[-1, 0] - corner[0, 0]) / 2
            centre = self._iris_2[eye].view(1, 2, 1, 1)
            away = (place - centre) / half
            # All of the iris moves alike; the corners of the eye stay.
            share = (1.35 - away.square().sum(1, keepdim=True)).clamp(0, 1)
            out = out - share * (torch.stack([yaw, pitch]).view(1, 2, 1, 1) * reach)
        return out


def _smooth_curve(points: int) -> Tensor:
    """The matrix ``[M, L]`` from points to a Catmull-Rom curve through them."""
    rows: list[Tensor] = []
    for segment in range(points - 1):
        for step in range(_CURVE_STEPS + (segment == points - 2)):
            t = step / _CURVE_STEPS
            weights = (
                (-t + 2 * t**2 - t**3) / 2,
                (2 - 5 * t**2 + 3 * t**3) / 2,
                (t + 4 * t**2 - 3 * t**3) / 2,
                (-(t**2) + t**3) / 2,
            )
            row = torch.zeros(points)
            for place, weight in enumerate(weights):
                row[min(max(segment - 1 + place, 0), points - 1)] += weight
            rows.append(row)
    return torch.stack(rows)


def _heights(curve_M2: Tensor, x: Tensor) -> Tensor:
    """The curve's y at each x, its ends carried on level; where it runs backwards, its first crossing."""
    along = torch.cummax(curve_M2[:, 0].contiguous(), 0).values
    right = torch.searchsorted(along, x).clamp(1, len(along) - 1)
    x0, x1 = along[right - 1], along[right]
    share = ((x - x0) / (x1 - x0).clamp(min=1e-4)).clamp(0, 1)
    return torch.lerp(curve_M2[right - 1, 1], curve_M2[right, 1], share)


def _coverage(opening: Tensor, slit: _Slit, place: Tensor) -> tuple[Tensor, Tensor]:
    """How much of each pixel lies between the edges (exact for level ones); whether it lies below them."""
    x, y = place[:, :1], place[:, 1:]
    steps = opening.shape[1] - 1
    at = ((x - slit.low) * (steps / slit.span)).clamp(0, steps - 1e-3)
    left = at.floor()
    share, column = at - left, left.long()
    upper, lower = (torch.lerp(edge[column], edge[column + 1], share) for edge in opening)
    inside = (torch.minimum(y + 0.5, lower) - torch.maximum(y - 0.5, upper)).clamp(0, 1)
    near = (y < slit.depth) & ((x - slit.low).clamp(0, slit.span) == x - slit.low)
    return inside, (y > (upper + lower) / 2) & near


def ease_pose(pose: Tensor, limits: Tensor) -> Tensor:
    """Rotation vector and translation ``[..., 5]``, drawn together towards what one picture can show.

    Small poses stay as they are; none, whatever its direction, gets further than its limits.
    """
    size = ((pose / limits).square().sum(-1, keepdim=True) + 1e-12).sqrt()
    return pose * (torch.tanh(size) / size)


def _rotation(vector_3: Tensor) -> Tensor:
    """Rotation matrix of a rotation vector (Rodrigues), without a branch at zero."""
    angle = (vector_3.square().sum() + 1e-12).sqrt()
    x, y, z = vector_3 / angle
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).view(3, 3)
    eye = torch.eye(3, device=vector_3.device)
    return eye + torch.sin(angle) * cross + (1 - torch.cos(angle)) * (cross @ cross)
