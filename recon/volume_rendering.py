"""Volume rendering of triplane radiance fields, written from the emission-absorption equations.

A ray is cut at depths t_0 < ... < t_{D-1}. Each interval between neighbours has the mean density and colour of its two
ends: alpha_i = 1 - exp(-sigma_i (t_{i+1} - t_i)), T_i = prod_{j<i} (1 - alpha_j), colour = sum_i T_i alpha_i c_i
(Max 1995; the quadrature of NeRF, Mildenhall et al. 2020, with densities and colours averaged over the interval).

Distances are in world units, densities per unit length, colours RGB in [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

from recon.cameras import Cameras, rays

FRONT = 8  # samples of a ray evaluated together, front to back
OPAQUE = 7.0  # optical thickness behind which nothing is visible: exp(-7) < 1e-3

# points (B, P, 3) of B scenes -> density (B, P) and colour (B, P, 3)
RadianceField = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Triplane:
    """A batch of B scenes in the box [-1, 1]^3.

    planes: (B, 3, C, H, W) features for the coordinate pairs (x, y), (x, z) and (z, y); the first coordinate of a pair
    runs along the width, the second along the height."""

    planes: torch.Tensor

    def __len__(self) -> int:
        return len(self.planes)


def check_one_object(scene) -> None:
    """Raise ValueError if `scene` is a batch of more than one object, which has no single radiance field."""
    if len(scene) != 1:
        raise ValueError(f"a radiance field is that of one object and the scene holds {len(scene)}; choose one")


def sample_planes(planes: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Bilinear features (B, P, 3 C) of points (B, P, 3) in planes (B, 3, C, H, W), zero outside the box."""
    B, _, C, _, _ = planes.shape
    # slices: a list of indices would be copied to the GPU in every call
    pairs = torch.stack([points[..., :2], points[..., ::2], points[..., 1:].flip(-1)], dim=1)
    features = F.grid_sample(planes.flatten(0, 1), pairs.flatten(0, 1)[:, None], align_corners=False)
    return features.reshape(B, 3 * C, -1).transpose(1, 2)


def mlp_of_columns(net: nn.Sequential, points: torch.Tensor) -> torch.Tensor:
    """The MLP `net` of points that are columns (B, in_features, P) -> (B, out_features, P).

    Layers as narrow as those of radiance fields are faster on columns than on rows."""
    for layer in net:
        if isinstance(layer, nn.Linear):
            points = torch.baddbmm(layer.bias[:, None], layer.weight.expand(len(points), -1, -1), points)
        else:
            points = layer(points)
    return points


