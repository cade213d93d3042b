"""The small world: procedural objects of one to three coloured primitives, their captions, and exact pictures of them.

Everything about an object is known (shape, colour, place), so that every model trained on this world can be judged
against the truth. Pictures come from closed-form ray intersections with four convex shapes, lit by one fixed light,
on white.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

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
VIEW_SIZE = 64
LIGHT = F.normalize(torch.tensor([0.35, -0.5, 0.8]), dim=0)
AMBIENT = 0.55


@dataclass(frozen=True)
class Primitives:
    """A batch of objects, each made of P primitives (unused places have size 0).

    shape (N, P) index into SHAPES; colour (N, P, 3) in [0, 1]; centre (N, P, 3); size (N, P) half extent; yaw (N,)."""

    shape: torch.Tensor
    colour: torch.Tensor
    centre: torch.Tensor
    size: torch.Tensor
    yaw: torch.Tensor

    def __len__(self):
        return len(self.yaw)

    def __getitem__(self, index):
        return Primitives(*(getattr(self, name)[index] for name in ("shape", "colour", "centre", "size", "yaw")))


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def all_captions():
    """Every caption of one and two primitives of different colours, in a fixed order."""
    things = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    pairs = [(a, b) for a in things for b in things if a.split()[0] != b.split()[0]]
    return [article(a) for a in things] + [
        f"{article(a)} {relation} {article(b)}" for relation in ("on top of", "next to") for a, b in pairs
    ]


def random_caption(generator):
    """One caption: a single primitive, a pair, or (rarely) a stack next to a third primitive."""

    def draw(n):
        return int(torch.randint(n, (), generator=generator))

    count = (1, 2, 2, 2, 2, 2, 2, 3)[draw(8)]
    colours = torch.randperm(len(COLOURS), generator=generator)[:count].tolist()
    things = [article(f"{list(COLOURS)[c]} {SHAPES[draw(len(SHAPES))]}") for c in colours]
    if count == 1:
        return things[0]
    if count == 2:
        return things[0] + (" on top of ", " next to ")[draw(2)] + things[1]
    return f"{things[0]} on top of {things[1]} next to {things[2]}"


def parse_caption(caption):
    """The (colour, shape) names and the relations of a caption, e.g. ([("red", "cube"), ("blue", "cone")], ["next
    to"])."""
    words = caption.split()
    things = [(words[i], words[i + 1]) for i in range(len(words) - 1) if words[i] in COLOURS and words[i + 1] in SHAPES]
    relations = [r for _, r in sorted((caption.find(r), r) for r in ("on top of", "next to") if r in caption)]
    if not things or len(relations) != len(things) - 1:
        raise ValueError(
            f"Caption {caption!r} does not describe an object of the small world, "
            f"e.g. 'a red cube next to a blue cone'."
        )
    return things, relations


def build(captions, generator):
    """Objects as the captions say, with random sizes, gaps and yaw: Primitives of N objects."""

    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    N, P = len(captions), 3
    shape, size = torch.zeros(N, P, dtype=torch.long), torch.zeros(N, P)
    colour, centre = torch.ones(N, P, 3), torch.zeros(N, P, 3)
    yaw = torch.rand(N, generator=generator) * 2 * math.pi
    for n, caption in enumerate(captions):
        things, relations = parse_caption(caption)
        base = {1: 0.62, 2: 0.40, 3: 0.36}[len(things)]
        for p, (name, kind) in enumerate(things):
            shape[n, p], size[n, p] = SHAPES.index(kind), base * uniform(0.85, 1.15)
            colour[n, p] = torch.tensor(COLOURS[name])
        columns, x = _columns(len(things), relations), 0.0
        for k, column in enumerate(columns):
            width = max(size[n, p].item() for p in column)
            x += (width + uniform(0.03, 0.12)) if k else 0.0
            z = 0.0
            for p in reversed(column):
                centre[n, p] = torch.tensor([x, 0.0, z + size[n, p].item()])
                z += 2 * size[n, p].item()
            x += width
        used = slice(0, len(things))
        low = (centre[n, used] - size[n, used, None]).amin(0)
        high = (centre[n, used] + size[n, used, None]).amax(0)
        centre[n, used] -= (low + high) / 2
        cos, sin = math.cos(yaw[n]), math.sin(yaw[n])
        centre[n, used] = centre[n, used] @ torch.tensor([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
    return Primitives(shape, colour, centre, size, yaw)


def _columns(count, relations):
    """Which primitives stand over each other, top first, column by column."""
    columns = [[0]]
    for p in range(1, count):
        if relations[p - 1] == "on top of":
            columns[-1].append(p)
        else:
            columns.append([p])
    return columns


def _interval(low, high):
    """Entry and exit of a ray through the intersection of convex parts: (..., K) distances -> (...)."""
    return low.amax(-1), high.amin(-1)


def _quadratic(a, b, c):
    """Real roots of a t^2 + 2 b t + c (low, high), an empty interval (inf, -inf) where there are none."""
    disc = b * b - a * c
    root = disc.clamp(min=0).sqrt()
    a = torch.where(a.abs() < 1e-9, torch.full_like(a, 1e-9), a)
    t0, t1 = (-b - root) / a, (-b + root) / a
    miss = disc < 0
    return torch.minimum(t0, t1).masked_fill(miss, math.inf), torch.maximum(t0, t1).masked_fill(miss, -math.inf)


def _slab(o, d, low, high):
    d = torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)
    t0, t1 = (low - o) / d, (high - o) / d
    return torch.minimum(t0, t1), torch.maximum(t0, t1)


def _intersect(kind, o, d):
    """Rays (..., 3) in the frame of a unit shape: entry distance (inf where missed) and outward normal there."""
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


def render(objects, cameras, size=VIEW_SIZE, supersample=2):
    """Pictures of N objects in V cameras ((V,...) shared or (N, V, ...)).

    Returns images (N, V, 3, size, size) in [0, 1] on white and coverage (N, V, 1, size, size) in [0, 1]."""
    if cameras.c2w.ndim == 3:
        cameras = cameras.expand(len(objects))
    # one object at a time keeps the working set in the processor's cache: twice as fast as one batch
    pictures = torch.stack(
        [_render_one(objects[n], cameras.c2w[n], cameras.fxfycxcy[n], size, supersample) for n in range(len(objects))]
    )
    return pictures[:, :, :3].clamp(0, 1), pictures[:, :, 3:]


def _render_one(thing, c2w, fxfycxcy, size, supersample):
    """(V, 4, size, size): colour on white and coverage of one object."""
    S, V = size * supersample, len(c2w)
    origin, direction = (x.reshape(-1, 3) for x in rays(Cameras(c2w, fxfycxcy), S))
    depth = torch.full((len(origin),), math.inf)
    picture = torch.ones(len(origin), 4)
    picture[:, 3] = 0
    cos, sin = math.cos(thing.yaw), math.sin(thing.yaw)
    frame = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])  # world row vectors @ frame = local
    for shape, colour, centre, half in zip(thing.shape, thing.colour, thing.centre, thing.size.tolist(), strict=True):
        if half == 0:
            continue
        # only rays that meet the bounding sphere of the primitive are worth intersecting
        to_centre = centre - c2w[:, :3, 3].repeat_interleave(S * S, 0)
        along = (to_centre * direction).sum(-1)
        r = (to_centre.square().sum(-1) - along.square() < 2.5 * half**2).nonzero()[:, 0]
        t, normal = _intersect(SHAPES[shape], (origin[r] - centre) @ frame / half, direction[r] @ frame / half)
        closer = t < depth[r]
        r, normal = r[closer], normal[closer] @ frame.T
        depth[r] = t[closer]
        picture[r, :3] = colour * (AMBIENT + (1 - AMBIENT) * (normal @ LIGHT).clamp(min=0))[:, None]
        picture[r, 3] = 1
    return F.avg_pool2d(picture.reshape(V, S, S, 4).permute(0, 3, 1, 2), supersample)


def novel_cameras(count, views, generator):
    """Random cameras (count, views) at the training radius and field of view: any azimuth, elevation -10 to 60
    degrees."""
    azimuth = 360 * torch.rand(count, views, generator=generator)
    elevation = -10 + 70 * torch.rand(count, views, generator=generator)
    return orbit_cameras(azimuth, elevation, radius=2.7, fov=50.0)


def fixed_views(objects):
    """The four Instant3D views of each object: (N, 4, 3, 64, 64)."""
    return render(objects, instant3d_cameras())[0]
