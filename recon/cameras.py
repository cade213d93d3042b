"""Cameras. One convention everywhere: OpenCV axes (x right, y down, z forward), world z up, camera-to-world poses,
intrinsics in units of the image size. Every other convention is converted here and nowhere else."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cameras:
    """A set of pinhole cameras.

    c2w: (..., V, 4, 4) camera-to-world, OpenCV axes, world z up.
    fxfycxcy: (..., V, 4) focal lengths and principal point of an image whose sides have length 1.
    """

    c2w: torch.Tensor
    fxfycxcy: torch.Tensor

    def __len__(self):
        return self.c2w.shape[-3]

    def to(self, *args, **kwargs):
        return Cameras(self.c2w.to(*args, **kwargs), self.fxfycxcy.to(*args, **kwargs))

    def __getitem__(self, index):
        """Select views: an index, slice or list along the V axis (kept as an axis)."""
        index = [index] if isinstance(index, int) else index
        return Cameras(self.c2w[..., index, :, :], self.fxfycxcy[..., index, :])

    def expand(self, batch):
        """(V, ...) -> (batch, V, ...) without copying."""
        return Cameras(self.c2w.expand(batch, *self.c2w.shape), self.fxfycxcy.expand(batch, *self.fxfycxcy.shape))

    @property
    def elevation(self):
        """(..., V) degrees above the horizontal plane."""
        x, y, z = self.c2w[..., :3, 3].unbind(-1)
        return torch.rad2deg(torch.atan2(z, torch.hypot(x, y)))

    @property
    def azimuth(self):
        """(..., V) degrees in [0, 360), counter-clockwise from +x seen from above."""
        x, y, _ = self.c2w[..., :3, 3].unbind(-1)
        return torch.rad2deg(torch.atan2(y, x)) % 360

    @property
    def fov(self):
        """(..., V) horizontal field of view in degrees."""
        return torch.rad2deg(2 * torch.atan(0.5 / self.fxfycxcy[..., 0]))


def look_at(position, target=(0.0, 0.0, 0.0)):
    """Camera-to-world poses at `position` (..., 3) that look at `target` with world z up: (..., 4, 4).

    The position must not lie straight above or below the target, where "up" has no meaning."""
    position = torch.as_tensor(position, dtype=torch.float32)
    forward = torch.nn.functional.normalize(torch.as_tensor(target, dtype=torch.float32) - position, dim=-1)
    up = torch.tensor([0.0, 0.0, 1.0]).expand_as(forward)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up, dim=-1), dim=-1)
    down = torch.linalg.cross(forward, right, dim=-1)
    c2w = torch.eye(4).repeat(*position.shape[:-1], 1, 1)
    c2w[..., :3, :] = torch.stack([right, down, forward, position], dim=-1)
    return c2w


def orbit_cameras(azimuth, elevation, radius, fov):
    """Cameras on a sphere around the origin that look at it.

    azimuth, elevation: degrees, broadcast to (..., V); radius: distance to the origin; fov: degrees.
    An object at azimuth 0 is seen from +x; the position is r (cos e cos a, cos e sin a, sin e)."""
    azimuth, elevation = torch.broadcast_tensors(
        torch.deg2rad(torch.as_tensor(azimuth, dtype=torch.float32)),
        torch.deg2rad(torch.as_tensor(elevation, dtype=torch.float32)),
    )
    position = radius * torch.stack(
        [elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], dim=-1
    )
    focal = 0.5 / math.tan(math.radians(fov) / 2)
    return Cameras(look_at(position), torch.tensor([focal, focal, 0.5, 0.5]).expand(*azimuth.shape, 4))


def instant3d_cameras():
    """The four views of Instant3D's 2x2 grid in reading order: elevation 20, azimuths 225, 315, 45, 135 degrees,
    radius 2.7, field of view 50 degrees."""
    return orbit_cameras([225.0, 315.0, 45.0, 135.0], 20.0, radius=2.7, fov=50.0)


def mvdream_cameras(elevation=0.0, azimuth_start=0.0):
    """MVDream's four views: azimuths `azimuth_start` + 0, 90, 180, 270 degrees as MVDream counts them (90 more than
    here), at `elevation` degrees above the horizon.

    MVDream's own cameras are directions only; radius 1.5 and field of view 49.1 degrees are those of LGM, which its
    views are commonly given to."""
    azimuth = torch.tensor([0.0, 90.0, 180.0, 270.0]) + azimuth_start - 90.0
    return orbit_cameras(azimuth, elevation, radius=1.5, fov=49.1)


def flip_axes(c2w):
    """Poses (..., 4, 4) with OpenCV axes (y down, z forward) -> the same with OpenGL's, which are Blender's too (y up,
    z backward), and back."""
    return c2w * c2w.new_tensor([1.0, -1.0, -1.0, 1.0])


def mvdream_camera_vectors(cameras):
    """What MVDream's UNet is told of `cameras` (..., V): (..., V, 16), row-major camera-to-world matrices with OpenGL
    axes (y up, z backward) and positions on the unit sphere."""
    c2w = flip_axes(cameras.c2w)
    position = torch.nn.functional.normalize(c2w[..., :3, 3:], dim=-2)
    return torch.cat([torch.cat([c2w[..., :3, :3], position], -1), c2w[..., 3:, :]], -2).flatten(-2)


LGM_AXES = [1, 2, 0]  # LGM's x, y (up), z among ours: its first camera looks from +z, ours at azimuth 0 from +x
OUR_AXES = [2, 0, 1]


def lgm_pluecker(cameras, size):
    """What LGM is told of `cameras` (..., V): Pluecker coordinates (o x d, d) of every pixel's ray in its own axes,
    (..., V, 6, size, size)."""
    origin, direction = (x[..., LGM_AXES] for x in rays(cameras, size))
    moment = torch.linalg.cross(origin, direction, dim=-1)
    return torch.cat([moment, direction], -1).transpose(-1, -2).unflatten(-1, (size, size))


def from_lgm_axes(positions, quaternions):
    """Gaussians in LGM's axes -> ours. positions (..., 3); quaternions (..., 4), w first."""
    w, x, y, z = quaternions.unbind(-1)
    # times (1 + i + j + k) / 2, the turn that sends its x, y, z to our y, z, x
    turned = torch.stack([w - x - y - z, w + x + z - y, w + y + x - z, w + z + y - x], -1) / 2
    return positions[..., OUR_AXES], turned


