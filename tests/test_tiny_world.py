"""The small world: exact pictures, captions and their split, defects and detectors, the arithmetic of the judgement."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from config import tiny
from config.validate import validate
from ddpo.setup import load_painter
from diffusers_patch.mv_sdxl import split_grid
from diffusers_patch.rollout import rollout
from mrc.sanity_rewards import tile_views
from recon.cameras import instant3d_cameras, project
from tiny import captions as caption_files
from tiny import compare_runs
from tiny.classifier import PAIRS, Classifier, caption_agreement, pair_labels
from tiny.defects import DEFECTS, PALETTE, VIEW, add_defect, colour_shares, is_defective
from tiny.evaluate import compare, evaluate_run, judge, paired_t_test, table
from tiny.objects import (
    COLOURS,
    SHAPES,
    Primitives,
    all_captions,
    build,
    fixed_views,
    parse_caption,
    random_caption,
    render,
)
from tiny.training import WEIGHTS

SPLIT = caption_files.split()


def single(shape, half=0.5, centre=(0.0, 0.0, 0.0), yaw=0.0):
    """One gray primitive."""
    return Primitives(
        torch.tensor([[SHAPES.index(shape)]]),
        torch.full((1, 1, 3), 0.5),
        torch.tensor([[centre]]),
        torch.tensor([[half]]),
        torch.tensor([yaw]),
    )


@pytest.fixture(scope="module")
def world():
    """Objects of 40 captions that reinforcement learning never trains on, and their views."""
    generator = torch.Generator().manual_seed(3)
    captions = SPLIT["test"][:40]
    objects = build(captions, generator)
    return captions, objects, fixed_views(objects)


def test_silhouette_of_a_centred_sphere_is_the_tangent_cones_disc():
    coverage = render(single("sphere", 0.6), instant3d_cameras(), size=128)[1]
    sine = 0.6 / 2.7
    focal = 0.5 / math.tan(math.radians(25))
    expected = math.pi * (focal * sine / math.sqrt(1 - sine**2)) ** 2
    assert coverage.mean((-2, -1)).flatten() == pytest.approx([expected] * 4, rel=0.01)


def test_spheres_stand_where_the_cameras_project_their_centres():
    centre = (0.3, -0.2, 0.4)
    coverage = render(single("sphere", 0.1, centre), instant3d_cameras(), size=128)[1][0, :, 0]
    pixel = (torch.arange(128) + 0.5) / 128
    area = coverage.sum((1, 2))
    x, y = (coverage.sum(1) * pixel).sum(1) / area, (coverage.sum(2) * pixel).sum(1) / area
    expected = project(torch.tensor([centre]), instant3d_cameras())[0][:, 0]
    assert torch.allclose(torch.stack([x, y], -1), expected, atol=0.003)


@pytest.mark.parametrize("shape", SHAPES)
def test_silhouettes_are_the_projections_of_points_on_the_surface(shape):
    """The silhouette is the convex hull of the projected surface; points of the surface are drawn here on their own."""
    u = torch.linspace(0, 2 * math.pi, 300)[:, None]
    z = torch.linspace(-1, 1, 81)
    radius = {"sphere": (1 - z**2).sqrt(), "cylinder": torch.full_like(z, 0.85), "cone": (1 - z) / 2}.get(shape)
    if shape == "cube":
        a, b, c = torch.meshgrid(*[torch.linspace(-1, 1, 50)] * 3, indexing="ij")
        local = torch.stack([0.85 * a, 0.85 * b, c], -1).reshape(-1, 3)
    else:
        fill = torch.linspace(0, 1, 12)[:, None, None] * radius  # discs, to fill the silhouette
        local = torch.stack([fill * u.cos(), fill * u.sin(), z.expand(12, 300, 81)], -1).reshape(-1, 3)
    yaw, half = 0.7, 0.6
    turn = torch.tensor([[math.cos(yaw), math.sin(yaw), 0.0], [-math.sin(yaw), math.cos(yaw), 0.0], [0.0, 0.0, 1.0]])
    points = (project(half * local @ turn, instant3d_cameras())[0][0] * 64).long()
    hit = torch.zeros(64, 64)
    hit[points[:, 1], points[:, 0]] = 1
    coverage = render(single(shape, half, yaw=yaw), instant3d_cameras(), size=64, supersample=8)[1][0, 0, 0]
    # pixels that the silhouette only grazes may differ
    assert ((hit == 1) & (coverage == 0)).sum() <= 0.02 * hit.sum()
    assert ((hit == 0) & (coverage > 0.3)).sum() == 0


def test_a_nearer_part_hides_a_farther_one():
    toward_camera = instant3d_cameras().c2w[2, :3, 3]
    near = torch.stack([0.3 * toward_camera, torch.zeros(3)])[None]
    colour = torch.tensor([[COLOURS["red"], COLOURS["blue"]]])
    objects = Primitives(torch.ones(1, 2, dtype=torch.long), colour, near, torch.tensor([[0.4, 0.3]]), torch.zeros(1))
    share = colour_shares(render(objects, instant3d_cameras())[0])[0]
    assert share[2, list(COLOURS).index("red")] == 1 and share[0, list(COLOURS).index("blue")] > 0.3


def test_pictures_are_white_outside_and_views_round_trip_through_the_grid(world):
    _, objects, views = world
    images, coverage = render(objects[:4], instant3d_cameras())
    assert (images[(coverage == 0).expand_as(images)] == 1).all()
    assert torch.equal(split_grid(tile_views(views)), views)
    assert torch.equal(tile_views(views)[:, :, :64, 64:], views[:, 1])  # reading order


def test_captions_can_be_parsed_back():
    things, relations = parse_caption("a red cube on top of an orange sphere next to a gray cone")
    assert things == [("red", "cube"), ("orange", "sphere"), ("gray", "cone")] and relations == ["on top of", "next to"]
    for caption in all_captions():
        things, relations = parse_caption(caption)
        words = [("an " if colour[0] in "aeiou" else "a ") + f"{colour} {shape}" for colour, shape in things]
        assert caption == f" {relations[0]} ".join(words) if relations else caption == words[0]
    assert len(set(all_captions())) == len(all_captions()) == 32 + 2 * 32 * 28


@pytest.mark.parametrize("caption", ["a red dog", "", "a red cube a blue cone"])
def test_a_caption_of_something_else_is_refused(caption):
    with pytest.raises(ValueError, match="does not describe an object"):
        parse_caption(caption)


def test_objects_are_what_their_captions_say():
    captions = ["a red cube on top of a blue sphere", "a green cone next to a gray cylinder", "a cyan cube"]
    objects = build(captions, torch.Generator().manual_seed(0))
    shapes = [[SHAPES[s] for s in row] for row in objects.shape[:2, :2].tolist()]
    assert shapes == [["cube", "sphere"], ["cone", "cylinder"]]
    assert torch.equal(objects.colour[0, 1], torch.tensor(COLOURS["blue"]))
    assert (objects.size > 0).sum(1).tolist() == [2, 2, 1]
    top, bottom = objects.centre[0, 0], objects.centre[0, 1]
    assert top[2] - bottom[2] == pytest.approx(float(objects.size[0, :2].sum())) and torch.allclose(top[:2], bottom[:2])
    apart = (objects.centre[1, 0] - objects.centre[1, 1])[:2].norm()
    assert apart > objects.size[1, :2].sum()


def test_every_object_fits_into_the_views():
    generator = torch.Generator().manual_seed(1)
    views = fixed_views(build([random_caption(generator) for _ in range(24)], generator))
    border = torch.cat([views[..., 0, :], views[..., -1, :], views[..., :, 0], views[..., :, -1]], -1)
    assert (border == 1).all()


def test_captions_are_split_disjointly_and_the_files_hold_the_split():
    every = [caption for captions in SPLIT.values() for caption in captions]
    assert len(set(every)) == len(every) == 48 + 64 + 128
    assert caption_files.held_out() == set(SPLIT["validation"]) | set(SPLIT["test"])
    for name, captions in SPLIT.items():
        assert (caption_files.FOLDER / f"{name}.txt").read_text().splitlines() == captions


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_spoils_one_view_and_its_detector_finds_it(kind, world):
    captions, objects, views = world
    before = views.clone()
    spoilt = add_defect(kind, objects, captions, views, torch.Generator().manual_seed(0))
    assert torch.equal(views, before) and torch.equal(spoilt[:, :VIEW], views[:, :VIEW])
    assert is_defective(kind, views).float().mean() < 0.05  # false alarms
    assert (~is_defective(kind, spoilt)).float().mean() < 0.05  # missed


@pytest.mark.parametrize("kind", ["colour", "size", "other"])  # a hidden part and a missing one are hard to tell apart
def test_detectors_bear_soft_pictures(kind, world):
    captions, objects, views = world

    def soft(x):
        return F.avg_pool2d(F.pad(x.flatten(0, 1), [1] * 4, value=1.0), 3, stride=1).reshape(x.shape)

    spoilt = add_defect(kind, objects, captions, views, torch.Generator().manual_seed(0))
    assert is_defective(kind, soft(views)).float().mean() < 0.05
    assert (~is_defective(kind, soft(spoilt))).float().mean() < 0.05


def test_defects_are_reproducible(world):
    captions, objects, views = world

    def draw(seed):
        return add_defect("other", objects[:4], captions[:4], views[:4], torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_an_unknown_defect_is_refused(world):
    captions, objects, views = world
    with pytest.raises(ValueError, match="'holes' is unknown; choose one of colour"):
        add_defect("holes", objects, captions, views, torch.Generator())
    with pytest.raises(ValueError, match="'holes' is unknown"):
        is_defective("holes", views)


def test_an_empty_last_view_is_defective(world):
    views = world[2][:2].clone()
    views[:, VIEW] = 1
    assert is_defective("colour", views).all() and is_defective("size", views).all()


def test_colour_shares_see_through_shading():
    views = torch.ones(8, 3, 64, 64)
    views[:, :, 10:30, 10:50] = PALETTE[:, :, None, None]
    views[:, :, 30:50, 10:50] = 0.55 * PALETTE[:, :, None, None]
    assert torch.equal(colour_shares(views), torch.eye(8))
    assert torch.equal(colour_shares(torch.ones(1, 3, 64, 64)), torch.zeros(1, 8))


def test_paired_t_test():
    mean, error, p = paired_t_test(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64))
    assert mean == 3 and error == pytest.approx(math.sqrt(2.5 / 5)) and p == pytest.approx(0.01324, rel=1e-3)
    assert paired_t_test(torch.zeros(4))[2] == 1.0


def test_comparison_counts_broken_and_repaired_grids():
    before = {"reward": torch.tensor([-0.2, -0.2, -0.1, -0.1]), "defective": torch.tensor([1.0, 1.0, 0.0, 0.0])}
    after = {"reward": torch.tensor([-0.1, -0.2, -0.1, -0.1]), "defective": torch.tensor([0.0, 1.0, 0.0, 1.0])}
    result = compare(before, after)
    assert result["reward"]["difference"] == pytest.approx(0.025)
    assert result["reward"]["relative"] == pytest.approx(1 / 6)
    assert result["good_grids_broken"] == {"count": 1, "of": 2, "share": 0.5}
    assert result["bad_grids_repaired"] == {"count": 1, "of": 2, "share": 0.5}
    assert "good grids broken: 1 of 2 (50.0 %)" in table(result) and "+16.7 %" in table(result)


class Truthful:
    """Stands in for the classifier: sure of the pairs it was told."""

    def __init__(self, captions, views):
        self.answers = pair_labels(captions).repeat_interleave(views, 0)

    def __call__(self, views):
        answer, self.answers = self.answers[: len(views)], self.answers[len(views) :]
        return 10 * answer - 5


def test_the_truth_is_judged_as_true(world):
    captions, objects, views = world
    spoilt = add_defect("colour", objects, captions, views, torch.Generator().manual_seed(0))
    good, bad = (judge(x, captions, "colour", Truthful(captions, 4)) for x in (views, spoilt))
    for verdict in (good, bad):  # the spoilt view is left out
        assert verdict["colours"].mean() > 0.97 and (verdict["classifier"] == 1).all() and (verdict["empty"] == 0).all()
    assert good["defective"].mean() < 0.05 and bad["defective"].mean() > 0.95
    assert (good["foreground"] / bad["foreground"] - 1).abs().max() < 0.3
    others = captions[1:] + captions[:1]
    wrong = judge(views, others, "colour", Truthful(captions, 4))
    assert wrong["colours"].mean() < 0.5 and wrong["classifier"].mean() < 0.3


def test_empty_views_are_counted(world):
    captions, _, views = world
    blank = views[:3].clone()
    blank[0, 1] = 1
    verdict = judge(blank, captions[:3], "colour", Truthful(captions[:3], 4))
    assert verdict["empty"].tolist() == [1, 0, 0]


def test_a_run_is_judged_from_its_validation_files(world, tmp_path):
    captions, objects, views = (x[:8] for x in world)
    spoilt = add_defect("colour", objects, captions, views, torch.Generator().manual_seed(0))
    (tmp_path / "validation").mkdir()
    for epoch, pictures in ((0, spoilt), (5, spoilt), (20, views)):
        np.savez(
            tmp_path / "validation" / f"epoch_{epoch:04d}.npz",
            views=(255 * pictures).byte().numpy(),
            rewards=np.full(8, epoch - 20.0),
            prompts=np.array(captions),
        )
    result = evaluate_run(tmp_path, "colour", Classifier())
    assert result["files"] == ["epoch_0000.npz", "epoch_0020.npz"] and result["samples"] == 8
    assert result["defective"]["before"] == 1 and result["defective"]["after"] == 0
    assert result["reward"]["difference"] == 20
    assert json.loads((tmp_path / "judgement.json").read_text())["bad_grids_repaired"]["share"] == 1

    lines = [
        {"kind": kind, "epoch": epoch, "reward_mean": epoch - 20.0, "reward_standard_error": 1.0}
        for kind in ("epoch", "validation")
        for epoch in (0, 5, 20)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "| -20.000 ± 0.000 | 0.000 ± 0.000 | +100.0 % |" in compare_runs.row("run", result)
    compare_runs.draw([tmp_path], tmp_path / "curves.png")
    assert np.asarray(Image.open(tmp_path / "curves.png")).std() > 0


def test_a_run_without_two_validations_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds 0 files"):
        evaluate_run(tmp_path)


def test_classifier_saves_and_loads(world, tmp_path):
    model = Classifier().half().float().eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.3e6
    views = world[2][0]
    assert torch.equal(Classifier.from_pretrained(tmp_path)(views), model(views))
    assert model(views).shape == (4, len(PAIRS))
    with pytest.raises(FileNotFoundError, match="train_classifier"):
        Classifier.from_pretrained(tmp_path / "nowhere")


def test_views_that_are_left_out_do_not_count(world):
    captions, _, views = (x[:2] for x in world)
    answers = pair_labels(captions).repeat_interleave(4, 0)
    answers[3] = answers[7] = 1 - answers[3]
    told = Truthful(captions, 4)
    told.answers = 3 * answers
    use = torch.ones(2, 4, dtype=torch.bool)
    use[:, 3] = False
    assert (caption_agreement(told, views, captions, use) == 1).all()


def test_the_shipped_painter_is_an_ordinary_pipeline():
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(WEIGHTS / "painter")
    pipeline.load_lora_weights(WEIGHTS / "painter_defect")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    picture = pipeline("a red cube next to a blue cone", num_inference_steps=4, generator=generator).images[0]
    foreground = (np.asarray(picture).min(-1) < 240).mean()
    assert picture.size == (128, 128) and 0.02 < foreground < 0.6


@torch.no_grad()
def test_the_shipped_mvdream_paints_what_it_is_told():
    config = validate(tiny.get_config("mvdream"), 1)
    policy = load_painter(config, "cpu")
    captions = ["a red cube next to a blue cone", "a purple sphere on top of a yellow cylinder"]
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    views = rollout(policy, captions, 8, config.sample.guidance_scale, 1.0, noise).views
    assert views.shape == (2, 4, 3, 64, 64)
    verdict = judge(views, captions)
    assert (verdict["colours"] == 1).all() and not verdict["empty"].any()
