"""Rendering of 3D Gaussians (Kerbl et al. 2023, "3D Gaussian Splatting for Real-Time Radiance Field Rendering").

A Gaussian of mean m, axes R and standard deviations S appears as a 2D normal distribution around the projection of m
with covariance Sigma = J W (R S S^T R^T) W^T J^T + 0.3 I, where W rotates the world into the camera and J is the
derivative of the projection at m (Zwicker et al. 2001, "EWA Splatting"). At a pixel centre with offset d from that
projection it has alpha = min(alpha_max, opacity exp(-d^T Sigma^-1 d / 2)), or 0 if that is below 1/255. Sorted by
depth, the Gaussians are composited front to back: T_i = prod_{j<i} (1 - alpha_j), colour = sum_i T_i alpha_i c_i.

On CUDA the renderer is gsplat, elsewhere the plain PyTorch code below, which is the reference: a Gaussian is blended
only into the tiles of pixels that it can touch, and into a tile only until that is opaque.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from recon.cameras import Cameras, project

BLUR = 0.3  # variance in square pixels added to every projection, so that none falls between pixels
ALPHA_MIN = 1 / 255
MARGIN = 0.15  # of the image beyond its edges, past which J is held fixed
TILE = 8  # pixels per side
TILE_BLOCK = 64  # tiles blended together
DEPTH_BLOCK = 64  # Gaussians of each that are blended together, so few that the arrays stay in the processor cache
PAIRS = 2**20  # Gaussian-tile pairs listed at a time, which bounds the memory
CULL_TILE = 16  # pixels per side of the tiles of `cull_sigmas`, a multiple of TILE


@dataclass(frozen=True)
class SplatConstants:
    """The constants in which implementations of the same equations differ.

    On CUDA gsplat 1.5.3 honours `near` alone and silently does everything else as in `GSPLAT`. With unit quaternions
    and the principal point in the middle of the image that changes no pixel of small dense scenes by more than 5e-4
    from `INRIA`, and by more than 0.02 from `INRIA_TILED`.

    alpha_max: the largest alpha of a Gaussian at a pixel.
    near: Gaussians whose mean has a z-depth of at most this are not drawn.
    stop: a Gaussian that would reduce the transmittance of a pixel below this is not drawn there, nor is any behind it.
    symmetric_clamp: J is held constant beyond 0.65 image sides from the principal point, otherwise beyond 0.15 image
        sides from the edges of the image. Both are the same if the principal point is in the middle.
    normalize_quaternions: otherwise quaternions are used as they are, and those that are not unit scale and skew.
    cull_sigmas: a Gaussian is drawn only in the 16x16 tiles touched by the square that reaches this many standard
        deviations of its longer axis from its middle; None draws it wherever its alpha is at least 1/255.
    """

    alpha_max: float
    near: float
    symmetric_clamp: bool
    normalize_quaternions: bool
    stop: float = 1e-4
    cull_sigmas: float | None = None


# those of diff-gaussian-rasterization, which LGM and GRM were trained with; INRIA_TILED also has its culling
INRIA = SplatConstants(alpha_max=0.99, near=0.2, symmetric_clamp=True, normalize_quaternions=False)
INRIA_TILED = replace(INRIA, cull_sigmas=3.0)
# those of gsplat 1.0 to 1.5.3, whose own culling leaves out nothing visible
GSPLAT = SplatConstants(alpha_max=0.999, near=0.01, symmetric_clamp=False, normalize_quaternions=True)


@dataclass(frozen=True)
class Gaussians:
    """A batch of B scenes of N Gaussians each.

    means: (B, N, 3); opacities: (B, N) in [0, 1]; scales: (B, N, 3) standard deviations along the axes;
    quaternions: (B, N, 4) as (w, x, y, z), rotating the axes into the world; colours: (B, N, 3) RGB in [0, 1].
    Raises ValueError if the shapes do not fit together."""

    means: torch.Tensor
    opacities: torch.Tensor
    scales: torch.Tensor
    quaternions: torch.Tensor
    colours: torch.Tensor

    def __post_init__(self):
        batch = self.opacities.shape
        for name, value, channels in zip(self.names(), self.tensors(), ((3,), (), (3,), (4,), (3,)), strict=True):
            if len(batch) != 2 or value.shape != batch + channels:
                wanted = "(B, N)" if not channels else f"(B, N, {channels[0]})"
                raise ValueError(
                    f"Gaussians.{name} has shape {tuple(value.shape)} with opacities {tuple(batch)}; "
                    f"it must be {wanted} with opacities (B, N)"
                )

    def __len__(self) -> int:
        return len(self.means)

    def __getitem__(self, index: int | slice | list[int]) -> "Gaussians":
        """Select scenes along the batch axis, which is kept as an axis."""
        index = [index] if isinstance(index, int) else index
        return Gaussians(*(value[index] for value in self.tensors()))

    def to(self, *args, **kwargs) -> "Gaussians":
        """All tensors moved or converted as by `torch.Tensor.to`."""
        return Gaussians(*(value.to(*args, **kwargs) for value in self.tensors()))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The fields in the order of `names`."""
        return tuple(getattr(self, name) for name in self.names())

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    @classmethod
    def from_packed(cls, x: torch.Tensor) -> "Gaussians":
        """x: (B, N, 14) in LGM's order: position 3, opacity 1, scale 3, quaternion 4, colour 3. Raises ValueError for
        another shape."""
        if x.ndim != 3 or x.shape[-1] != 14:
            raise ValueError(f"packed Gaussians have shape {tuple(x.shape)}; they must be (B, N, 14)")
        means, opacities, scales, quaternions, colours = x.split([3, 1, 3, 4, 3], -1)
        return cls(means, opacities[..., 0], scales, quaternions, colours)


