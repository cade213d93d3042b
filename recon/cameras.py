"""Cameras. One convention everywhere: OpenCV axes (x right, y down, z forward), world z up, camera-to-world poses,
intrinsics in units of the image size. Every other convention is converted here and nowhere else."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from recon.precision import without_tf32


@dataclass(frozen=True)
class Cameras:
    """V pinhole cameras, or a batch of such sets.

    c2w: (..., V, 4, 4) camera-to-world poses, OpenCV axes, world z up.
    fxfycxcy: (..., V, 4) focal lengths and principal point of an image whose sides have length 1.
    """

    c2w: torch.Tensor
    fxfycxcy: torch.Tensor

    def __len__(self) -> int:
        """V, whether batched or not."""
        return self.c2w.shape[-3]

    def to(self, *args, **kwargs) -> "Cameras":
        """Both tensors moved or converted as by `torch.Tensor.to`."""
        return Cameras(self.c2w.to(*args, **kwargs), self.fxfycxcy.to(*args, **kwargs))

    def __getitem__(self, index: int | slice | list[int]) -> "Cameras":
        """Select cameras along the V axis, which is kept as an axis."""
        index = [index] if isinstance(index, int) else index
        return Cameras(self.c2w[..., index, :, :], self.fxfycxcy[..., index, :])

    def expand(self, batch: int) -> "Cameras":
        """V cameras common to all samples -> (batch, V), without copying. Cameras that are batched stay as they are."""
        if self.c2w.ndim > 3:
            return self
        return Cameras(self.c2w.expand(batch, *self.c2w.shape), self.fxfycxcy.expand(batch, *self.fxfycxcy.shape))

    def split(self, size: int) -> list["Cameras"]:
        """Batched cameras (B, V) in parts of `size` samples, the last one smaller if B is not a multiple."""
        return [Cameras(*part) for part in zip(self.c2w.split(size), self.fxfycxcy.split(size), strict=True)]

    def unbind(self) -> list["Cameras"]:
        """Batched cameras (B, V) as B sets of V."""
        return [Cameras(*one) for one in zip(self.c2w, self.fxfycxcy, strict=True)]

    @property
    def radius(self) -> torch.Tensor:
        """(..., V) distance from the origin."""
        return self.c2w[..., :3, 3].norm(dim=-1)

    @property
    def elevation(self) -> torch.Tensor:
        """(..., V) degrees above the horizontal plane."""
        x, y, z = self.c2w[..., :3, 3].unbind(-1)
        return torch.rad2deg(torch.atan2(z, torch.hypot(x, y)))

    @property
    def azimuth(self) -> torch.Tensor:
        """(..., V) degrees in [0, 360), counter-clockwise from +x seen from above."""
        x, y, _ = self.c2w[..., :3, 3].unbind(-1)
        return torch.rad2deg(torch.atan2(y, x)) % 360

    @property
    def fov(self) -> torch.Tensor:
        """(..., V) horizontal field of view in degrees."""
        return torch.rad2deg(2 * torch.atan(0.5 / self.fxfycxcy[..., 0]))


def look_at(
    position: torch.Tensor | Sequence[float], target: torch.Tensor | Sequence[float] = (0.0, 0.0, 0.0)
) -> torch.Tensor:
    """Camera-to-world poses (..., 4, 4) of cameras at `position` (..., 3) that look at `target` with world z up.

    A position straight above or below the target, where "up" has no meaning, gives no valid pose."""
    position = torch.as_tensor(position, dtype=torch.float32)
    forward = torch.nn.functional.normalize(torch.as_tensor(target, dtype=torch.float32) - position, dim=-1)
    up = torch.tensor([0.0, 0.0, 1.0]).expand_as(forward)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up, dim=-1), dim=-1)
    down = torch.linalg.cross(forward, right, dim=-1)
    c2w = torch.eye(4).repeat(*position.shape[:-1], 1, 1)
    c2w[..., :3, :] = torch.stack([right, down, forward, position], dim=-1)
    return c2w


def orbit_cameras(
    azimuth: torch.Tensor | Sequence[float],
    elevation: torch.Tensor | float | Sequence[float],
    radius: float,
    fov: float,
) -> Cameras:
    """Cameras on a sphere around the origin that look at the origin.

    azimuth, elevation: degrees, broadcast to (..., V); radius: distance to the origin; fov: field of view in degrees.
    A camera at azimuth a and elevation e stands at radius * (cos e cos a, cos e sin a, sin e)."""
    azimuth, elevation = torch.broadcast_tensors(
        torch.deg2rad(torch.as_tensor(azimuth, dtype=torch.float32)),
        torch.deg2rad(torch.as_tensor(elevation, dtype=torch.float32)),
    )
    position = radius * torch.stack(
        [elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], dim=-1
    )
    focal = 0.5 / math.tan(math.radians(fov) / 2)
    return Cameras(look_at(position), torch.tensor([focal, focal, 0.5, 0.5]).expand(*azimuth.shape, 4))


def instant3d_cameras() -> Cameras:
    """The four views of Instant3D's 2x2 grid in reading order: azimuths 225, 315, 45 and 135 degrees, elevation 20,
    radius 2.7, field of view 50 degrees."""
    return orbit_cameras([225.0, 315.0, 45.0, 135.0], 20.0, radius=2.7, fov=50.0)


def mvdream_cameras(elevation: float = 0.0, azimuth_start: float = 0.0, radius: float = 1.5) -> Cameras:
    """MVDream's four views, 90 degrees apart, `elevation` degrees above the horizon.

    azimuth_start: that of the first view in degrees, as MVDream counts azimuths, which is 90 more than here.
    radius: MVDream's own cameras are directions only; 1.5 and the field of view of 49.1 degrees are those of LGM, which
    its views are commonly given to."""
    azimuth = torch.tensor([0.0, 90.0, 180.0, 270.0]) + azimuth_start - 90.0
    return orbit_cameras(azimuth, elevation, radius, fov=49.1)


def zero123plus_cameras() -> Cameras:
    """The six views of Zero123++ (version 1.2) in reading order of its grid of 3 rows and 2 columns: azimuths 30, 90,
    ..., 330 degrees from the side of the image that they are painted from, elevations 20 and -10 in turn, field of view
    30 degrees; radius 4 is what InstantMesh gives them."""
    return orbit_cameras(torch.arange(30.0, 360.0, 60.0), [20.0, -10.0] * 3, radius=4.0, fov=30.0)


# Cameras for a reconstructor that takes any, by the painter whose views they are: elevation in degrees, which only
# MVDream's can choose -> cameras. MVDream knows no distances: from 2.35 its views show as much of the world as
# Zero123++'s from 4.
RIGS: dict[str, Callable[[float], Cameras]] = {
    "instant3d": lambda elevation: instant3d_cameras(),
    "mvdream": lambda elevation: mvdream_cameras(elevation, radius=2.35),
    "zero123plus": lambda elevation: zero123plus_cameras(),
}


def flip_axes(c2w: torch.Tensor) -> torch.Tensor:
    """Poses (..., 4, 4) with OpenCV axes (y down, z forward) -> the same poses with those of OpenGL and Blender (y up,
    z backward), and vice versa."""
    return c2w * c2w.new_tensor([1.0, -1.0, -1.0, 1.0])


def mvdream_camera_vectors(cameras: Cameras) -> torch.Tensor:
    """The camera embedding's input in MVDream's UNet, (..., V, 16) for `cameras` (..., V): row-major camera-to-world
    matrices with OpenGL axes and positions on the unit sphere."""
    c2w = flip_axes(cameras.c2w)
    position = torch.nn.functional.normalize(c2w[..., :3, 3:], dim=-2)
    return torch.cat([torch.cat([c2w[..., :3, :3], position], -1), c2w[..., 3:, :]], -2).flatten(-2)


def _to_lgm_axes(vectors):
    """Ours (..., 3) -> LGM's, whose x, y (up), z are our y, z, x: its first camera looks from +z, ours from +x."""
    return vectors.roll(-1, -1)


