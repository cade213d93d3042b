"""Cameras against known points, volume rendering against closed forms, and TinyLRM, the small reconstructor."""

import copy
import math

import pytest
import torch
from ml_collections import ConfigDict
from safetensors.torch import save_file

from recon import load_reconstructor
from recon.cameras import Cameras, camera_disagreement, instant3d_cameras, orbit_cameras, project, rays
from recon.tiny_lrm import TinyLRM
from recon.volume_rendering import (
    box_interval,
    composite,
    importance_depths,
    occupancy_grid,
    render_occupied,
    render_rays,
    sample_planes,
    stratified_depths,
)


def ball(points):
    """An opaque red ball of radius 0.6 with a soft rim, blue in its upper half."""
    density = 400 * torch.sigmoid((0.6 - points.norm(dim=-1)) * 100)
    upper = (points[..., 2:] > 0).float()
    return density, torch.cat([1 - upper, torch.zeros_like(upper), upper], -1)


# -- cameras ------------------------------------------------------------------------------------------------------


def test_the_origin_is_in_the_middle_and_up_is_up():
    pixels, depth = project(torch.tensor([[0.0, 0, 0], [0, 0, 0.5]]), instant3d_cameras())
    assert torch.allclose(pixels[:, 0], torch.full((4, 2), 0.5), atol=1e-6)
    assert torch.allclose(depth[:, 0], torch.full((4,), 2.7), atol=1e-6)
    assert (pixels[:, 1, 1] < 0.4).all() and torch.allclose(pixels[:, 1, 0], torch.full((4,), 0.5), atol=1e-6)


def test_right_is_counter_clockwise():
    """Seen from +x (azimuth 0), +y is on the right."""
    pixels, _ = project(torch.tensor([[0.0, 0.3, 0.0]]), orbit_cameras([0.0], 0.0, 2.0, 60.0))
    assert pixels[0, 0, 0] > 0.5 and pixels[0, 0, 1] == pytest.approx(0.5, abs=1e-6)


def test_angles_are_read_back():
    cameras = instant3d_cameras()
    assert torch.allclose(cameras.azimuth, torch.tensor([225.0, 315.0, 45.0, 135.0]), atol=1e-3)
    assert torch.allclose(cameras.elevation, torch.full((4,), 20.0), atol=1e-3)
    assert torch.allclose(cameras.fov, torch.full((4,), 50.0), atol=1e-3)
    assert cameras.fxfycxcy[0, 0] == pytest.approx(1.0722535, abs=1e-6)
    assert torch.allclose(torch.linalg.det(cameras.c2w), torch.ones(4), atol=1e-5)


def test_rays_and_projection_are_inverse():
    cameras = orbit_cameras([10.0, 100.0], [5.0, 40.0], 2.0, 40.0)
    origins, directions = rays(cameras, 8)
    for v in range(2):
        pixels, _ = project(origins[v] + 1.7 * directions[v], cameras[v])
        y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
        expected = (torch.stack([x, y], -1).reshape(-1, 2) + 0.5) / 8
        assert torch.allclose(pixels[0], expected, atol=1e-5)
    assert torch.allclose(directions.norm(dim=-1), torch.ones(2, 64), atol=1e-6)


def test_camera_sets_are_converted_selected_and_batched():
    cameras = instant3d_cameras()
    assert len(cameras) == 4 and len(cameras[1]) == 1 and len(cameras[[0, 2]]) == 2
    assert isinstance(cameras.to(torch.float64), Cameras) and cameras.to(torch.float64).c2w.dtype == torch.float64
    batch = cameras.expand(3)
    assert batch.c2w.shape == (3, 4, 4, 4) and batch.fxfycxcy.shape == (3, 4, 4) and len(batch) == 4
    assert batch.expand(3) is batch  # what is batched stays as it is
    assert [part.c2w.shape[0] for part in batch.split(2)] == [2, 1]
    assert all(torch.equal(one.c2w, cameras.c2w) and len(one) == 4 for one in batch.unbind())


