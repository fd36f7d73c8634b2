"""LivePortrait's networks, under their published tensor names (Guo et al. 2024; MIT).

F makes a volume of features from the picture, M reads its pose, W warps the volume between implicit key points, G
draws, S keeps the shoulders where they were.

    B pictures   N key points (21)   C channels   D, H, W of a volume
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_POINTS = 21
NUM_BINS = 66


class _Same2d(nn.Module):
    def __init__(self, inside: int, outside: int, leak: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, padding=1)
        self.norm = nn.BatchNorm2d(outside)
        self.leak = leak

    def forward(self, x: Tensor) -> Tensor:
        return functional.leaky_relu(self.norm(self.conv(x)), self.leak)


class _Down2d(_Same2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(super().forward(x), 2)


class _Residual3d(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(width, width, 3, padding=1)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1)
        self.norm1 = nn.BatchNorm3d(width)
        self.norm2 = nn.BatchNorm3d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())


class AppearanceExtractor(nn.Module):
    """F: a picture ``[1, 3, 256, 256]`` (0..1) to a volume of features ``[1, 32, 16, 64, 64]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _Same2d(3, 64)
        self.down_blocks = nn.ModuleList([_Down2d(64, 128), _Down2d(128, 256)])
        self.second = nn.Conv2d(256, 512, 1)
        self.resblocks_3d = nn.Sequential()
        for number in range(6):
            self.resblocks_3d.add_module(f"3dr{number}", _Residual3d(32))

    def forward(self, picture: Tensor) -> Tensor:
        x = self.first(picture)
        for block in self.down_blocks:
            x = block(x)
        return self.resblocks_3d(self.second(x).view(-1, 32, 16, 64, 64))


class _ChannelNorm(nn.Module):
    """Layer norm over the channels of ``[B, C, H, W]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6)
        return normed.permute(0, 3, 1, 2)


class _ResponseNorm(nn.Module):
    """Global response normalisation (Woo et al. 2023, "ConvNeXt V2")."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        strength = x.norm(dim=(1, 2), keepdim=True)
        return self.gamma * (x * (strength / (strength.mean(-1, keepdim=True) + 1e-6))) + self.beta + x


class _NextBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.grn = _ResponseNorm(4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + self.pwconv2(self.grn(functional.gelu(self.pwconv1(inner)))).permute(0, 3, 1, 2)


class _NextBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths, depths = (96, 192, 384, 768), (3, 3, 9, 3)
        self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 96, 4, 4), _ChannelNorm(96))])
        for a, b in itertools.pairwise(widths):
            self.downsample_layers.append(nn.Sequential(_ChannelNorm(a), nn.Conv2d(a, b, 2, 2)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(_NextBlock(width) for _ in range(depth)))
            for width, depth in zip(widths, depths, strict=True)
        )
        self.norm = nn.LayerNorm(768, eps=1e-6)
        self.fc_kp = nn.Linear(768, 3 * NUM_POINTS)
        self.fc_scale = nn.Linear(768, 1)
        self.fc_pitch = nn.Linear(768, NUM_BINS)
        self.fc_yaw = nn.Linear(768, NUM_BINS)
        self.fc_roll = nn.Linear(768, NUM_BINS)
        self.fc_t = nn.Linear(768, 3)
        self.fc_exp = nn.Linear(768, 3 * NUM_POINTS)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        x = self.norm(x.mean((-2, -1)))
        return {name: getattr(self, f"fc_{name}")(x) for name in ("kp", "scale", "pitch", "yaw", "roll", "t", "exp")}


class MotionExtractor(nn.Module):
    """M: a picture to canonical key points, pose and expression (angles as logits over bins of three degrees)."""

    def __init__(self) -> None:
        super().__init__()
        self.detector = _NextBackbone()

    def forward(self, picture: Tensor) -> dict[str, Tensor]:
        return self.detector(picture)


class _Block3d(nn.Module):
    def __init__(self, inside: int, outside: int, *, down: bool) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inside, outside, 3, padding=1)
        self.norm = nn.BatchNorm3d(outside)
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            return functional.avg_pool3d(self.norm(self.conv(x)).relu(), (1, 2, 2))
        return self.norm(self.conv(functional.interpolate(x, scale_factor=(1.0, 2.0, 2.0)))).relu()


