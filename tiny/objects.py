"""The small world: procedural objects of one to three coloured primitives, their captions, and exact renders of them.

The shape, colour and position of every primitive are known, so every model trained on this world can be compared with
the ground truth. Renders come from closed-form ray intersections with four convex shapes, lit by one fixed light, on a
white background.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from config.errors import UserError
from recon.cameras import Cameras, instant3d_cameras, orbit_cameras, rays

SHAPES = ("cube", "sphere", "cylinder", "cone")
COLOURS = {
    "red": (0.85, 0.10, 0.10),
    "orange": (0.95, 0.50, 0.08),
    "yellow": (0.90, 0.85, 0.10),
    "green": (0.10, 0.65, 0.18),
    "cyan": (0.15, 0.75, 0.85),
    "blue": (0.12, 0.20, 0.85),
    "purple": (0.55, 0.12, 0.70),
    "gray": (0.45, 0.45, 0.45),
}
COLOUR_NAMES = tuple(COLOURS)
PALETTE = torch.tensor(list(COLOURS.values()))  # (8, 3), RGB in [0, 1]
VIEW_SIZE = 64  # pixels
LIGHT = F.normalize(torch.tensor([0.35, -0.5, 0.8]), dim=0)
AMBIENT = 0.55


@dataclass(frozen=True)
class Primitives:
    """A batch of N objects, each made of P primitives; unused slots have size 0.

    shape: (N, P) indices into SHAPES; colour: (N, P, 3) RGB in [0, 1]; centre: (N, P, 3) in world units; size: (N, P)
    half extents in world units; yaw: (N,) rotation about the vertical axis in radians."""

    shape: torch.Tensor
    colour: torch.Tensor
    centre: torch.Tensor
    size: torch.Tensor
    yaw: torch.Tensor

    def __len__(self) -> int:
        return len(self.yaw)

    def __getitem__(self, index: int | slice | torch.Tensor) -> "Primitives":
        return Primitives(*(getattr(self, name)[index] for name in ("shape", "colour", "centre", "size", "yaw")))


def with_article(words: str) -> str:
    """`words` after "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def all_captions() -> list[str]:
    """Every caption with one primitive, or with two primitives of different colours, in a fixed order."""
    primitives = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    pairs = [(a, b) for a in primitives for b in primitives if a.split()[0] != b.split()[0]]
    return [with_article(a) for a in primitives] + [
        f"{with_article(a)} {relation} {with_article(b)}" for relation in ("on top of", "next to") for a, b in pairs
    ]


def random_caption(generator: torch.Generator) -> str:
    """A caption with one primitive (1 in 8), two (6 in 8), or a stack of two next to a third (1 in 8)."""

    def draw(n):
        return int(torch.randint(n, (), generator=generator))

    count = (1, 2, 2, 2, 2, 2, 2, 3)[draw(8)]
    colours = torch.randperm(len(COLOURS), generator=generator)[:count].tolist()
    primitives = [with_article(f"{COLOUR_NAMES[c]} {SHAPES[draw(len(SHAPES))]}") for c in colours]
    if count == 1:
        return primitives[0]
    if count == 2:
        return primitives[0] + (" on top of ", " next to ")[draw(2)] + primitives[1]
    return f"{primitives[0]} on top of {primitives[1]} next to {primitives[2]}"