def openlrm_source_vectors(cameras):
    """What OpenLRM is told of its input views' `cameras` (..., V): (..., V, 16), the upper three rows of the row-major
    camera-to-world matrix with OpenGL axes, then fx, fy, cx, cy of an image whose sides have length 1."""
    return torch.cat([flip_axes(cameras.c2w)[..., :3, :].flatten(-2), cameras.fxfycxcy], -1)


def cameras_of_openlrm(vectors):
    """OpenLRM's render cameras (..., V, 25), a row-major camera-to-world matrix with OpenGL axes and a row-major 3x3
    intrinsic matrix of an image whose sides have length 1, as `Cameras`."""
    intrinsics = vectors[..., 16:]
    return Cameras(flip_axes(vectors[..., :16].unflatten(-1, (4, 4))), intrinsics[..., [0, 4, 2, 5]])


def openlrm_canonical_cameras(cameras, source, distance=None):
    """`cameras` (..., V) in the world that OpenLRM reconstructs from a view of the camera `source` (..., 1): moved
    rigidly, all together, so that the source stands at (0, -distance, 0) and looks along +y with z up.

    Nothing is scaled. distance: None = the source's own distance from the origin, so that a source that looks at the
    origin keeps the origin, and the object around it, in its place; a number moves them along the source's axis."""
    if distance is None:
        distance = source.c2w[..., :3, 3].norm(dim=-1)
    canonical = look_at((0.0, -1.0, 0.0)).to(source.c2w).expand(source.c2w.shape).clone()
    canonical[..., 1, 3] = -distance
    c2w = canonical @ torch.linalg.inv(source.c2w) @ cameras.c2w
    return Cameras(c2w, cameras.fxfycxcy.expand(*c2w.shape[:-2], 4))


def grid_directions(cameras, pixel):
    """World directions of z-depth 1 through the points of a square grid, row by row.

    pixel: (P,) the grid's image coordinates, in x as in y. Returns (..., V, P*P, 3)."""
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    fx, fy, cx, cy = cameras.fxfycxcy[..., None].unbind(-2)
    direction = torch.stack(
        [(x.flatten() - cx) / fx, (y.flatten() - cy) / fy, torch.ones_like(cx + x.flatten())], dim=-1
    )
    return direction @ cameras.c2w[..., :3, :3].transpose(-1, -2)


def rays(cameras, size):
    """Rays through the pixel centres of square images, row by row.

    Returns origins and unit directions, each (..., V, size*size, 3)."""
    pixel = (torch.arange(size, device=cameras.c2w.device, dtype=cameras.c2w.dtype) + 0.5) / size
    direction = torch.nn.functional.normalize(grid_directions(cameras, pixel), dim=-1)
    return cameras.c2w[..., None, :3, 3].expand_as(direction), direction


def project(points, cameras):
    """Project world points (..., N, 3) into every camera: image coordinates (..., V, N, 2), in [0, 1] inside the image
    (x right, y down), and z-depths (..., V, N)."""
    w2c = torch.linalg.inv(cameras.c2w)
    camera_points = points[..., None, :, :] @ w2c[..., :3, :3].transpose(-1, -2) + w2c[..., None, :3, 3]
    depth = camera_points[..., 2]
    focal, centre = cameras.fxfycxcy[..., None, :2], cameras.fxfycxcy[..., None, 2:]
    return camera_points[..., :2] / depth[..., None] * focal + centre, depth


def camera_disagreement(painter, sculptor, tolerance=1.0):
    """Compare two (V,) camera sets that must agree: a list of sentences, empty if they do (tolerance in degrees).

    The orbits are compared up to a common turn about the vertical axis, because "front" is a name, not a place."""
    if len(painter) != len(sculptor):
        return [f"the painter makes {len(painter)} views and the sculptor wants {len(sculptor)}"]
    problems = []
    turn = painter.azimuth - sculptor.azimuth
    turn = (turn - turn[0] + 180) % 360 - 180
    if turn.abs().max() > tolerance:
        problems.append(
            f"azimuths are {_degrees(painter.azimuth)} for the painter, {_degrees(sculptor.azimuth)} for the sculptor"
        )
    if (painter.elevation - sculptor.elevation).abs().max() > tolerance:
        problems.append(
            f"elevations are {_degrees(painter.elevation)} for the painter, "
            f"{_degrees(sculptor.elevation)} for the sculptor"
        )
    if (painter.fov - sculptor.fov).abs().max() > tolerance:
        problems.append(
            f"fields of view are {_degrees(painter.fov)} for the painter, {_degrees(sculptor.fov)} for the sculptor"
        )
    return problems


def _degrees(values):
    return "/".join(f"{v:.0f}" for v in values.tolist())