def test_cameras_that_do_not_fit_are_described():
    ours = instant3d_cameras()
    assert camera_disagreement(ours, ours) == []
    assert camera_disagreement(ours, orbit_cameras([0.0, 90, 180, 270], 20.0, 2.7, 50.0)) == []  # only turned
    lower = camera_disagreement(ours, orbit_cameras([225.0, 315, 45, 135], 0.0, 2.7, 50.0))
    assert len(lower) == 1 and "elevations" in lower[0]
    swapped = camera_disagreement(ours, orbit_cameras([225.0, 315, 135, 45], 20.0, 2.7, 60.0))
    assert len(swapped) == 2 and "azimuths" in swapped[0] and "fields of view" in swapped[1]
    assert lower[0] == "elevations are 20/20/20/20 for the painter, 0/0/0/0 for the reconstructor"
    counts = camera_disagreement(ours[:3], ours)
    assert counts == ["the painter paints 3 views and the reconstructor takes 4"]


# -- volume rendering ---------------------------------------------------------------------------------------------


def test_constant_density_has_a_closed_form():
    depths = torch.linspace(0.5, 2.0, 7)
    colour, alpha, weights = composite(depths, torch.full((7,), 0.8), torch.full((7, 3), 0.25), background=1.0)
    expected = 1 - math.exp(-0.8 * 1.5)
    assert alpha.item() == pytest.approx(expected, rel=1e-6) and weights.sum() == alpha
    assert torch.allclose(colour, torch.full((3,), 0.25 * expected + 1 - expected))


def test_planes_are_sampled_in_the_documented_order():
    """A plane whose value is its width coordinate tells which coordinate of a point runs along its width."""
    ramp = ((torch.arange(8) + 0.5) / 4 - 1).expand(8, 8)
    planes = ramp.expand(1, 3, 1, 8, 8)
    point = torch.tensor([[[0.1, 0.3, -0.5]]])
    assert torch.allclose(sample_planes(planes, point), torch.tensor([[[0.1, 0.1, -0.5]]]), atol=1e-6)
    assert torch.allclose(sample_planes(planes.transpose(-1, -2), point), torch.tensor([[[0.3, -0.5, 0.3]]]), atol=1e-6)


def test_box_and_depths():
    near, far = box_interval(torch.tensor([[0.0, 0, -3], [5, 5, -3]]), torch.tensor([[0.0, 0, 1], [0, 0, 1]]))
    assert near[0] == 2 and far[0] == 4 and near[1] >= far[1]
    assert torch.allclose(stratified_depths(near[:1], far[:1], 4, 0.5), torch.tensor([[2.25, 2.75, 3.25, 3.75]]))
    depths, weights = torch.tensor([[0.0, 1, 2, 3]]), torch.tensor([[0.0, 1.0, 0.0]])
    fine = importance_depths(depths, weights, 50, (torch.arange(50) + 0.5) / 50)
    assert ((fine > 1) & (fine < 2)).float().mean() > 0.95


def test_skipping_empty_space_changes_nothing_that_is_seen():
    cameras = instant3d_cameras()[0]
    origins, directions = (x[0] for x in rays(cameras, 32))
    occupied = occupancy_grid(ball, 1, 24, 0.01)[0]
    assert 0.05 < occupied.float().mean() < 0.35
    quick, alpha = render_occupied(ball, occupied, origins, directions, 64)
    slow, alpha_slow = render_rays(ball, origins[None], directions[None], 256, 0)
    assert (quick - slow[0]).abs().mean() < 0.01 and (alpha - alpha_slow[0]).abs().mean() < 0.01
    assert (alpha > 0.99).float().mean() == pytest.approx(silhouette(), abs=0.02)
    nothing, none = render_occupied(ball, torch.zeros_like(occupied), origins, directions, 64)
    assert (nothing == 1).all() and (none == 0).all()


def test_skipped_space_lends_no_colour():
    """Of an object of one colour every pixel is that colour over white, also where a ray leaves and enters again."""
    generator = torch.Generator().manual_seed(0)
    occupied = torch.rand(12, 12, 12, generator=generator) < 0.3
    paint = torch.tensor([0.9, 0.2, 0.4])

    def fog(points):
        return 1 + points[..., 0], paint.expand_as(points)

    origins, directions = (x[0] for x in rays(instant3d_cameras()[0], 32))
    rgb, alpha = render_occupied(fog, occupied, origins, directions, 48)
    assert 0.1 < alpha.mean() < 0.9
    assert torch.allclose(rgb, alpha[:, None] * paint + 1 - alpha[:, None], atol=1e-6)