class _Encoder(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList(_Block3d(a, b, down=True) for a, b in itertools.pairwise(widths))


class _Decoder(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        entering, *skips = widths[::-1]
        self.up_blocks = nn.ModuleList()
        for number, skip in enumerate(skips):
            leaving = 32 if number == len(skips) - 1 else skip
            self.up_blocks.append(_Block3d(entering, leaving, down=False))
            entering = leaving + skip
        self.conv = nn.Conv3d(entering, entering, 3, padding=1)
        self.norm = nn.BatchNorm3d(entering)


class _Hourglass(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder, self.decoder = _Encoder(widths), _Decoder(widths)

    def forward(self, x: Tensor) -> Tensor:
        outs = [x]
        for block in self.encoder.down_blocks:
            outs.append(block(outs[-1]))
        x = outs.pop()
        for block in self.decoder.up_blocks:
            x = torch.cat([block(x), outs.pop()], 1)
        return self.decoder.norm(self.decoder.conv(x)).relu()


class _DenseMotion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inside = (NUM_POINTS + 1) * 5
        self.hourglass = _Hourglass((inside, 64, 128, 256, 512, 1024))
        self.mask = nn.Conv3d(32 + inside, NUM_POINTS + 1, 7, padding=3)
        self.compress = nn.Conv3d(32, 4, 1)
        self.norm = nn.BatchNorm3d(4)
        self.occlusion = nn.Conv2d((32 + inside) * 16, 1, 7, padding=3)

    def forward(self, volume: Tensor, driving_BN3: Tensor, source_BN3: Tensor) -> tuple[Tensor, Tensor]:
        B, _, D, H, W = volume.shape
        N = NUM_POINTS
        compact = self.norm(self.compress(volume)).relu()
        axes = [torch.linspace(-1, 1, n, device=volume.device, dtype=volume.dtype) for n in (D, H, W)]
        z, y, x = torch.meshgrid(*axes, indexing="ij")
        grid = torch.stack([x, y, z], -1)[None, None]
        shift = (source_BN3 - driving_BN3).view(B, N, 1, 1, 1, 3)
        sparse = torch.cat([grid.expand(B, 1, -1, -1, -1, -1), grid + shift], 1)
        copies = compact[:, None].expand(-1, N + 1, -1, -1, -1, -1).flatten(0, 1)
        deformed = functional.grid_sample(copies, sparse.flatten(0, 1), align_corners=False)
        near, far = (
            torch.exp(-0.5 * (grid - points.view(B, N, 1, 1, 1, 3)).square().sum(-1) / 0.01)
            for points in (driving_BN3, source_BN3)
        )
        heat = torch.cat([torch.zeros_like(near[:, :1]), near - far], 1)
        fed = torch.cat([heat[:, :, None], deformed.view(B, N + 1, 4, D, H, W)], 2).flatten(1, 2)
        prediction = self.hourglass(fed)
        share = self.mask(prediction).softmax(1)
        deformation = (sparse * share[..., None]).sum(1)
        return deformation, self.occlusion(prediction.flatten(1, 2)).sigmoid()


class Warping(nn.Module):
    """W: the feature volume, moved from the source's key points to the driving ones: ``[B, 256, 64, 64]``."""

    def __init__(self) -> None:
        super().__init__()
        self.dense_motion_network = _DenseMotion()
        self.third = _Same2d(512, 256, leak=0.01)
        self.fourth = nn.Conv2d(256, 256, 1)

    def forward(self, volume: Tensor, driving_BN3: Tensor, source_BN3: Tensor) -> Tensor:
        deformation, occlusion = self.dense_motion_network(volume, driving_BN3, source_BN3)
        moved = functional.grid_sample(volume, deformation, align_corners=False)
        return self.fourth(self.third(moved.flatten(1, 2))) * occlusion


class _Spade(nn.Module):
    """Normalisation whose scale and shift are drawn (Park et al. 2019, "SPADE")."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp_shared = nn.Sequential(nn.Conv2d(256, 128, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(128, width, 3, padding=1)
        self.mlp_beta = nn.Conv2d(128, width, 3, padding=1)

    def forward(self, x: Tensor, drawing: Tensor) -> Tensor:
        shared = self.mlp_shared(functional.interpolate(drawing, size=x.shape[2:], mode="nearest"))
        return functional.instance_norm(x) * (1 + self.mlp_gamma(shared)) + self.mlp_beta(shared)


class _SpadeBlock(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        middle = min(inside, outside)
        self.conv_0 = nn.Conv2d(inside, middle, 3, padding=1)
        self.conv_1 = nn.Conv2d(middle, outside, 3, padding=1)
        self.norm_0, self.norm_1 = _Spade(inside), _Spade(middle)
        if inside != outside:
            self.conv_s = nn.Conv2d(inside, outside, 1, bias=False)
            self.norm_s = _Spade(inside)
        self.learned = inside != outside

    def forward(self, x: Tensor, drawing: Tensor) -> Tensor:
        straight = self.conv_s(self.norm_s(x, drawing)) if self.learned else x
        x = self.conv_0(functional.leaky_relu(self.norm_0(x, drawing), 0.2))
        return straight + self.conv_1(functional.leaky_relu(self.norm_1(x, drawing), 0.2))


class Drawing(nn.Module):
    """G: warped features to a picture ``[B, 3, 512, 512]`` (0..1)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(256, 512, 3, padding=1)
        for number in range(6):
            self.add_module(f"G_middle_{number}", _SpadeBlock(512, 512))
        self.up_0 = _SpadeBlock(512, 256)
        self.up_1 = _SpadeBlock(256, 64)
        self.conv_img = nn.Sequential(nn.Conv2d(64, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, features: Tensor) -> Tensor:
        x = self.fc(features)
        for number in range(6):
            x = self.get_submodule(f"G_middle_{number}")(x, features)
        x = self.up_0(functional.interpolate(x, scale_factor=2.0), features)
        x = self.up_1(functional.interpolate(x, scale_factor=2.0), features)
        return self.conv_img(functional.leaky_relu(x, 0.2)).sigmoid()


class Stitching(nn.Module):
    """S: source and driving key points to corrections of the driving ones and a shift, ``[B, 65]``."""

    def __init__(self) -> None:
        super().__init__()
        widths = (6 * NUM_POINTS, 128, 128, 64)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], 3 * NUM_POINTS + 2))

    def forward(self, source_BN3: Tensor, driving_BN3: Tensor) -> Tensor:
        B = len(driving_BN3)
        delta = self.mlp(torch.cat([source_BN3.reshape(B, -1), driving_BN3.reshape(B, -1)], 1))
        moved = driving_BN3 + delta[:, : 3 * NUM_POINTS].view(B, NUM_POINTS, 3)
        return moved + functional.pad(delta[:, None, 3 * NUM_POINTS :], (0, 1))


NETWORKS = {
    "appearance": AppearanceExtractor,
    "motion": MotionExtractor,
    "warping": Warping,
    "drawing": Drawing,
    "stitching": Stitching,
}