class TriplaneDecoder(nn.Module):
    """The small MLP of LRM (Hong et al. 2024): features (B, P, in_features) of P points -> density (B, P) >= 0,
    colour (B, P, 3)."""

    def __init__(self, in_features: int, hidden: int = 64, layers: int = 4):
        super().__init__()
        sizes = [in_features] + [hidden] * (layers - 1)
        blocks = [block for a, b in pairwise(sizes) for block in (nn.Linear(a, b), nn.ReLU(inplace=True))]
        self.net = nn.Sequential(*blocks, nn.Linear(hidden, 4))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raw, colour = self.raw(features)
        return self.density(raw), colour

    def raw(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Density (B, P) before its activation `density`, and colour (B, P, 3)."""
        columns = mlp_of_columns(self.net, features.to(self.net[0].weight.dtype).transpose(1, 2)).float()
        return columns[:, 0], (torch.sigmoid(columns[:, 1:]) * 1.002 - 0.001).transpose(1, 2)

    @staticmethod
    def density(raw: torch.Tensor) -> torch.Tensor:
        """The activation that makes raw densities non-negative."""
        return F.softplus(raw - 1)


def triplane_field(planes: torch.Tensor, decode: Callable, block: int) -> RadianceField:
    """The radiance field of planes (B, 3, C, H, W).

    decode: features (B, P, 3 C) -> density (B, P), colour (B, P, 3); block: points of a scene decoded at a time, which
    bounds the memory."""

    def evaluate(points):
        parts = [decode(sample_planes(planes, part)) for part in points.split(block, dim=1)]
        return tuple(torch.cat(values, 1) for values in zip(*parts, strict=True))

    return evaluate


def box_interval(
    origins: torch.Tensor,
    directions: torch.Tensor,
    low: torch.Tensor | float = -1.0,
    high: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where rays (..., 3) enter and leave the box from `low` to `high` (numbers or (3,)).

    Returns depths near and far (...), near >= 0. A ray that misses the box has near >= far."""
    inverse = 1 / torch.where(directions.abs() < 1e-8, torch.full_like(directions, 1e-8), directions)
    t0, t1 = (low - origins) * inverse, (high - origins) * inverse
    near, far = torch.minimum(t0, t1).amax(-1).clamp(min=0), torch.maximum(t0, t1).amin(-1)
    return near, far


def interval_weights(
    depths: torch.Tensor, density: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """How much of each interval of a ray is seen, T_i alpha_i: (..., D - 1), in [0, 1]. Arguments as of `composite`."""
    sigma = (density[..., 1:] + density[..., :-1]) / 2
    sigma = sigma if activation is None else activation(sigma)
    optical = F.pad(sigma * depths.diff(dim=-1), (1, 0)).cumsum(-1)
    return -torch.exp(-optical).diff(dim=-1)


def composite(
    depths: torch.Tensor,
    density: torch.Tensor,
    colour: torch.Tensor,
    background: float = 1.0,
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Emission and absorption along rays, with the equations at the top of this file.

    depths, density: (..., D); colour: (..., D, 3). activation: applied to the mean density of every interval, for
    fields whose densities are raw; a raw density of -inf is empty space and empties both intervals that it bounds.
    Returns colour (..., 3), alpha (...), weights (..., D - 1)."""
    weights = interval_weights(depths, density, activation)
    rgb = (colour[..., 1:, :] + colour[..., :-1, :]) / 2
    alpha = weights.sum(-1)
    return (weights[..., None] * rgb).sum(-2) + (1 - alpha[..., None]) * background, alpha, weights


def stratified_depths(
    near: torch.Tensor, far: torch.Tensor, samples: int, jitter: torch.Tensor | float, bins: int | None = None
) -> torch.Tensor:
    """Depths (..., samples) between near and far (...), one in each of `samples` equal bins.

    jitter: place of the depth in its bin, in [0, 1], a number or (..., samples). bins: number of bins that [near, far]
    is cut into, `samples` by default; with `samples` - 1 the last bin, and its depth, lies behind far."""
    steps = (torch.arange(samples, device=near.device, dtype=near.dtype) + jitter) / (bins or samples)
    return near[..., None] + (far - near)[..., None] * steps


def importance_depths(
    depths: torch.Tensor, weights: torch.Tensor, samples: int, u: torch.Tensor, floor: float = 1e-3
) -> torch.Tensor:
    """Depths (..., samples) drawn by inverse-transform sampling from the piecewise constant density `weights` + `floor`
    (..., D - 1) over the intervals of `depths` (..., D); NeRF, section 5.2.

    u: (samples,) or (..., samples) in [0, 1], the values of the distribution function to invert."""
    pdf = weights + floor
    cdf = F.pad((pdf / pdf.sum(-1, keepdim=True)).cumsum(-1), (1, 0))
    u = u.expand(*cdf.shape[:-1], samples).contiguous()
    upper = torch.searchsorted(cdf.contiguous(), u, right=True).clamp(1, cdf.shape[-1] - 1)
    c0, c1 = cdf.gather(-1, upper - 1), cdf.gather(-1, upper)
    t0, t1 = depths.gather(-1, upper - 1), depths.gather(-1, upper)
    return t0 + (t1 - t0) * ((u - c0) / (c1 - c0).clamp(min=1e-8)).clamp(0, 1)


def blurred_importance_depths(
    depths: torch.Tensor, weights: torch.Tensor, samples: int, u: torch.Tensor
) -> torch.Tensor:
    """`importance_depths` as OpenLRM and InstantMesh were trained with: the weights of the inner intervals, blurred by
    mip-NeRF's filter (max(w_{i-1}, w_i) + max(w_i, w_{i+1})) / 2 + 0.01 (Barron et al. 2021), over bins between the
    intervals' midpoints.

    depths: (..., D) with D >= 4. As in the published code there is one bin more than there are weights and the last
    bin is never used, so that every weight stands half an interval in front of its place."""
    pairs = torch.maximum(weights[..., 1:], weights[..., :-1])
    middles = (depths[..., 1:] + depths[..., :-1]) / 2
    return importance_depths(middles[..., :-1], (pairs[..., 1:] + pairs[..., :-1]) / 2, samples, u, floor=0.01 + 1e-5)


def render_rays(
    field: RadianceField,
    origins: torch.Tensor,
    directions: torch.Tensor,
    coarse: int,
    fine: int,
    jitter: torch.Tensor | float = 0.5,
    u: torch.Tensor | None = None,
    bins: int | None = None,
    resample: Callable = importance_depths,
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
    background: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coarse-to-fine rendering of rays through B scenes in the box [-1, 1]^3 (NeRF, section 5.2).

    origins, directions: (B, R, 3). coarse, fine: samples of a ray that are spread over the box, and that are added
    where those found matter. jitter: a number or (B, R, coarse), see `stratified_depths`, as is bins. resample: draws
    the fine depths, `importance_depths` or `blurred_importance_depths`; u: their argument, (fine,) or (B, R, fine),
    None = evenly spaced. activation, background: see `composite`.
    Returns colour (B, R, 3) and alpha (B, R). Rays that miss the box show the background."""
    near, far = box_interval(origins, directions)
    hit = near < far
    near = torch.where(hit, near, torch.zeros_like(near))
    far = torch.where(hit, far, near)  # an interval of length zero contributes nothing

    def evaluate(depths):
        points = origins[..., None, :] + directions[..., None, :] * depths[..., None]
        density, colour = field(points.flatten(1, 2))
        return density.reshape(depths.shape), colour.reshape(*depths.shape, 3)

    depths = stratified_depths(near, far, coarse, jitter, bins)
    density, colour = evaluate(depths)
    if fine:
        with torch.no_grad():
            weights = composite(depths, density, colour, activation=activation)[2]
            u = (torch.arange(fine, device=depths.device, dtype=depths.dtype) + 0.5) / fine if u is None else u
            more = resample(depths, weights, fine, u)
        depths, order = torch.cat([depths, more], -1).sort(-1)
        density_fine, colour_fine = evaluate(more)
        density = torch.cat([density, density_fine], -1).gather(-1, order)
        colour = torch.cat([colour, colour_fine], -2).gather(-2, order[..., None].expand(*order.shape, 3))
    rgb, alpha, _ = composite(depths, density, colour, background, activation)
    return rgb, alpha


def render_images(render: Callable, cameras: Cameras, size: int, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (M, 3, size, size) in [0, 1] and alpha (M, 1, size, size) of one scene from M cameras.

    render: origins (N, 3), directions (N, 3) -> colour (N, 3), alpha (N,), called with at most `chunk_size` rays."""
    origins, directions = (x.flatten(0, 1) for x in rays(cameras, size))
    parts = [render(o, d) for o, d in zip(origins.split(chunk_size), directions.split(chunk_size), strict=True)]
    colour, alpha = (torch.cat(values).unflatten(0, (len(cameras), size, size)) for values in zip(*parts, strict=True))
    return colour.permute(0, 3, 1, 2).clamp(0, 1), alpha[:, None]


def render_scenes(
    ray_renderer: Callable, planes: torch.Tensor, cameras: Cameras, size: int, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, M, 3, size, size) in [0, 1] and alpha (B, M, 1, size, size) of the scenes of planes (B, 3, C, H, W).

    ray_renderer: planes (1, 3, C, H, W) of one scene -> `render` as for `render_images`, as is chunk_size; cameras: M
    common to all scenes, or (B, M)."""
    rendered = [
        render_images(ray_renderer(one_scene[None]), one_scene_cameras, size, chunk_size)
        for one_scene, one_scene_cameras in zip(planes, cameras.expand(len(planes)).unbind(), strict=True)
    ]
    images, alpha = zip(*rendered, strict=True)
    return torch.stack(images), torch.stack(alpha)


def occupancy_grid(
    field: RadianceField,
    batch: int,
    resolution: int,
    threshold: float,
    device: str | torch.device | None = None,
) -> torch.Tensor:
    """Which cells of the box hold matter: (batch, resolution, resolution, resolution) bool, indexed z, y, x, dilated by
    one cell on every side. A cell holds matter if the optical thickness of crossing it exceeds `threshold`."""
    centre = (torch.arange(resolution, device=device) + 0.5) / resolution * 2 - 1
    z, y, x = torch.meshgrid(centre, centre, centre, indexing="ij")
    points = torch.stack([x, y, z], -1).reshape(1, -1, 3).expand(batch, -1, 3)
    thickness = (field(points)[0] * (2 / resolution)).reshape(batch, *[resolution] * 3)
    occupied = F.pad(thickness > threshold, [1] * 6)
    for axis in (1, 2, 3):  # a cell or one of its two neighbours; far quicker than pooling
        before, here, behind = (occupied.narrow(axis, start, resolution) for start in range(3))
        occupied = before | here | behind
    return occupied


def occupied_box(occupied: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The bounding box of the occupied cells (R, R, R) bool of one scene: low (3,), high (3,) as x, y, z; None if no
    cell is occupied."""
    resolution, bounds = len(occupied), []
    for axis in (2, 1, 0):
        others = [i for i in range(3) if i != axis]
        cells = occupied.any(others[1]).any(others[0]).nonzero()[:, 0]
        if not len(cells):
            return None
        bounds.append((cells[0], cells[-1] + 1))
    low, high = zip(*bounds, strict=True)
    return tuple(torch.stack(part) * (2 / resolution) - 1 for part in (low, high))


def render_occupied(
    field: RadianceField, occupied: torch.Tensor, origins: torch.Tensor, directions: torch.Tensor, samples: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Deterministic rendering of one scene that skips empty space: `samples` evenly spaced depths where a ray crosses
    the bounding box of the occupied cells, evaluated only inside occupied cells.

    field: of one scene (B = 1); occupied: (R, R, R) bool from `occupancy_grid`; origins, directions: (N, 3).
    Returns colour (N, 3) on white and alpha (N,)."""
    rgb, alpha = torch.ones_like(origins), torch.zeros_like(origins[:, 0])
    box = occupied_box(occupied)
    if box is None:
        return rgb, alpha
    near, far = box_interval(origins, directions, *box)
    ray = (near < far).nonzero()[:, 0]
    near, far = near[ray], far[ray]
    # a row for each depth, (samples, rays), so that what is evaluated together lies together
    depths = stratified_depths(near, far, samples, 0.5).T.contiguous()
    starts, steps = (x[ray].T.contiguous()[:, None] for x in (origins, directions))
    inside = torch.zeros_like(depths, dtype=torch.bool)
    density, optical = torch.zeros_like(depths), torch.zeros_like(near)
    places, colours = [], []
    for first in range(0, samples, FRONT):  # front to back: what lies behind opaque matter is invisible
        part = slice(first, first + FRONT)
        points = torch.addcmul(starts, steps, depths[part])
        inside[part] = _is_occupied(occupied, points) & (optical < OPAQUE)
        place = inside[part].flatten().nonzero()[:, 0]  # waits for the GPU, to know how many
        found, colour = field(points.flatten(1).index_select(1, place).T[None])
        density[part].view(-1).index_copy_(0, place, found[0])
        optical += density[part].sum(0) * (far - near) / samples
        places.append(place + first * len(ray))
        colours.append(colour[0])
    place, colour = torch.cat(places), torch.cat(colours)
    weights = interval_weights(depths.T, density.T).T
    alpha[ray] = weights.sum(0)
    # an interval takes the mean colour of its ends, or that of the one end that is inside
    share = 1 - inside.float() / 2
    weights = F.pad(weights * share[1:], (0, 0, 0, 1)) + F.pad(weights * share[:-1], (0, 0, 1, 0))
    seen = weights.flatten().index_select(0, place)[:, None] * colour
    rgb[ray] = (1 - alpha[ray, None]).expand(-1, 3).index_add(0, place % len(ray), seen)
    return rgb, alpha


def _is_occupied(occupied, points):
    """Whether points (3, ...) of the box lie in occupied cells (R, R, R): (...) bool."""
    resolution = len(occupied)
    x, y, z = ((points + 1) * (resolution / 2)).int().clamp_(0, resolution - 1)
    cells = (z * resolution + y) * resolution + x
    return occupied.flatten().index_select(0, cells.flatten()).view_as(cells)