def silhouette():
    """Share of the image that a ball of radius 0.6 at distance 2.7 covers at 50 degrees."""
    tangent = 0.6 / math.sqrt(2.7**2 - 0.6**2)
    return math.pi * (tangent * 1.0722535) ** 2


def test_importance_samples_sharpen_the_surface():
    origins, directions = (x[0][None] for x in rays(instant3d_cameras()[0], 32))
    truth, _ = render_rays(ball, origins, directions, 1024, 0)
    coarse, _ = render_rays(ball, origins, directions, 24, 0)
    fine, _ = render_rays(ball, origins, directions, 24, 24)
    assert (fine - truth).abs().mean() < 0.7 * (coarse - truth).abs().mean()


# -- TinyLRM -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TinyLRM(width=8, volume=8, voxel_channels=4, plane_width=32, plane_channels=4, hidden=8).eval()


def test_views_to_planes(model):
    views = torch.rand(2, 4, 3, 64, 64)
    assert model.reconstruct(views, model.cameras).planes.shape == (2, 3, 4, 16, 16)


def test_a_scene_does_not_depend_on_its_batch_or_on_chunks(model):
    views = torch.rand(3, 4, 3, 64, 64)
    together = model.render(model.reconstruct(views, model.cameras), model.cameras, 16)[0]
    model.chunk_size = 100
    alone = model.render(model.reconstruct(views[1:2], model.cameras), model.cameras, 16)[0]
    model.chunk_size = 65536
    assert torch.allclose(together[1], alone[0], atol=1e-5)


def test_the_order_of_the_views_does_not_matter(model):
    """The model sees poses, not view numbers: views in another order with their cameras give the same scene."""
    views, order = torch.rand(1, 4, 3, 64, 64), [2, 0, 3, 1]
    turned = model.reconstruct(views[:, order], model.cameras[order])
    assert torch.allclose(model.reconstruct(views, model.cameras).planes, turned.planes, atol=1e-5)


def test_half_precision_ends_at_the_planes(model):
    """The decoder keeps its float32 weights bit by bit, so that bf16 planes are rendered as float32 ones are."""
    half = copy.deepcopy(model).set_dtype(torch.bfloat16)
    assert all(map(torch.equal, half.decoder.parameters(), model.decoder.parameters()))
    kinds = {parameter.dtype for name, parameter in half.named_parameters() if not name.startswith("decoder.")}
    assert kinds == {torch.bfloat16}
    scene = model.reconstruct(torch.rand(1, 4, 3, 64, 64), model.cameras)
    renders = (m.render(scene, m.cameras, 16)[0] for m in (model, half))
    assert torch.equal(*renders)


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = ConfigDict(dict(name="tiny_lrm", checkpoint=str(tmp_path), dtype="fp32", chunk_size=1000, input_views=4))
    loaded = load_reconstructor(config)
    assert loaded.chunk_size == 1000 and not any(p.requires_grad for p in loaded.parameters())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].half().float())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors; make it"):
        load_reconstructor(config)
    save_file({"other.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"not the weights of the TinyLRM .* 1 unknown \(other.weight\)"):
        load_reconstructor(config)
    (tmp_path / "config.json").write_text('{"depth": 3}')
    with pytest.raises(ValueError, match="is not a configuration of TinyLRM .*depth.*make it"):
        load_reconstructor(config)


def test_many_points_of_many_scenes_keep_their_order(model):
    """More points than are decoded at a time, in more than one scene: each gets the values of its own scene."""
    planes = torch.randn(2, 3, 4, 16, 16)
    points = torch.rand(2, 5000, 3) * 2 - 1
    density, colour = model.field(planes)(points)
    for b in range(2):
        alone = model.field(planes[b : b + 1])(points[b : b + 1])
        assert torch.allclose(density[b], alone[0][0], atol=1e-6) and torch.allclose(colour[b], alone[1][0], atol=1e-6)
