"""3D Gaussians against golden scenes, finite differences and closed forms; the PLY file against a parser."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recon import gaussian_splatting
from recon.cameras import Cameras, orbit_cameras
from recon.export import save_gaussians_ply
from recon.gaussian_splatting import GSPLAT, INRIA, INRIA_TILED, Gaussians, render_gaussians

GOLDEN = load_file(Path(__file__).parent / "golden" / "splat_scenes.safetensors")
SCENES = ["s20", "s200", "s500", "edge"]
CAMERA = orbit_cameras([30.0], 10.0, radius=2.0, fov=49.1)
TOLERANCE = 2e-5


def golden(scene):
    """Gaussians, cameras and (H, W) of a golden scene."""
    data = {key.removeprefix(scene + "/"): value for key, value in GOLDEN.items() if key.startswith(scene + "/")}
    width, height = data["wh"].tolist()
    K = data["K"].double()  # in pixels
    intrinsics = K[:, (0, 1, 0, 1), (0, 1, 2, 2)] / torch.tensor([width, height, width, height])
    fields = ("means", "opacities", "scales", "quats_wxyz", "rgb")
    return (
        Gaussians(*(data[field][None] for field in fields)),
        Cameras(torch.linalg.inv(data["w2c_opencv"].double()), intrinsics),
        (height, width),
    )


def cloud(count, scenes=1, dtype=torch.float32, seed=0):
    """Random Gaussians around the origin."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(scenes, count, *shape, generator=generator, dtype=torch.float64).to(dtype)

    return Gaussians(
        0.3 * normal(3),
        normal().sigmoid(),
        0.1 * (0.3 * normal(3)).exp(),
        torch.nn.functional.normalize(normal(4), dim=-1),
        normal(3).sigmoid(),
    )


def render(*args, **kwargs):
    """Image, alpha and depth as one tensor (B, V, 5, H, W)."""
    return torch.cat(render_gaussians(*args, **kwargs), -3)