def parse_caption(caption: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The (colour, shape) names of a caption and the relations between them.

    "a red cube next to a blue cone" gives ([("red", "cube"), ("blue", "cone")], ["next to"]). Raises ValueError if the
    caption does not describe an object of the small world."""
    words = caption.split()
    named = [pair for pair in zip(words, words[1:], strict=False) if pair[0] in COLOURS and pair[1] in SHAPES]
    relations = [r for _, r in sorted((caption.find(r), r) for r in ("on top of", "next to") if r in caption)]
    if not named or len(relations) != len(named) - 1:
        raise UserError(
            f"Caption {caption!r} does not describe an object of the small world; "
            f"write one like 'a red cube next to a blue cone'."
        )
    return named, relations


def build(captions: list[str], generator: torch.Generator) -> Primitives:
    """One object per caption, with random sizes, gaps and yaw: Primitives of N objects, P = 3.

    Raises ValueError for a caption that does not describe an object of the small world."""

    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    N, P = len(captions), 3
    shape, size = torch.zeros(N, P, dtype=torch.long), torch.zeros(N, P)
    colour, centre = torch.ones(N, P, 3), torch.zeros(N, P, 3)
    yaw = torch.rand(N, generator=generator) * 2 * math.pi
    for n, caption in enumerate(captions):
        named, relations = parse_caption(caption)
        base = {1: 0.62, 2: 0.40, 3: 0.36}[len(named)]
        for p, (name, kind) in enumerate(named):
            shape[n, p], size[n, p] = SHAPES.index(kind), base * uniform(0.85, 1.15)
            colour[n, p] = torch.tensor(COLOURS[name])
        columns, x = _columns(len(named), relations), 0.0
        for k, column in enumerate(columns):
            width = max(size[n, p].item() for p in column)
            x += (width + uniform(0.03, 0.12)) if k else 0.0
            z = 0.0
            for p in reversed(column):
                centre[n, p] = torch.tensor([x, 0.0, z + size[n, p].item()])
                z += 2 * size[n, p].item()
            x += width
        used = slice(0, len(named))
        low = (centre[n, used] - size[n, used, None]).amin(0)
        high = (centre[n, used] + size[n, used, None]).amax(0)
        centre[n, used] -= (low + high) / 2
        cos, sin = math.cos(yaw[n]), math.sin(yaw[n])
        centre[n, used] = centre[n, used] @ torch.tensor([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
    return Primitives(shape, colour, centre, size, yaw)


def random_objects(count: int, generator: torch.Generator) -> Primitives:
    """Objects of `count` random captions."""
    return build([random_caption(generator) for _ in range(count)], generator)


def _columns(count, relations):
    """Indices of the primitives column by column, each column from top to bottom."""
    columns = [[0]]
    for p in range(1, count):
        if relations[p - 1] == "on top of":
            columns[-1].append(p)
        else:
            columns.append([p])
    return columns


def _interval(low, high):
    """Entry and exit distances of a ray through the intersection of K convex solids: (..., K) -> (...)."""
    return low.amax(-1), high.amin(-1)


def _quadratic(a, b, c):
    """Real roots (low, high) of a t^2 + 2 b t + c, or the empty interval (inf, -inf) where there are none."""
    disc = b * b - a * c
    root = disc.clamp(min=0).sqrt()
    a = torch.where(a.abs() < 1e-9, torch.full_like(a, 1e-9), a)
    t0, t1 = (-b - root) / a, (-b + root) / a
    miss = disc < 0
    return torch.minimum(t0, t1).masked_fill(miss, math.inf), torch.maximum(t0, t1).masked_fill(miss, -math.inf)


def _slab(o, d, low, high):
    """Entry and exit distances of a ray between two parallel planes."""
    d = torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)
    t0, t1 = (low - o) / d, (high - o) / d
    return torch.minimum(t0, t1), torch.maximum(t0, t1)


def _intersect(kind, o, d):
    """Entry distance (inf for a miss) and outward normal of rays (..., 3), in the frame of a unit shape."""
    (ox, oy, oz), (dx, dy, dz) = o.unbind(-1), d.unbind(-1)
    if kind == "sphere":
        near, far = _quadratic((d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1)
        normal = o + near.clamp(max=1e4)[..., None] * d
    elif kind == "cube":
        sides = _slab(ox, dx, -0.85, 0.85), _slab(oy, dy, -0.85, 0.85), _slab(oz, dz, -1.0, 1.0)
        low, high = (torch.stack(t, -1) for t in zip(*sides, strict=True))
        near, far = _interval(low, high)
        normal = -F.one_hot(low.argmax(-1), 3).to(d) * d.sign()
    else:
        if kind == "cylinder":
            side = _quadratic(dx**2 + dy**2, ox * dx + oy * dy, ox**2 + oy**2 - 0.85**2)
        else:  # cone: x^2 + y^2 = ((1 - z) / 2)^2, apex at z = 1
            h = 1 - oz
            side = _cone_side(
                dx**2 + dy**2 - dz**2 / 4, ox * dx + oy * dy + h * dz / 4, ox**2 + oy**2 - h**2 / 4, oz, dz
            )
        cap = _slab(oz, dz, -1.0, 1.0)
        low, high = torch.stack([side[0], cap[0]], -1), torch.stack([side[1], cap[1]], -1)
        near, far = _interval(low, high)
        hit = o + near.clamp(-1e4, 1e4)[..., None] * d
        z_side = torch.zeros_like(oz) if kind == "cylinder" else (1 - hit[..., 2]) / 4
        on_side = torch.stack([hit[..., 0], hit[..., 1], z_side], -1)
        on_cap = torch.stack([torch.zeros_like(oz), torch.zeros_like(oz), -dz.sign()], -1)
        normal = torch.where((low[..., 0] > low[..., 1])[..., None], on_side, on_cap)
    hit = (near < far) & (near > 0)
    return near.masked_fill(~hit, math.inf), F.normalize(normal, dim=-1)


def _cone_side(a, b, c, oz, dz):
    """The part of a ray inside the lower nappe of the double cone (z <= 1)."""
    low, high = _quadratic(a, b, c)
    apex = (1 - oz) / torch.where(dz.abs() < 1e-9, torch.full_like(dz, 1e-9), dz)
    steep = a < 0  # steeper than the cone: inside before the first root or after the second
    downward = dz < 0
    entry = torch.where(steep & downward, high, torch.where(steep, torch.full_like(low, -math.inf), low))
    leave = torch.where(steep & ~downward, low, torch.where(steep, torch.full_like(high, math.inf), high))
    entry = torch.where(downward, torch.maximum(entry, apex), entry)
    leave = torch.where(downward, leave, torch.minimum(leave, apex))
    return entry, leave


def render(
    objects: Primitives, cameras: Cameras, size: int = VIEW_SIZE, supersample: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Render N objects from V cameras, either (V,) shared by all objects or (N, V).

    Every pixel is the mean of supersample^2 rays. Returns images (N, V, 3, size, size) in [0, 1] on white and coverage
    (N, V, 1, size, size) in [0, 1]."""
    if cameras.c2w.ndim == 3:
        cameras = cameras.expand(len(objects))
    # one object at a time keeps the working set in the processor's cache: twice as fast as one batch
    images = torch.stack(
        [_render_one(objects[n], cameras.c2w[n], cameras.fxfycxcy[n], size, supersample) for n in range(len(objects))]
    )
    return images[:, :, :3].clamp(0, 1), images[:, :, 3:]


def _render_one(one, c2w, fxfycxcy, size, supersample):
    """Colour on white and coverage of one object: (V, 4, size, size)."""
    S, V = size * supersample, len(c2w)
    origin, direction = (x.reshape(-1, 3) for x in rays(Cameras(c2w, fxfycxcy), S))
    depth = torch.full((len(origin),), math.inf)
    image = torch.ones(len(origin), 4)
    image[:, 3] = 0
    cos, sin = math.cos(one.yaw), math.sin(one.yaw)
    frame = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])  # world row vectors @ frame = local
    for shape, colour, centre, half in zip(one.shape, one.colour, one.centre, one.size.tolist(), strict=True):
        if half == 0:
            continue
        # for speed, intersect only the rays that meet the primitive's bounding sphere
        to_centre = centre - c2w[:, :3, 3].repeat_interleave(S * S, 0)
        along = (to_centre * direction).sum(-1)
        r = (to_centre.square().sum(-1) - along.square() < 2.5 * half**2).nonzero()[:, 0]
        t, normal = _intersect(SHAPES[shape], (origin[r] - centre) @ frame / half, direction[r] @ frame / half)
        closer = t < depth[r]
        r, normal = r[closer], normal[closer] @ frame.T
        depth[r] = t[closer]
        image[r, :3] = colour * (AMBIENT + (1 - AMBIENT) * (normal @ LIGHT).clamp(min=0))[:, None]
        image[r, 3] = 1
    return F.avg_pool2d(image.reshape(V, S, S, 4).permute(0, 3, 1, 2), supersample)


def novel_cameras(count: int, views: int, generator: torch.Generator) -> Cameras:
    """Random cameras (count, views) at the fixed cameras' radius and field of view.

    Azimuths are uniform over the circle, elevations uniform from -10 to 60 degrees."""
    azimuth = 360 * torch.rand(count, views, generator=generator)
    elevation = -10 + 70 * torch.rand(count, views, generator=generator)
    return orbit_cameras(azimuth, elevation, radius=2.7, fov=50.0)


def fixed_views(objects: Primitives) -> torch.Tensor:
    """The four Instant3D views of each object: (N, 4, 3, 64, 64) in [0, 1] on white."""
    return render(objects, instant3d_cameras())[0]
