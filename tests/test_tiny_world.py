"""The small world: exact renders, captions and their split, defects and detectors, the evaluation of runs."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from config import tiny
from config.errors import UserError
from config.validate import validate
from ddpo.pictures import save_views
from diffusers_patch.loading import load_painter
from diffusers_patch.mv_sdxl import split_grid
from diffusers_patch.rollout import rollout
from mrc.bounding_box import foreground_mask
from mrc.sanity_rewards import tile_views
from recon.cameras import instant3d_cameras, project
from tiny import captions as caption_files
from tiny import compare_runs, train_defect, train_mvdream, train_painter
from tiny.classifier import PAIRS, Classifier, caption_agreement, pair_labels
from tiny.defects import DEFECTS, VIEW, add_defect, colour_shares, is_defective
from tiny.evaluate import compare, evaluate_run, evaluate_views, every_colour_seen, main, paired_p_value, table
from tiny.objects import (
    COLOUR_NAMES,
    COLOURS,
    PALETTE,
    SHAPES,
    Primitives,
    all_captions,
    build,
    fixed_views,
    parse_caption,
    random_caption,
    render,
)
from tiny.train_vae import load_vae
from tiny.training import WEIGHTS, fit, start_training

SPLIT = caption_files.split()


def single(shape, half=0.5, centre=(0.0, 0.0, 0.0), yaw=0.0):
    """An object of one gray primitive."""
    return Primitives(
        torch.tensor([[SHAPES.index(shape)]]),
        torch.full((1, 1, 3), 0.5),
        torch.tensor([[centre]]),
        torch.tensor([[half]]),
        torch.tensor([yaw]),
    )


@pytest.fixture(scope="module")
def world():
    """40 held-out captions, an object of each, and its views."""
    generator = torch.Generator().manual_seed(3)
    captions = SPLIT["test"][:40]
    objects = build(captions, generator)
    return captions, objects, fixed_views(objects)


def test_silhouette_of_a_centred_sphere_has_the_area_of_its_tangent_cone():
    coverage = render(single("sphere", 0.6), instant3d_cameras(), size=128)[1]
    sine = 0.6 / 2.7
    focal = 0.5 / math.tan(math.radians(25))
    expected = math.pi * (focal * sine / math.sqrt(1 - sine**2)) ** 2
    assert coverage.mean((-2, -1)).flatten() == pytest.approx([expected] * 4, rel=0.01)


def test_spheres_are_rendered_where_the_cameras_project_their_centres():
    centre = (0.3, -0.2, 0.4)
    coverage = render(single("sphere", 0.1, centre), instant3d_cameras(), size=128)[1][0, :, 0]
    pixel = (torch.arange(128) + 0.5) / 128
    area = coverage.sum((1, 2))
    x, y = (coverage.sum(1) * pixel).sum(1) / area, (coverage.sum(2) * pixel).sum(1) / area
    expected = project(torch.tensor([centre]), instant3d_cameras())[0][:, 0]
    assert torch.allclose(torch.stack([x, y], -1), expected, atol=0.003)


@pytest.mark.parametrize("shape", SHAPES)
def test_silhouettes_are_the_projections_of_points_on_the_surface(shape):
    """Points of the surface, sampled independently of the renderer, must project into the silhouette and fill it."""
    u = torch.linspace(0, 2 * math.pi, 300)[:, None]
    z = torch.linspace(-1, 1, 81)
    radius = {"sphere": (1 - z**2).sqrt(), "cylinder": torch.full_like(z, 0.85), "cone": (1 - z) / 2}.get(shape)
    if shape == "cube":
        a, b, c = torch.meshgrid(*[torch.linspace(-1, 1, 50)] * 3, indexing="ij")
        local = torch.stack([0.85 * a, 0.85 * b, c], -1).reshape(-1, 3)
    else:
        fill = torch.linspace(0, 1, 12)[:, None, None] * radius  # points inside count too: they fill the silhouette
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


def test_a_near_primitive_occludes_a_far_one():
    toward_camera = instant3d_cameras().c2w[2, :3, 3]
    near = torch.stack([0.3 * toward_camera, torch.zeros(3)])[None]
    colour = torch.tensor([[COLOURS["red"], COLOURS["blue"]]])
    objects = Primitives(torch.ones(1, 2, dtype=torch.long), colour, near, torch.tensor([[0.4, 0.3]]), torch.zeros(1))
    share = colour_shares(render(objects, instant3d_cameras())[0])[0]
    assert share[2, COLOUR_NAMES.index("red")] == 1 and share[0, COLOUR_NAMES.index("blue")] > 0.3


def test_background_is_white_and_views_survive_tiling_into_a_grid_and_splitting(world):
    _, objects, views = world
    images, coverage = render(objects[:4], instant3d_cameras())
    assert (images[(coverage == 0).expand_as(images)] == 1).all()
    assert torch.equal(split_grid(tile_views(views)), views)
    assert torch.equal(tile_views(views)[:, :, :64, 64:], views[:, 1])  # reading order


def test_captions_are_parsed_into_what_they_were_written_from():
    named, relations = parse_caption("a red cube on top of an orange sphere next to a gray cone")
    assert named == [("red", "cube"), ("orange", "sphere"), ("gray", "cone")] and relations == ["on top of", "next to"]
    for caption in all_captions():
        named, relations = parse_caption(caption)
        words = [("an " if colour[0] in "aeiou" else "a ") + f"{colour} {shape}" for colour, shape in named]
        assert caption == f" {relations[0]} ".join(words) if relations else caption == words[0]
    assert len(set(all_captions())) == len(all_captions()) == 32 + 2 * 32 * 28


@pytest.mark.parametrize("caption", ["a red dog", "", "a red cube a blue cone"])
def test_captions_from_outside_the_small_world_are_rejected(caption):
    with pytest.raises(ValueError, match="does not describe an object"):
        parse_caption(caption)


def test_objects_match_their_captions():
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


def test_objects_do_not_touch_the_border_of_their_views():
    generator = torch.Generator().manual_seed(1)
    views = fixed_views(build([random_caption(generator) for _ in range(24)], generator))
    border = torch.cat([views[..., 0, :], views[..., -1, :], views[..., :, 0], views[..., :, -1]], -1)
    assert (border == 1).all()


def test_caption_split_is_disjoint_and_matches_the_files():
    every = [caption for captions in SPLIT.values() for caption in captions]
    assert len(set(every)) == len(every) == 48 + 64 + 128
    assert caption_files.held_out() == set(SPLIT["validation"]) | set(SPLIT["test"])
    for name, captions in {**SPLIT, "pairs": caption_files.pairs()}.items():
        assert (caption_files.FOLDER / f"{name}.txt").read_text().splitlines() == captions


def test_random_training_captions_are_not_held_out():
    def draw(min_primitives):
        return caption_files.random_training_captions(600, torch.Generator().manual_seed(0), min_primitives)

    generator = torch.Generator().manual_seed(0)
    assert caption_files.held_out() & {random_caption(generator) for _ in range(600)}  # some would be, by chance
    assert not caption_files.held_out() & set(draw(1))
    assert {len(parse_caption(caption)[0]) for caption in draw(1)} == {1, 2, 3}
    assert {len(parse_caption(caption)[0]) for caption in draw(2)} == {2, 3}


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_changes_only_view_3_and_is_detected(kind, world):
    captions, objects, views = world
    before = views.clone()
    defective = add_defect(kind, objects, captions, views, torch.Generator().manual_seed(0))
    assert torch.equal(views, before) and torch.equal(defective[:, :VIEW], views[:, :VIEW])
    assert is_defective(kind, views).float().mean() < 0.05  # false alarms
    assert (~is_defective(kind, defective)).float().mean() < 0.05  # misses


@pytest.mark.parametrize("kind", ["colour", "size", "other"])  # occluded and missing primitives are hard to tell apart
def test_detectors_work_on_blurred_views(kind, world):
    captions, objects, views = world

    def blur(x):
        return F.avg_pool2d(F.pad(x.flatten(0, 1), [1] * 4, value=1.0), 3, stride=1).reshape(x.shape)

    defective = add_defect(kind, objects, captions, views, torch.Generator().manual_seed(0))
    assert is_defective(kind, blur(views)).float().mean() < 0.05
    assert (~is_defective(kind, blur(defective))).float().mean() < 0.05


def test_defects_depend_only_on_the_generator(world):
    captions, objects, views = world

    def draw(seed):
        return add_defect("other", objects[:4], captions[:4], views[:4], torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_an_unknown_defect_is_rejected(world):
    captions, objects, views = world
    with pytest.raises(ValueError, match="'holes' is unknown; choose one of colour"):
        add_defect("holes", objects, captions, views, torch.Generator())
    with pytest.raises(ValueError, match="'holes' is unknown"):
        is_defective("holes", views)


def test_an_empty_last_view_is_defective(world):
    views = world[2][:2].clone()
    views[:, VIEW] = 1
    assert is_defective("colour", views).all() and is_defective("size", views).all()


def test_colour_shares_ignore_shading():
    views = torch.ones(8, 3, 64, 64)
    views[:, :, 10:30, 10:50] = PALETTE[:, :, None, None]
    views[:, :, 30:50, 10:50] = 0.55 * PALETTE[:, :, None, None]
    assert torch.equal(colour_shares(views), torch.eye(8))
    assert torch.equal(colour_shares(torch.ones(1, 3, 64, 64)), torch.zeros(1, 8))


def test_paired_p_value():
    before = torch.tensor([5.0, 1.0, 2.0, 0.0, 3.0], dtype=torch.float64)
    change = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    assert paired_p_value(before, before + change) == pytest.approx(0.01324, rel=1e-3)  # t = 3 / sqrt(0.5), 4 degrees
    assert paired_p_value(before, before) == 1.0
    assert paired_p_value(before, before + 1) == 0.0


def test_comparison_reports_standard_errors_of_means_and_paired_differences():
    before = {"reward": torch.tensor([-3.0, -2.0, -1.0]), "defective": torch.tensor([1.0, 0.0, 0.0])}
    after = {"reward": torch.tensor([-2.0, -1.0, 1.0]), "defective": torch.tensor([1.0, 0.0, 0.0])}
    reward = compare(before, after)["reward"]
    assert reward["before"] == -2 and reward["before_se"] == pytest.approx(1 / math.sqrt(3))
    assert reward["difference"] == pytest.approx(4 / 3)
    assert reward["difference_se"] == pytest.approx(1 / 3)  # of 1, 1, 2
    assert reward["p"] == pytest.approx(0.0572, rel=1e-2)  # t = 4, 2 degrees of freedom


def test_comparison_counts_broken_and_repaired_samples():
    before = {"reward": torch.tensor([-0.2, -0.2, -0.1, -0.1]), "defective": torch.tensor([1.0, 1.0, 0.0, 0.0])}
    after = {"reward": torch.tensor([-0.1, -0.2, -0.1, -0.1]), "defective": torch.tensor([0.0, 1.0, 0.0, 1.0])}
    result = compare(before, after)
    assert result["reward"]["difference"] == pytest.approx(0.025)
    assert result["reward"]["relative"] == pytest.approx(1 / 6)
    assert result["good_grids_broken"] == {"count": 1, "of": 2, "share": 0.5}
    assert result["bad_grids_repaired"] == {"count": 1, "of": 2, "share": 0.5}
    assert "good grids broken: 1 of 2 (50.0 %)" in table(result) and "+16.7 %" in table(result)


class StubClassifier:
    """Stands in for the classifier: gives confident, correct answers for `captions`, with `views` views each."""

    def __init__(self, captions, views):
        self.answers = pair_labels(captions).repeat_interleave(views, 0)

    def __call__(self, views):
        answer, self.answers = self.answers[: len(views)], self.answers[len(views) :]
        return 10 * answer - 5


def test_exact_views_are_evaluated_as_correct(world):
    captions, objects, views = world
    defective = add_defect("colour", objects, captions, views, torch.Generator().manual_seed(0))
    good, bad = (evaluate_views(x, captions, "colour", StubClassifier(captions, 4)) for x in (views, defective))
    for result in (good, bad):  # the defective view is left out
        assert result["colours"].mean() > 0.97 and (result["classifier"] == 1).all() and (result["empty"] == 0).all()
    assert good["defective"].mean() < 0.05 and bad["defective"].mean() > 0.95
    assert (good["foreground"] / bad["foreground"] - 1).abs().max() < 0.3
    others = captions[1:] + captions[:1]
    wrong = evaluate_views(views, others, "colour", StubClassifier(captions, 4))
    assert wrong["colours"].mean() < 0.5 and wrong["classifier"].mean() < 0.3


def test_a_pair_that_becomes_one_is_noticed(world):
    """Where a view shows one of the colours alone, and only there."""
    captions, _, views = world
    exact = every_colour_seen(colour_shares(views), captions, torch.ones(views.shape[:2], dtype=torch.bool))
    assert exact.mean() > 0.8
    pair = exact == 1
    merged, chosen = views[pair].clone(), [c for c, two in zip(captions, pair, strict=True) if two]
    two_colours = torch.tensor([len({colour for colour, _ in parse_caption(caption)[0]}) == 2 for caption in chosen])
    inside = foreground_mask(merged[:, 1])[:, None]
    first = torch.tensor([COLOURS[parse_caption(caption)[0][0][0]] for caption in chosen])[:, :, None, None]
    merged[:, 1] = torch.where(inside, first, merged[:, 1])
    use = torch.ones(merged.shape[:2], dtype=torch.bool)
    assert two_colours.any()
    torch.testing.assert_close(
        every_colour_seen(colour_shares(merged), chosen, use), torch.where(two_colours, 0.75, 1.0)
    )
    use[:, 1] = False
    assert (every_colour_seen(colour_shares(merged), chosen, use) == 1).all()


def test_samples_with_an_empty_view_are_counted(world):
    captions, _, views = world
    blank = views[:3].clone()
    blank[0, 1] = 1
    result = evaluate_views(blank, captions[:3], "colour", StubClassifier(captions[:3], 4))
    assert result["empty"].tolist() == [1, 0, 0]


def save_validation(folder, epoch, views, rewards, prompts, **judges):
    """Write validation/epoch_XXXX/ of the run in `folder`. views: (N, V, 3, S, S) in [0, 1]."""
    validation = folder / "validation" / f"epoch_{epoch:04d}"
    validation.mkdir(parents=True, exist_ok=True)
    for n, view in enumerate(views):
        save_views({"views": (255 * view).byte()}, validation / f"{n:04d}.png")
    scores = {"prompts": list(prompts), "rewards": list(rewards), **judges, "lower_is_better": list(judges)}
    (validation / "scores.json").write_text(json.dumps(scores))


def test_a_run_is_evaluated_from_its_first_and_last_validation(world, tmp_path):
    captions, objects, views = (x[:8] for x in world)
    defective = add_defect("colour", objects, captions, views, torch.Generator().manual_seed(0))
    for epoch, images in ((0, defective), (5, defective), (20, views)):
        save_validation(tmp_path, epoch, images, [epoch - 20.0] * 8, captions, silhouettes=[1.0 / (1 + epoch)] * 8)
    result = evaluate_run(tmp_path, "colour", Classifier())
    assert result["validations"] == ["epoch_0000", "epoch_0020"] and result["samples"] == 8
    assert result["defective"]["before"] == 1 and result["defective"]["after"] == 0
    assert result["reward"]["difference"] == 20 and result["silhouettes"]["before"] == 1 and "held_out" not in result
    assert json.loads((tmp_path / "evaluation.json").read_text())["bad_grids_repaired"]["share"] == 1
    assert "| -20.000 ± 0.000 | 0.000 ± 0.000 | +100.0 % |" in compare_runs.row("run", result)


def test_rewards_of_runs_are_plotted(tmp_path):
    def plot(name, reward):
        lines = [
            {"kind": kind, "epoch": epoch, "reward_mean": reward * epoch, "reward_standard_error": 1.0}
            for kind in ("epoch", "validation")
            for epoch in (0, 5, 20)
        ]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        compare_runs.plot([tmp_path], tmp_path / name)
        return np.asarray(Image.open(tmp_path / name))

    rising, flat = plot("rising.png", 1.0), plot("flat.png", 0.0)
    assert rising.shape == flat.shape and (rising != flat).any()


@pytest.fixture
def run(world, tmp_path):
    """A run of four validation samples that can be evaluated."""
    captions, _, views = (x[:4] for x in world)
    content = dict(views=views, rewards=[0.0] * 4, prompts=captions)
    for epoch in (0, 4):
        save_validation(tmp_path, epoch, **content)
    (tmp_path / "metrics.jsonl").write_text("")
    return tmp_path, content


def rewrite(**changes):
    """Damage: the last validation with other content."""
    return lambda run, content: save_validation(run, 4, **content | changes)


def damage(name, harm):
    """Damage: a file of the last validation after harm(bytes)."""

    def apply(run, _):
        file = run / "validation" / "epoch_0004" / name
        file.write_bytes(harm(file.read_bytes()))

    return apply


def flip_bytes(content):
    return content[:500] + bytes(255 - byte for byte in content[500:600]) + content[600:]


DAMAGES = {
    "has 0 folders": lambda run, _: shutil.rmtree(run / "validation"),
    "has 1 folders": lambda run, _: shutil.rmtree(run / "validation" / "epoch_0004"),
    r"scores.json is missing or damaged": lambda run, _: (run / "validation/epoch_0004/scores.json").unlink(),
    r"scores.json is missing or damaged \(JSONDecodeError\)": damage("scores.json", lambda content: content[:-9]),
    r"scores.json is missing or damaged \(KeyError\)": damage("scores.json", lambda content: b"{}"),
    r"scores.json has 4 prompts and 3 numbers of 'reward'": rewrite(rewards=[0.0] * 3),
    r"scores.json has 4 prompts and 4 numbers of 'reward'; one finite": rewrite(rewards=[float("nan")] * 4),
    r"scores.json has 4 prompts and 3 numbers of 'held_out'": rewrite(held_out=[0.0] * 3),
    r"0002.png is missing or not a picture": lambda run, _: (run / "validation/epoch_0004/0002.png").unlink(),
    r"0001.png is missing or not a picture": damage("0001.png", lambda content: content[:-200]),
    r"0003.png is missing or not a picture": damage("0003.png", flip_bytes),
    r"0000.png has views of shape \(2, 3, 64, 64\)": lambda run, content: save_validation(
        run, 4, **content | {"views": content["views"][:, :2]}
    ),
    r"different prompts": lambda run, content: save_validation(
        run, 4, **content | {"prompts": content["prompts"][::-1]}
    ),
    r"epoch_0000 cannot be evaluated: Caption 'a dog'": lambda run, content: [
        save_validation(run, epoch, **content | {"prompts": ["a dog"] * 4}) for epoch in (0, 4)
    ],
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_runs_end_the_evaluation_with_one_sentence(message, run):
    folder, content = run
    DAMAGES[message](folder, content)
    for command, arguments in (
        (main, [str(folder)]),
        (compare_runs.main, [str(folder), "--out", str(folder / "curves.png")]),
    ):
        with pytest.raises(UserError, match=message) as error:
            command(arguments)
        assert "\n" not in str(error.value)
    assert not (folder / "evaluation.json").exists()


def test_the_evaluation_of_a_complete_run_is_printed(run, capsys):
    folder, _ = run
    main([str(folder)])
    assert "good grids broken: 0 of 4" in capsys.readouterr().out and (folder / "evaluation.json").exists()


@pytest.mark.parametrize(
    "content, message", [(None, "metrics.jsonl does not exist"), ('{"kind": "epoch"}\n{"ki', "Line 2 of .*not JSON")]
)
def test_damaged_metrics_end_the_comparison_with_one_sentence(content, message, run):
    folder, _ = run
    (folder / "metrics.jsonl").unlink()
    if content:
        (folder / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        compare_runs.main([str(folder), "--out", str(folder / "curves.png")])


def test_classifier_saves_and_loads(world, tmp_path):
    model = Classifier().half().float().eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.3e6
    views = world[2][0]
    assert torch.equal(Classifier.from_pretrained(tmp_path)(views), model(views))
    assert model(views).shape == (4, len(PAIRS))
    with pytest.raises(FileNotFoundError, match="train_classifier"):
        Classifier.from_pretrained(tmp_path / "nowhere")


def test_the_classifier_ignores_excluded_views(world):
    captions, _, views = (x[:2] for x in world)
    answers = pair_labels(captions).repeat_interleave(4, 0)
    answers[3] = answers[7] = 1 - answers[3]
    stub = StubClassifier(captions, 4)
    stub.answers = 3 * answers
    use = torch.ones(2, 4, dtype=torch.bool)
    use[:, 3] = False
    assert (caption_agreement(stub, views, captions, use) == 1).all()


def test_a_folder_with_a_training_of_other_options_is_refused(tmp_path, monkeypatch, capsys):
    def start(*options):
        monkeypatch.setattr("sys.argv", ["train_defect", "--folder", str(tmp_path / "a"), *options])
        return start_training(train_defect.make_parser(), "{kind}_defect")

    threads = str(torch.get_num_threads())
    start("--defect", "size", "--threads", threads)
    assert start("--defect", "size", "--threads", threads, "--out", "elsewhere").defect == "size"
    with pytest.raises(SystemExit):
        start("--defect", "colour", "--rank", "8")
    assert "holds a training with another --defect and --rank: remove it" in capsys.readouterr().err


def test_an_interrupted_training_resumes_exactly(tmp_path):
    def train(folder, interrupt_at=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def loss_fn(model, step, generator):
            if step == interrupt_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 3, generator=generator)
            return (model(x.bfloat16()).float() - x.sum(1, keepdim=True)).square().mean(), {}

        return fit(folder, model, loss_fn, steps=12, lr=0.1, save_seconds=-1)

    expected = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "interrupted", interrupt_at=7)
    resumed = train(tmp_path / "interrupted", interrupt_at=3)  # step 3 is not repeated
    assert torch.equal(resumed.weight, expected.weight) and torch.equal(resumed.bias, expected.bias)


@torch.no_grad()
@pytest.mark.parametrize("painter", [train_painter, train_mvdream])
def test_latents_of_the_training_set_decode_to_its_views(painter, world):
    views, vae = world[2][:2], load_vae()
    latents = painter.encode(vae, views) / vae.config.scaling_factor
    if painter is train_painter:
        decoded = split_grid(vae.decode(latents).sample)
    else:
        decoded = vae.decode(latents.flatten(0, 1)).sample.unflatten(0, (2, 4))
    assert (decoded / 2 + 0.5 - views).square().mean() < 10**-2.5  # 25 dB


@pytest.mark.parametrize("count", [0, 100, 750])
def test_a_training_set_of_incomplete_parts_is_rejected(count, tmp_path):
    with pytest.raises(ValueError, match=f"--objects is {count}; give a positive multiple of 500"):
        train_painter.training_set(tmp_path, None, count, None)


def test_a_missing_vae_is_reported_with_the_command_that_trains_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train it with `python -m tiny.train_vae`"):
        load_vae(tmp_path)


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
def test_the_shipped_mvdream_paints_the_colours_of_its_captions():
    config = validate(tiny.get_config("mvdream"), 1)
    policy = load_painter(config, "cpu")
    captions = ["a red cube next to a blue cone", "a purple sphere on top of a yellow cylinder"]
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    views = rollout(policy, captions, 8, config.sample.guidance_scale, 1.0, noise).views
    assert views.shape == (2, 4, 3, 64, 64)
    result = evaluate_views(views, captions)
    assert (result["colours"] == 1).all() and not result["empty"].any()