# -- what it must look like -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scene, name, constants",
    [
        *((scene, "inria", INRIA) for scene in SCENES),
        *((scene, "gsplat15", GSPLAT) for scene in SCENES),
        *((scene, "inria_tiled", INRIA_TILED) for scene in ("s200", "s500")),
    ],
)
def test_golden_scenes(scene, name, constants):
    gaussians, cameras, size = golden(scene)
    image, alpha, depth = render_gaussians(gaussians, cameras, size, constants=constants)
    assert image.dtype == torch.float32 and image.shape == (1, len(cameras), 3, *size)
    assert (image[0] - GOLDEN[f"{scene}/{name}/rgb"].permute(0, 3, 1, 2)).abs().max() < TOLERANCE
    assert (alpha[0, :, 0] - GOLDEN[f"{scene}/{name}/alpha"]).abs().max() < TOLERANCE
    assert (depth[0, :, 0] - GOLDEN[f"{scene}/{name}/depth"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("scene", SCENES)
def test_what_cuda_cannot_honour_is_small(scene):
    """The bounds that SplatConstants states, where the principal point is in the middle."""
    gaussians, cameras, size = golden(scene)
    cameras = cameras[(cameras.fxfycxcy[:, 2:] - 0.5).abs().amax(-1) < 1e-6]
    on_cuda = render(gaussians, cameras, size, constants=replace(GSPLAT, near=INRIA.near))
    assert (on_cuda - render(gaussians, cameras, size, constants=INRIA)).abs().max() < 5e-4
    assert (on_cuda - render(gaussians, cameras, size, constants=INRIA_TILED)).abs().max() < 0.02


def test_one_gaussian_in_closed_form():
    """A ball in the middle of an odd image: alpha, depth and colour of the middle pixel and of its neighbour."""
    one = Gaussians(
        torch.zeros(1, 1, 3),
        torch.full((1, 1), 0.7),
        torch.full((1, 1, 3), 0.1),
        torch.tensor([[[1.0, 0, 0, 0]]]),
        torch.tensor([[[0.2, 0.4, 0.6]]]),
    )
    image, alpha, depth = render_gaussians(one, CAMERA, 33, background=torch.tensor([0.0, 0.5, 1.0]))
    variance = (0.1 / 2 * CAMERA.fxfycxcy[0, 0] * 33) ** 2 + 0.3
    expected = 0.7 * torch.exp(torch.tensor([0.0, -0.5]) / variance)
    assert torch.allclose(alpha[0, 0, 0, 16, 16:18], expected, atol=1e-6)
    assert torch.allclose(depth[0, 0, 0, 16, 16:18], 2 * expected, atol=1e-5)
    blend = torch.tensor([0.2, 0.4, 0.6]) * 0.7 + torch.tensor([0.0, 0.5, 1.0]) * 0.3
    assert torch.allclose(image[0, 0, :, 16, 16], blend, atol=1e-6)


def test_equal_depths_keep_their_order():
    """Depths are compared in float32: of two that differ by less, the first is in front, whichever is nearer."""
    look, colours = CAMERA.c2w[0, :3, 2].double(), torch.eye(3, dtype=torch.float64)[None, :2]
    for nearer in (0, 1):
        means = torch.zeros(1, 2, 3, dtype=torch.float64)
        means[0, nearer] = -1e-10 * look
        two = Gaussians(
            means,
            torch.full((1, 2), 0.9).double(),
            torch.full((1, 2, 3), 0.2).double(),
            torch.tensor([1.0, 0, 0, 0]).double().expand(1, 2, 4),
            colours,
        )
        image = render_gaussians(two, CAMERA, 9, background=0.0)[0][0, 0, :, 4, 4]
        assert image[0] == pytest.approx(0.9, abs=1e-6) and image[1] == pytest.approx(0.09, abs=1e-6)


def test_quaternions_that_are_not_unit():
    gaussians = cloud(30)
    longer = replace(gaussians, quaternions=1.5 * gaussians.quaternions)
    unit, raw = (
        render(gaussians, CAMERA, 16, constants=constants) - render(longer, CAMERA, 16, constants=constants)
        for constants in (GSPLAT, INRIA)
    )
    assert unit.abs().max() < 1e-5 and raw.abs().max() > 0.1


@pytest.mark.parametrize("nothing", ["no Gaussians", "behind", "clear", "outside", "next to the last tile"])
def test_nothing_to_see(nothing):
    gaussians = cloud(0 if nothing == "no Gaussians" else 5)
    if nothing == "behind":
        gaussians = replace(gaussians, means=gaussians.means + 4 * CAMERA.c2w[0, :3, 3])
    if nothing == "clear":
        gaussians = replace(gaussians, opacities=torch.zeros(1, 5))
    if nothing == "outside":
        gaussians = replace(gaussians, means=gaussians.means - 9 * CAMERA.c2w[0, :3, 0])
    if nothing == "next to the last tile":  # of an image whose sides are not whole tiles
        gaussians = replace(gaussians, means=(1.2 * CAMERA.c2w[0, :3, 0]).expand(1, 5, 3), scales=gaussians.scales / 99)
    image, alpha, depth = render_gaussians(gaussians, CAMERA, (12, 20), background=0.25, constants=INRIA_TILED)
    assert (image == 0.25).all() and (alpha == 0).all() and (depth == 0).all()


# -- how it gets there ------------------------------------------------------------------------------------------------


def with_gradients(gaussians):
    return Gaussians(*(value.clone().requires_grad_() for value in gaussians.tensors()))


@pytest.mark.parametrize("constants", [INRIA, replace(GSPLAT, alpha_max=0.6)])
def test_gradients_are_those_of_finite_differences(constants):
    gaussians = with_gradients(cloud(6, dtype=torch.float64))
    cameras = orbit_cameras([30.0, 200.0], 10.0, radius=1.2, fov=60.0)

    def function(*tensors):
        return render_gaussians(Gaussians(*tensors), cameras, (9, 10), constants=constants)

    assert torch.autograd.gradcheck(function, gaussians.tensors(), fast_mode=True)
    render(gaussians, cameras, (9, 10), constants=constants).square().sum().backward()
    assert all(value.grad.abs().max() > 1e-3 for value in gaussians.tensors())


def test_blocks_do_not_matter(monkeypatch):
    gaussians, cameras, size = golden("s500")

    def image_and_gradients():
        leaves = with_gradients(gaussians)
        image = render(leaves, cameras[0], size)
        return [image, *torch.autograd.grad(image.square().mean(), leaves.tensors())]

    expected = image_and_gradients()
    for name, value in dict(TILE=4, TILE_BLOCK=7, DEPTH_BLOCK=9, PAIRS=700).items():
        monkeypatch.setattr(gaussian_splatting, name, value)
    for ours, theirs in zip(image_and_gradients(), expected, strict=True):
        assert (ours - theirs).abs().max() < 2e-6


def test_gradients_pass_what_is_not_seen():
    gaussians = cloud(5)
    means = gaussians.means.clone()
    means[0, 0] = CAMERA.c2w[0, :3, 3]  # at depth 0
    opacities = gaussians.opacities * torch.tensor([1.0, 0, 1, 1, 1])
    leaves = with_gradients(replace(gaussians, means=means, opacities=opacities))
    render(leaves, CAMERA, 16).sum().backward()
    for value in leaves.tensors():
        assert value.grad.isfinite().all() and (value.grad[:, :2] == 0).all() and (value.grad[:, 2:] != 0).any()


def test_work_is_done_where_it_is_seen(monkeypatch):
    """Small Gaussians are blended into one tile each, and none behind an opaque wall."""
    blended, blend = [], gaussian_splatting._blend

    def counting_blend(splats, shades, member, missing, *rest, **constants):
        blended.append((~missing).sum())
        return blend(splats, shades, member, missing, *rest, **constants)

    monkeypatch.setattr(gaussian_splatting, "_blend", counting_blend)
    monkeypatch.setattr(gaussian_splatting, "PAIRS", 100)
    right_down, forward = CAMERA.c2w[0, :3, :2].sum(-1), CAMERA.c2w[0, :3, 2]
    small = replace(
        cloud(50),
        means=(0.1 * right_down).expand(1, 50, 3),
        scales=torch.full((1, 50, 3), 1e-4),
        opacities=torch.full((1, 50), 0.5),
    )
    render(small, CAMERA, 64)
    assert sum(blended) == 50

    wall = replace(
        small, means=(-forward).expand(1, 50, 3), scales=torch.full((1, 50, 3), 2.0), opacities=torch.ones(1, 50)
    )
    both = Gaussians(*(torch.cat(pair, 1) for pair in zip(small.tensors(), wall.tensors(), strict=True)))
    blended.clear()
    seen = render(both, CAMERA, 64)
    assert sum(blended) < 10 * 64 and (seen[:, :, 3] > 0.98).all()
    assert torch.equal(seen, render(wall, CAMERA, 64))


def test_batches():
    gaussians, cameras = cloud(20, scenes=2), orbit_cameras([0.0, 120.0, 240.0], 10.0, 2.0, 49.1)
    together = render(gaussians, cameras, 16)
    assert together.shape == (2, 3, 5, 16, 16)
    assert torch.equal(together[1:, 2:], render(gaussians[1], cameras[2], 16))
    assert torch.equal(together, render(gaussians, cameras.expand(2), (16, 16)))
    turned = Cameras(torch.stack([cameras.c2w, cameras.c2w.flip(0)]), cameras.fxfycxcy.expand(2, 3, 4))
    assert torch.equal(torch.stack([together[0], together[1].flip(0)]), render(gaussians, turned, 16))


def test_sets_of_scenes():
    gaussians = cloud(4, scenes=3)
    packed = torch.cat([value if value.ndim == 3 else value[..., None] for value in gaussians.tensors()], -1)
    assert packed.shape == (3, 4, 14)
    for ours, theirs in zip(Gaussians.from_packed(packed).tensors(), gaussians.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    assert len(gaussians) == 3 and len(gaussians[1]) == 1 and len(gaussians[[0, 2]]) == 2 and len(gaussians[1:]) == 2
    assert gaussians.to(torch.bfloat16).opacities.dtype == torch.bfloat16
    assert render(gaussians.to(torch.bfloat16), CAMERA, 8).dtype == torch.float32


FINE = cloud(3)


@pytest.mark.parametrize(
    "change, size, cameras, message",
    [
        (dict(opacities=torch.rand(1, 3, 1)), 8, CAMERA, r"means has shape \(1, 3, 3\) with opacities \(1, 3, 1\); it"),
        (dict(quaternions=torch.rand(1, 3, 3)), 8, CAMERA, r"quaternions has shape \(1, 3, 3\) .* must be \(B, N, 4\)"),
        (dict(scales=torch.rand(1, 4, 3)), 8, CAMERA, r"Gaussians.scales has shape \(1, 4, 3\)"),
        (dict(means=torch.full((1, 3, 3), torch.nan)), 8, CAMERA, "Gaussians.means holds 9 values that are not finite"),
        (dict(quaternions=torch.zeros(1, 3, 4)), 8, CAMERA, "3 of Gaussians.quaternions have length zero"),
        ({}, 0, CAMERA, "size is 0; it must be a whole number"),
        ({}, (8, 8, 8), CAMERA, r"size is \(8, 8, 8\); it must be a whole number"),
        ({}, 8.0, CAMERA, "size is 8.0; it must be a whole number"),
        ({}, 8, CAMERA.expand(2), r"c2w \(2, 1, 4, 4\) .* with B = 1"),
        ({}, 8, Cameras(CAMERA.c2w, CAMERA.fxfycxcy[0]), r"fxfycxcy \(4,\); they must be"),
        ({}, 8, Cameras(CAMERA.c2w * torch.inf, CAMERA.fxfycxcy), "cameras hold values that are not finite"),
    ],
)
def test_what_cannot_be_rendered_is_named(change, size, cameras, message):
    with pytest.raises(ValueError, match=message):
        render_gaussians(replace(FINE, **change), cameras, size)


def test_a_background_is_one_number_or_three():
    with pytest.raises(ValueError, match=r"background has shape \(2,\)"):
        render_gaussians(FINE, CAMERA, 8, background=torch.ones(2))


def test_packed_gaussians_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 3, 13\); they must be \(B, N, 14\)"):
        Gaussians.from_packed(torch.zeros(1, 3, 13))


# -- gsplat -----------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(importlib.util.find_spec("gsplat") is None, reason="needs the package gsplat")
@pytest.mark.parametrize("scene", SCENES)
def test_both_backends_agree(scene):
    gaussians, cameras, size = golden(scene)
    ours, theirs = with_gradients(gaussians), with_gradients(gaussians.to("cuda"))
    expected, image = (render(leaves, cameras, size, constants=GSPLAT) for leaves in (ours, theirs))
    assert (image.cpu() - expected).abs().max() < 1e-4
    expected.square().mean().backward()
    image.square().mean().backward()
    for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert torch.nn.functional.cosine_similarity(a.grad.flatten(), b.grad.cpu().flatten(), 0) > 0.999


def test_gsplat_is_called_for_the_same_image(monkeypatch):
    """Its rasterization, played by the other backend: world-to-camera matrices, intrinsics in pixels, channels last."""

    def rasterization(
        means, quats, scales, opacities, colors, viewmats, Ks, width, height, near_plane, render_mode, packed
    ):
        assert render_mode == "RGB+D" and all(value.dtype == torch.float32 for value in (means, viewmats, Ks))
        K = Ks / torch.tensor([width, height, 1.0])[:, None]
        cameras = Cameras(torch.linalg.inv(viewmats), K[..., (0, 1, 0, 1), (0, 1, 2, 2)])
        scene = Gaussians(means, opacities, scales, quats, colors)
        image, alpha, depth = render_gaussians(
            scene, cameras, (height, width), background=0.0, constants=replace(GSPLAT, near=near_plane)
        )
        return torch.cat([image, depth], -3).movedim(-3, -1), alpha.movedim(-3, -1), {}

    monkeypatch.setitem(sys.modules, "gsplat", SimpleNamespace(rasterization=rasterization))
    gaussians, cameras, size = golden("s200")
    result = gaussian_splatting._render_gsplat(gaussians, cameras.expand(1), *size, replace(GSPLAT, near=0.5))
    expected = gaussian_splatting._render_torch(gaussians, cameras.expand(1), *size, replace(GSPLAT, near=0.5))
    assert result.shape == expected.shape and (result - expected).abs().max() < 1e-4


def test_without_gsplat_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(ImportError, match="pip install gsplat==1.5.3"):
        gaussian_splatting._render_gsplat(FINE, CAMERA.expand(1), 8, 8, INRIA)


# -- files ------------------------------------------------------------------------------------------------------------


def test_ply_is_read_back(tmp_path):
    gaussians = cloud(7)
    gaussians.opacities[0, 0], gaussians.opacities[0, 1], gaussians.scales[0, 2, 1] = 0.0, 1.0, 0.0
    save_gaussians_ply(gaussians, tmp_path / "scene.ply")
    header, body = (tmp_path / "scene.ply").read_bytes().split(b"end_header\n")
    lines = header.decode().splitlines()
    assert lines[:3] == ["ply", "format binary_little_endian 1.0", "element vertex 7"]
    names = [line.removeprefix("property float ") for line in lines[3:]]
    expected = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3"
    assert names == expected.split()
    table = torch.from_numpy(np.frombuffer(body, "<f4").reshape(7, 17).copy())
    assert table.isfinite().all() and (table[:, 3:6] == 0).all()
    read = torch.cat(
        [
            table[:, :3],
            table[:, 9:10].sigmoid(),
            table[:, 10:13].exp(),
            table[:, 13:],
            table[:, 6:9] * 0.28209479177387814 + 0.5,
        ],
        -1,
    )
    for ours, theirs in zip(Gaussians.from_packed(read[None]).tensors(), gaussians.tensors(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-6)


def test_a_ply_file_holds_one_scene(tmp_path):
    with pytest.raises(ValueError, match="holds one scene and there are 2"):
        save_gaussians_ply(cloud(3, scenes=2), tmp_path / "scene.ply")