def render_gaussians(
    gaussians: Gaussians,
    cameras: Cameras,
    size: int | tuple[int, int],
    background: float | torch.Tensor = 1.0,
    constants: SplatConstants = INRIA,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Render B scenes of Gaussians, differentiably in all five fields.

    cameras: V common to all scenes, or (B, V); size: pixels per side, or (H, W); background: a number or an RGB triple
    in [0, 1]; constants: see `SplatConstants`, also for which of them count on CUDA.

    Returns image (B, V, 3, H, W), alpha = sum_i T_i alpha_i and depth = sum_i T_i alpha_i z_i, both (B, V, 1, H, W);
    the depth is not divided by alpha and has no background. Raises ValueError for shapes that do not fit, values that
    are not finite and quaternions of length zero, ImportError for CUDA tensors without gsplat."""
    device = gaussians.means.device
    background, cameras = torch.as_tensor(background, device=device), cameras.to(device)
    height, width = _check(gaussians, cameras, size, background)
    cameras = cameras.expand(len(gaussians))
    render = _render_gsplat if gaussians.means.is_cuda else _render_torch
    colour, depth, alpha = render(gaussians, cameras, height, width, constants).split([3, 1, 1], -3)
    return colour + (1 - alpha) * background.to(colour.dtype).reshape(-1, 1, 1), alpha, depth


@torch.no_grad()
def render_views(gaussians: Gaussians, cameras: Cameras, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Render B scenes with the constants that LGM and GRM were trained with: images (B, V, 3, size, size) in [0, 1] on
    white and alpha (B, V, 1, size, size). cameras: V common to all scenes, or (B, V).

    The culling of the code that they were trained with is left out, so that CPU and CUDA agree, see `SplatConstants`.
    """
    images, alpha, _ = render_gaussians(gaussians, cameras, size, constants=INRIA)
    return images.clamp(0, 1), alpha


def _check(gaussians, cameras, size, background):
    """Raise ValueError if anything cannot be rendered. Returns height and width."""
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size is {size!r}; it must be a whole number of pixels, or two of them as (H, W)")
    if background.shape not in ((), (3,)):
        raise ValueError(f"background has shape {tuple(background.shape)}; it must be a number or an RGB triple")
    views = tuple(cameras.c2w.shape[:-2])
    if (
        len(views) not in (1, 2)
        or cameras.c2w.shape[-2:] != (4, 4)
        or cameras.fxfycxcy.shape != views + (4,)
        or views[:-1] not in ((), (len(gaussians),))
    ):
        raise ValueError(
            f"cameras have c2w {tuple(cameras.c2w.shape)} and fxfycxcy {tuple(cameras.fxfycxcy.shape)}; they must be "
            f"(V, 4, 4) and (V, 4), or (B, V, 4, 4) and (B, V, 4) with B = {len(gaussians)} as the Gaussians have"
        )
    no_rotation = gaussians.quaternions.norm(dim=-1) == 0
    everything = (*gaussians.tensors(), cameras.c2w, cameras.fxfycxcy)
    # one question instead of eight: the GPU is waited for with every answer
    if torch.stack([value.isfinite().all() for value in everything] + [~no_rotation.any()]).all():
        return sides
    for name, value in zip(gaussians.names(), gaussians.tensors(), strict=True):
        if not value.isfinite().all():
            raise ValueError(f"Gaussians.{name} holds {(~value.isfinite()).sum()} values that are not finite")
    if not (cameras.c2w.isfinite().all() and cameras.fxfycxcy.isfinite().all()):
        raise ValueError("cameras hold values that are not finite")
    raise ValueError(
        f"{no_rotation.sum()} of Gaussians.quaternions have length zero and are not rotations; "
        "(1, 0, 0, 0) leaves the axes as they are"
    )


# -- gsplat -----------------------------------------------------------------------------------------------------------


def _render_gsplat(gaussians, cameras, height, width, constants):
    """Colour, depth and alpha (B, V, 5, H, W)."""
    try:
        from gsplat import rasterization
    except ImportError as error:
        raise ImportError(
            "rendering Gaussians on CUDA needs the package gsplat, which is not installed: "
            "pip install gsplat==1.5.3, or move the Gaussians to the CPU"
        ) from error
    gaussians, cameras = gaussians.to(torch.float32), cameras.to(torch.float32)
    fx, fy, cx, cy = (cameras.fxfycxcy * cameras.fxfycxcy.new_tensor([width, height, width, height])).unbind(-1)
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    intrinsics = torch.stack([fx, zero, cx, zero, fy, cy, zero, zero, one], -1).unflatten(-1, (3, 3))
    coloured, alpha, _ = rasterization(
        gaussians.means,
        gaussians.quaternions,
        gaussians.scales,
        gaussians.opacities,
        gaussians.colours,
        torch.linalg.inv(cameras.c2w),
        intrinsics,
        width,
        height,
        near_plane=constants.near,
        render_mode="RGB+D",
        packed=False,
    )
    return torch.cat([coloured, alpha], -1).movedim(-1, -3)


# -- plain PyTorch ----------------------------------------------------------------------------------------------------


def _render_torch(gaussians, cameras, height, width, constants):
    """Colour, depth and alpha (B, V, 5, H, W), one image after the other."""
    dtype = torch.promote_types(gaussians.means.dtype, torch.float32)
    # float64 up to the blending: cheap, and small errors become large far from the middle of a long Gaussian
    gaussians, cameras = gaussians.to(torch.float64), cameras.to(torch.float64)
    images = []
    for b in range(len(gaussians)):
        scene = [value[b] for value in gaussians.tensors()]
        for v in range(len(cameras)):
            camera = Cameras(cameras.c2w[b, v : v + 1], cameras.fxfycxcy[b, v : v + 1])
            splats, shades, first, last = _splats(*scene, camera, height, width, constants)
            images.append(_blend_image(splats.to(dtype), shades.to(dtype), first, last, height, width, constants))
    return torch.stack(images).unflatten(0, (len(gaussians), len(cameras)))


def _splats(means, opacities, scales, quaternions, colours, camera, height, width, constants):
    """The Gaussians of one scene that one camera sees, nearest first.

    The 2D normal distribution is factored into that of y and that of x given y, which avoids cancellation:
    log alpha = log opacity - (tall dy)^2 - (narrow (dx - slope dy))^2.

    Returns splats (M, 6): middle x and y in pixels, slope, narrow, tall, log opacity; shades (M, 5): colour, z-depth
    and 1; first and last tile (M, 2), see `_tile_range`."""
    with torch.no_grad():
        depth = project(means, camera)[1][0]
        seen = ((depth > constants.near) & (opacities >= ALPHA_MIN)).nonzero()[:, 0]
        seen = seen[depth[seen].float().argsort(stable=True)]
    means, opacities, scales, quaternions, colours = (
        value.index_select(0, seen) for value in (means, opacities, scales, quaternions, colours)
    )
    points, depth = (value[0] for value in project(means, camera))
    size = points.new_tensor([width, height])
    focal, centre = camera.fxfycxcy[0, :2], camera.fxfycxcy[0, 2:]

    low = torch.full_like(centre, 0.5) if constants.symmetric_clamp else centre
    high = 1 - low
    tangent = (points - centre).maximum(-low - MARGIN).minimum(high + MARGIN) * size
    if constants.normalize_quaternions:
        quaternions = F.normalize(quaternions, dim=-1)
    axes = torch.linalg.inv(camera.c2w)[0, :3, :3] @ (_rotations(quaternions) * scales[:, None])  # W R S
    rows = ((focal * size)[:, None] * axes[:, :2] - tangent[..., None] * axes[:, 2:]) / depth[:, None, None]  # J W R S
    ax, ay = rows.unbind(1)
    xx, yy, xy = ax.square().sum(-1), ay.square().sum(-1), (ax * ay).sum(-1)
    # |ax|^2 |ay|^2 - (ax . ay)^2 = |ax x ay|^2, which does not cancel
    determinant = torch.linalg.cross(ax, ay).square().sum(-1) + BLUR * (xx + yy + BLUR)
    xx, yy = xx + BLUR, yy + BLUR

    middle = points * size
    narrow, tall = (0.5 * yy / determinant).sqrt(), (0.5 / yy).sqrt()
    splats = torch.stack([*middle.unbind(-1), xy / yy, narrow, tall, opacities.log()], -1)
    shades = torch.cat([colours, depth[:, None], torch.ones_like(depth[:, None])], -1)
    return splats, shades, *_tile_range(middle, xx, yy, determinant, opacities, size, constants)


def _rotations(q):
    """Quaternions (..., 4) as (w, x, y, z) -> rotation matrices (..., 3, 3) if they are unit."""
    w, x, y, z = q.unbind(-1)
    return torch.stack(
        [
            1 - 2 * (y * y + z * z),
            2 * (x * y - w * z),
            2 * (x * z + w * y),
            2 * (x * y + w * z),
            1 - 2 * (x * x + z * z),
            2 * (y * z - w * x),
            2 * (x * z - w * y),
            2 * (y * z + w * x),
            1 - 2 * (x * x + y * y),
        ],
        -1,
    ).unflatten(-1, (3, 3))


@torch.no_grad()
def _tile_range(middle, xx, yy, determinant, opacities, size, constants):
    """First and last tile (M, 2), x and y, that a Gaussian may be drawn in; last < first for none."""
    variance = torch.stack([xx, yy], -1)
    reach = (2 * variance * (opacities / ALPHA_MIN).log()[:, None]).sqrt()  # where alpha = ALPHA_MIN
    first, last = (middle - reach - 0.5).ceil(), (middle + reach - 0.5).floor()
    if constants.cull_sigmas is not None:
        mean = (xx + yy) / 2
        longer = mean + (mean.square() - determinant).clamp(min=0.1).sqrt()  # eigenvalue, with that code's floor
        radius = (constants.cull_sigmas * longer.sqrt()).ceil()[:, None]
        first = first.maximum(((middle - 0.5 - radius) / CULL_TILE).floor() * CULL_TILE)
        last = last.minimum(((middle - 0.5 + radius - 1) / CULL_TILE).floor() * CULL_TILE + CULL_TILE - 1)
    tiles = (size / TILE).ceil()
    first, last = (first / TILE).floor().clamp(min=0), (last / TILE).floor().clamp(min=-1)
    return first.minimum(tiles).long(), last.minimum(tiles - 1).long()


def _blend_image(splats, shades, first, last, height, width, constants):
    """Composite what `_splats` returned: colour, depth and alpha (5, H, W)."""
    columns, rows = -(-width // TILE), -(-height // TILE)
    canvas = splats.new_zeros(rows * columns, 5, TILE * TILE)
    light = splats.new_ones(rows * columns, TILE * TILE)  # the transmittance T
    tile = torch.arange(rows * columns, device=splats.device)
    corners = TILE * torch.stack([tile % columns, tile // columns], -1).to(splats.dtype)
    pairs = (last - first + 1).clamp(min=0).prod(-1)
    sizes = (pairs.cumsum(0) // PAIRS).unique_consecutive(return_counts=True)[1]
    for part in torch.arange(len(pairs), device=splats.device).split(sizes.tolist()):
        clear = light.detach().amax(1) > constants.stop
        members, counts = _tile_lists(part, first, last, clear, columns)
        starts = counts.cumsum(0) - counts
        for tiles in counts.argsort(descending=True)[: counts.count_nonzero()].split(TILE_BLOCK):  # of similar length
            light[tiles], seen = _blend_tiles(
                splats, shades, members, starts[tiles], counts[tiles], corners[tiles], light[tiles], constants
            )
            canvas[tiles] += seen
    image = canvas.reshape(rows, columns, 5, TILE, TILE).permute(2, 0, 3, 1, 4)
    return image.reshape(5, rows * TILE, columns * TILE)[:, :height, :width]


def _tile_lists(part, first, last, clear, columns):
    """Which of the Gaussians `part` (P,) touch which tiles: their indices, tile by tile and in the order of `part`, and
    how many belong to each tile. Tiles that are not `clear` get none."""
    span = (last - first + 1).clamp(min=0)
    pairs = span[part].prod(-1)
    member = part.repeat_interleave(pairs)
    nth = torch.arange(len(member), device=part.device) - (pairs.cumsum(0) - pairs).repeat_interleave(pairs)
    (x, y), wide = first[member].unbind(-1), span[member, 0]
    tile = (y + nth // wide) * columns + x + nth % wide
    member, tile = member[clear[tile]], tile[clear[tile]]
    tile, order = tile.sort(stable=True)
    return member[order], tile.bincount(minlength=len(clear))


def _blend_tiles(splats, shades, members, starts, counts, corners, light, constants):
    """Blend the lists of t tiles with transmittance `light` (t, P).

    Returns the transmittance behind them (t, P) and their colour, depth and alpha (t, 5, P)."""
    blend = partial(_blend, alpha_max=constants.alpha_max, stop=constants.stop)
    if splats.requires_grad or shades.requires_grad:  # do not keep every Gaussian's alpha at every pixel
        blend = partial(checkpoint, blend, use_reentrant=False, preserve_rng_state=False)
    canvas = light.new_zeros(len(light), 5, TILE * TILE)
    live = torch.arange(len(light), device=light.device)
    for begin in range(0, max(counts.tolist(), default=0), DEPTH_BLOCK):
        live = live[(counts[live] > begin) & (light.detach()[live].amax(1) > constants.stop)]
        if len(live) == 0:
            break
        nth = torch.arange(begin, begin + DEPTH_BLOCK, device=light.device).expand(len(live), -1)
        missing = nth >= counts[live, None]
        member = members[(starts[live, None] + nth).clamp(max=len(members) - 1)]
        passed, seen = blend(splats, shades, member, missing, corners[live], light[live])
        light = light.index_put((live,), passed)
        canvas = canvas.index_put((live,), seen, accumulate=True)
    return light, canvas


def _blend(splats, shades, member, missing, corners, light, alpha_max, stop):
    """Blend the Gaussians `member` (t, K), except those that are `missing` (t, K), into tiles with upper left `corners`
    (t, 2) and transmittance `light` (t, P).

    Returns the transmittance behind them (t, P), at most `stop` once a Gaussian was left out because of it, and their
    colour, depth and alpha (t, 5, P)."""
    splats, shades = (value.index_select(0, member.flatten()).unflatten(0, member.shape) for value in (splats, shades))
    x, y, slope, narrow, tall, log_opacity = splats.unbind(-1)
    pixel = torch.arange(TILE, device=light.device, dtype=light.dtype) + 0.5
    dy = pixel - (y - corners[:, 1:])[..., None]  # t, K, rows
    log_opacity = log_opacity.masked_fill(missing, -math.inf)[..., None] - (dy * tall[..., None]).square()
    offset = -((x - corners[:, :1])[..., None] + slope[..., None] * dy) * narrow[..., None]
    dx = torch.addcmul(offset[..., None], narrow[..., None, None], pixel)  # t, K, rows, columns
    alpha = torch.addcmul(log_opacity[..., None], dx, dx, value=-1).exp()
    alpha = F.threshold(alpha, ALPHA_MIN, 0).clamp(max=alpha_max).flatten(2)
    after = (1 - alpha).cumprod(1) * light[:, None]
    weights = F.threshold(after, stop, 0) * alpha / (1 - alpha)
    return after[:, -1], shades.transpose(1, 2) @ weights