def _from_lgm_axes(vectors):
    return vectors.roll(1, -1)


def lgm_pluecker(cameras: Cameras, size: int) -> torch.Tensor:
    """LGM's input of `cameras` (..., V): the Pluecker coordinates (o x d, d) of every pixel's ray in LGM's axes,
    (..., V, 6, size, size)."""
    origin, direction = (_to_lgm_axes(x) for x in rays(cameras, size))
    moment = torch.linalg.cross(origin, direction, dim=-1)
    return torch.cat([moment, direction], -1).transpose(-1, -2).unflatten(-1, (size, size))


def from_lgm_axes(positions: torch.Tensor, quaternions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussians in LGM's axes -> ours. positions (..., 3); quaternions (..., 4), w first."""
    w, x, y, z = quaternions.unbind(-1)
    # times (1 + i + j + k) / 2, the rotation that takes LGM's x, y, z to our y, z, x
    rotated = torch.stack([w - x - y - z, w + x + z - y, w + y + x - z, w + z + y - x], -1) / 2
    return _from_lgm_axes(positions), rotated


def lrm_source_vectors(cameras: Cameras) -> torch.Tensor:
    """The vectors that OpenLRM's transformer and InstantMesh's encoder are conditioned on, (..., V, 16) for `cameras`
    (..., V): the upper three rows of the row-major camera-to-world matrix with OpenGL axes, then fx, fy, cx, cy of an
    image of side length 1."""
    return torch.cat([flip_axes(cameras.c2w)[..., :3, :].flatten(-2), cameras.fxfycxcy], -1)


def cameras_of_lrm(vectors: torch.Tensor) -> Cameras:
    """Render cameras of OpenLRM and InstantMesh (..., V, 25) as `Cameras`: a row-major camera-to-world matrix with
    OpenGL axes, then a row-major 3x3 intrinsic matrix of an image of side length 1, whose skew is left out."""
    intrinsics = vectors[..., 16:]
    return Cameras(flip_axes(vectors[..., :16].unflatten(-1, (4, 4))), intrinsics[..., [0, 4, 2, 5]])


@without_tf32()
def openlrm_canonical_transform(source: Cameras, distance: float | None = None) -> torch.Tensor:
    """Rigid transforms (..., 1, 4, 4) from the common world to the one that OpenLRM reconstructs from a view of the
    camera `source` (..., 1), where that camera stands at (0, -distance, 0) and looks along +y with z up.

    distance: None = the source's own distance from the origin, so that a source that looks at the origin keeps the
    origin, and the object around it, in place; a number moves everything along the source's axis."""
    if distance is None:
        distance = source.c2w[..., :3, 3].norm(dim=-1)
    canonical = look_at((0.0, -1.0, 0.0)).to(source.c2w).expand(source.c2w.shape).clone()
    canonical[..., 1, 3] = -distance
    return canonical @ torch.linalg.inv(source.c2w)


@without_tf32()
def openlrm_canonical_cameras(cameras: Cameras, source: Cameras, distance: float | None = None) -> Cameras:
    """`cameras` (..., V) moved rigidly by the `openlrm_canonical_transform` of `source` (..., 1)."""
    c2w = openlrm_canonical_transform(source, distance) @ cameras.c2w
    return Cameras(c2w, cameras.fxfycxcy.expand(*c2w.shape[:-2], 4))


def grid_directions(cameras: Cameras, pixel: torch.Tensor) -> torch.Tensor:
    """World directions of z-depth 1 through the points of a square grid, row by row: (..., V, P*P, 3).

    pixel: (P,) image coordinates of the grid's columns, and of its rows."""
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    fx, fy, cx, cy = cameras.fxfycxcy[..., None].unbind(-2)
    direction = torch.stack(
        [(x.flatten() - cx) / fx, (y.flatten() - cy) / fy, torch.ones_like(cx + x.flatten())], dim=-1
    )
    return direction @ cameras.c2w[..., :3, :3].transpose(-1, -2)


@without_tf32()
def rays(cameras: Cameras, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rays through the pixel centres of square images, row by row.

    Returns origins and unit directions, each (..., V, size*size, 3)."""
    pixel = (torch.arange(size, device=cameras.c2w.device, dtype=cameras.c2w.dtype) + 0.5) / size
    direction = torch.nn.functional.normalize(grid_directions(cameras, pixel), dim=-1)
    return cameras.c2w[..., None, :3, 3].expand_as(direction), direction


@without_tf32()
def project(points: torch.Tensor, cameras: Cameras) -> tuple[torch.Tensor, torch.Tensor]:
    """Project world points (..., N, 3) into every camera: image coordinates (..., V, N, 2), in [0, 1] inside the image
    (x right, y down), and z-depths (..., V, N)."""
    w2c = torch.linalg.inv(cameras.c2w)
    camera_points = points[..., None, :, :] @ w2c[..., :3, :3].transpose(-1, -2) + w2c[..., None, :3, 3]
    depth = camera_points[..., 2]
    focal, centre = cameras.fxfycxcy[..., None, :2], cameras.fxfycxcy[..., None, 2:]
    return camera_points[..., :2] / depth[..., None] * focal + centre, depth


def camera_disagreement(painter: Cameras, reconstructor: Cameras, tolerance: float = 1.0) -> list[str]:
    """How the V cameras that views are painted for differ from those that a reconstructor wants them from: one clause
    per difference, none if they agree. tolerance: in degrees.

    Azimuths are compared up to a common rotation about the vertical axis, since which side is the front is a matter of
    naming. Distances are not compared: painters do not know them."""
    if len(painter) != len(reconstructor):
        return [f"the painter paints {len(painter)} views and the reconstructor takes {len(reconstructor)}"]
    problems = []
    rotation = painter.azimuth - reconstructor.azimuth
    rotation = (rotation - rotation[0] + 180) % 360 - 180
    if rotation.abs().max() > tolerance:
        problems.append(_difference("azimuths", painter.azimuth, reconstructor.azimuth))
    if (painter.elevation - reconstructor.elevation).abs().max() > tolerance:
        problems.append(_difference("elevations", painter.elevation, reconstructor.elevation))
    if (painter.fov - reconstructor.fov).abs().max() > tolerance:
        problems.append(_difference("fields of view", painter.fov, reconstructor.fov))
    return problems


def _difference(angles, painter, reconstructor):
    painted, wanted = ("/".join(f"{degrees:.0f}" for degrees in values.tolist()) for values in (painter, reconstructor))
    return f"{angles} are {painted} for the painter, {wanted} for the reconstructor"
