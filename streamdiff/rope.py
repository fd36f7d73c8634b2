"""Where tokens sit: rotary positions on three axes, in closed form from float64 angles.

There is no table to run off the end of: position 540,000 (24 h at 25 fps, 4 frames a latent) is as exact as 0.
A rotation is a pair of float32 tensors ``cos_LF, sin_LF``; F counts the rotary pairs of a head (half its width), time
first, then height, then width; pair i of a head is its channels (2i, 2i + 1), as in the published Wan models.

Axes: B streams, L tokens, N heads, K head width, F rotary pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

THETA = 10000.0


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """Cosine and sine of every token's angles, float32."""

    cos_LF: Tensor
    sin_LF: Tensor

    def copy_(self, other: Rotation) -> None:
        """Overwrite in place, so that addresses stay fixed."""
        self.cos_LF.copy_(other.cos_LF)
        self.sin_LF.copy_(other.sin_LF)


def join(rotations: Sequence[Rotation]) -> Rotation:
    """Rotations of several groups of tokens, one after the other."""
    return Rotation(
        torch.cat([r.cos_LF for r in rotations]),
        torch.cat([r.sin_LF for r in rotations]),
    )


def axis_angles(positions: Sequence[int], num_pairs: int) -> Tensor:
    """Angles of one axis, float64 ``[len(positions), num_pairs]``: position * theta^(-i / num_pairs)."""
    exponent_F = torch.arange(num_pairs, dtype=torch.float64) / max(num_pairs, 1)
    return torch.outer(torch.tensor(positions, dtype=torch.float64), THETA**-exponent_F)


def grid_rotation(
    times: Sequence[int],
    rows: Sequence[int],
    columns: Sequence[int],
    pairs: tuple[int, int, int],
    *,
    device: torch.device | str = "cpu",
) -> Rotation:
    """Rotation of a block of tokens laid out time-major over ``times x rows x columns``.

    Positions are integers of any size and sign; a negative time turns backwards, as the motion prefix needs.
    """
    shape = (len(times), len(rows), len(columns))
    parts = [
        axis_angles(times, pairs[0]).view(shape[0], 1, 1, -1).expand(*shape, -1),
        axis_angles(rows, pairs[1]).view(1, shape[1], 1, -1).expand(*shape, -1),
        axis_angles(columns, pairs[2]).view(1, 1, shape[2], -1).expand(*shape, -1),
    ]
    angles_LF = torch.cat(parts, dim=-1).flatten(0, 2)
    return Rotation(
        angles_LF.cos().to(device=device, dtype=torch.float32),
        angles_LF.sin().to(device=device, dtype=torch.float32),
    )


class FrameRotations:
    """Rotations of whole latent frames of one picture size, made where they are used: nothing waits for a copy.

    Equal to `grid_rotation`, but for the rounding of another device's cosine; rows and columns are computed once.
    """

    def __init__(self, rows: int, columns: int, pairs: tuple[int, int, int], *, device: torch.device | str) -> None:
        self._still = grid_rotation([0], range(rows), range(columns), (0, *pairs[1:]), device=device)
        self._rate_F = (THETA ** -(torch.arange(pairs[0], dtype=torch.float64) / max(pairs[0], 1))).to(device)

    def at(self, first: int, num_frames: int = 1) -> Rotation:
        """Rotation of the frames at temporal positions ``first .. first + num_frames - 1``."""
        times_T = torch.arange(first, first + num_frames, dtype=torch.float64, device=self._rate_F.device)
        angles_TF = torch.outer(times_T, self._rate_F)
        return Rotation(
            self._spread(angles_TF.cos(), self._still.cos_LF), self._spread(angles_TF.sin(), self._still.sin_LF)
        )

    def shift(self, num_frames: int, latents: int) -> Rotation:
        """What moves ``latents`` latent frames on by ``num_frames`` in time, whatever their rotation is already."""
        angles_1F = (num_frames * self._rate_F).unsqueeze(0)
        still_LF = self._still.cos_LF
        cos_LF = self._spread(angles_1F.cos(), torch.ones_like(still_LF))
        sin_LF = self._spread(angles_1F.sin(), torch.zeros_like(still_LF))
        return Rotation(cos_LF.repeat(latents, 1), sin_LF.repeat(latents, 1))

    @staticmethod
    def _spread(moving_TF: Tensor, still_LF: Tensor) -> Tensor:
        T, L = moving_TF.shape[0], still_LF.shape[0]
        parts = (moving_TF.to(torch.float32)[:, None].expand(T, L, -1), still_LF.expand(T, L, -1))
        return torch.cat(parts, dim=-1).flatten(0, 1)


def spread(size: int, extent: int) -> list[int]:
    """``size`` positions spread over ``0 .. extent - 1``, rounded down, as the published model samples a coarser grid.

    The model was trained with positions rounded in float64, where 15.0 may come out as 14.999...: integer division
    would be cleaner and wrong.

    >>> spread(3, 6)
    [0, 2, 5]
    >>> spread(23, 31)[11]
    14
    """
    if size == 1:
        return [0]
    step = (extent - 1) / (size - 1)
    return [*(int(i * step) for i in range(size - 1)), extent - 1]


def rotate(x_BLNK: Tensor, rotation: Rotation) -> Tensor:
    """Turn every head of every token by its angles; computes in float32, returns the dtype of ``x``."""
    B, L, N, K = x_BLNK.shape
    pair_BLNF2 = x_BLNK.float().view(B, L, N, K // 2, 2)
    even_BLNF, odd_BLNF = pair_BLNF2.unbind(-1)
    cos_LNF, sin_LNF = rotation.cos_LF[:, None], rotation.sin_LF[:, None]
    turned_BLNF2 = torch.stack(
        (even_BLNF * cos_LNF - odd_BLNF * sin_LNF, even_BLNF * sin_LNF + odd_BLNF * cos_LNF), dim=-1
    )
    return turned_BLNF2.flatten(-2).to(x_BLNK.dtype)


def first_shift(first_frame: int, *, reach: int) -> int:
    """Latent frames by which a kept first chunk has moved on when the chunk that begins at ``first_frame`` is denoised.

    >>> [first_shift(f, reach=18) for f in (0, 15, 18, 21, 3000)]
    [0, 0, 0, 3, 2982]
    """
    return max(0, first_frame - reach)


def sink_position(first_frame: int, *, lead: int, origin: int) -> int:
    """Temporal position of the sink while the chunk that begins at latent frame ``first_frame`` is denoised.

    It stays at ``origin`` until the chunk comes within ``lead`` of it, then keeps that lead for ever (Live Avatar,
    rolling RoPE).

    >>> [sink_position(f, lead=4, origin=30) for f in (0, 24, 27, 3000)]
    [30, 30, 31, 3004]
    """
    return origin + max(0, first_frame - (origin - lead))
