"""The report of runs: what it says, what it draws, that it asks for nothing, and, in a real browser, that it works."""

import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

import carve3d_train
from config import tiny
from config.validate import flatten, resolve
from ddpo.pictures import save_views, to_bytes
from ddpo.report import write_report, write_table, write_viewer
from ddpo.report.curves import figures
from ddpo.report.read import read_run
from ddpo.report.scenes import encode, pyramids, scene_of_views
from ddpo.report.summary import STARTS, Change, agreement, changes, commands, controls, differences, headline
from recon.cameras import instant3d_cameras, orbit_cameras, project
from recon.export import SPLAT, gaussians_splat
from recon.gaussian_splatting import Gaussians, render_views
from recon.mesh import mesh_glb
from tests.browser import CHROMIUM, chromium
from tiny.objects import build, fixed_views
from tools import report

CAPTIONS = [
    "a red cube on top of a blue sphere",
    "a green cone next to a gray cylinder",
    "a purple sphere",
]
NASTY = "\"'></script><b>&amp;"  # what a caption, or a folder, may contain
SIDE = 64


def make_run(folder, views, gain=0.05, captions=CAPTIONS, judges=None, epochs=(0, 2, 4), **settings):
    """The folder of a run with validations of `views` (N, 4, 3, S, S), each `gain` better than the one before."""
    config = resolve(tiny.get_config(), 1)
    with config.unlocked():
        config.update_from_flattened_dict(settings)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json_best_effort())
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0"}))
    lines = []
    for step, epoch in enumerate(epochs):
        rewards = [-0.2 + 0.01 * i * i + step * (gain + 0.003 * i) for i in range(len(captions))]
        lines.append({"kind": "validation", "epoch": epoch, "reward_mean": sum(rewards) / len(rewards)})
        lines[-1] |= {"rewards": rewards, "reward_standard_error": 0.01, "kl_mean": 1e-5 * step}
        lines.append({"kind": "epoch", "epoch": epoch, "reward_mean": -0.15 + step / 30, "seconds": {"sampling": 2.5}})
        lines += [{"kind": "update", "epoch": epoch, "update": i, "grad_norm": 0.1 + i, "loss": 0.0} for i in (0, 1)]
        scores = {"prompts": captions, "rewards": rewards, "lpips": [[-reward] * 4 for reward in rewards]}
        for name, change in (judges or {}).items():
            scores[name] = [0.5 + 0.1 * i + step * (change + 0.001 * i) for i in range(len(captions))]
        place = folder / "validation" / f"epoch_{epoch:04d}"
        place.mkdir(parents=True)
        (place / "scores.json").write_text(json.dumps(scores))
        for i, one in enumerate(views):
            save_views({"views": to_bytes(one), "renders": to_bytes(one.flip(-1))}, place / f"{i:04d}.png")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def views():
    return fixed_views(build(CAPTIONS, torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def run_folder(views, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("logs") / "learned", views)


@pytest.fixture(scope="module")
def page(run_folder, views):
    """The report of a run beside its control."""
    control = make_run(run_folder.parent / "control", views, gain=-0.002, shuffle_advantages=True)
    return write_report([run_folder, control], device="cpu")


class Loaded(HTMLParser):
    """The addresses that a browser would load for a page: {attribute: values}."""

    def __init__(self, text):
        super().__init__()
        self.found, self.policy, self.tags = [], None, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        names = {"src", "srcset", "href", "data", "action", "poster", "background", "manifest"}
        self.found += [(tag, name, attributes[name]) for name in names & attributes.keys()]


# -- what a page holds -------------------------------------------------------------------------------------------------


def test_a_page_asks_for_nothing(page):
    text = page.read_text()
    loaded = Loaded(text)
    assert len(loaded.found) > 6
    assert not [item for item in loaded.found if not item[2].startswith(("data:image/webp;base64,", "#"))]
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket|sendBeacon|EventSource", text)
    assert loaded.policy.startswith("default-src 'none';") and not re.search(r"https?:|\*", loaded.policy)


def test_a_page_is_small_and_has_every_caption_twice_to_see_and_to_turn(page):
    text = page.read_text()
    tags = Loaded(text).tags
    assert len(text) < 2_000_000
    cards = [attributes for tag, attributes in tags if tag == "article"]
    assert [card["data-caption"] for card in cards] == CAPTIONS
    scenes = [attributes for tag, attributes in tags if attributes.get("id", "").startswith("s") and tag == "script"]
    assert len(scenes) == 2 * len(CAPTIONS) and not any(scene["data-problem"] for scene in scenes)
    assert text.count("model-viewer") and 'id="viewer-glb"' in text and 'id="viewer-splat"' not in text
    assert all(attributes.get("alt") for tag, attributes in tags if tag == "img")


def test_what_a_caption_contains_is_text(tmp_path, views):
    folder = make_run(tmp_path / "run", views, captions=[NASTY, *CAPTIONS[1:]])
    text = write_report([folder]).read_text()
    assert NASTY not in text and "<b>" not in text
    assert Loaded(text).tags  # parses to the end
    cards = [attributes for tag, attributes in Loaded(text).tags if tag == "article"]
    assert cards[0]["data-caption"] == NASTY


def test_curves_show_the_numbers_of_the_metrics(page, run_folder):
    found = {figure.title: figure for figure in figures([read_run(run_folder)])}
    means = [line["reward_mean"] for line in read_run(run_folder).of_kind("validation")]
    (curve,) = found["reward on validation prompts"].curves
    assert curve.points == [(epoch, mean, 0.01) for epoch, mean in zip((0, 2, 4), means, strict=True)]
    svg = str(found["reward on validation prompts"].svg)
    assert [float(value) for value in re.findall(r'data-y="([^"]+)"', svg)] == means
    height = [float(y) for _, y in re.findall(r"([\d.]+),([\d.]+)", re.search(r'points="([^"]+)"', svg)[1])]
    assert height == sorted(height, reverse=True)  # rising rewards are drawn upwards
    updates = found["gradient norm"].curves[0].points
    assert [x for x, _, _ in updates] == [0, 0.5, 2, 2.5, 4, 4.5] and updates[1][1] == 1.1
    assert found["gradient norm"].rows()[0] == (0, ["0.1"])
    assert str(found["gradient norm"].svg) in page.read_text() or 'data-y="1.1"' in page.read_text()
    assert not found["learning rate"].curves and "No numbers were written" in page.read_text()


# -- what a page says --------------------------------------------------------------------------------------------------


def test_a_change_is_a_paired_comparison():
    change = Change.between([-0.2, -0.1, -0.3, float("nan")], [-0.1, -0.05, -0.12, 0.0])
    assert change.before == pytest.approx(-0.2) and change.after == pytest.approx(-0.09)
    assert change.before_se == pytest.approx(0.1 / math.sqrt(3)) and change.relative == "+55.0 %"
    assert change.p == pytest.approx(0.1006, abs=1e-3) and change.direction == "did not measurably change"


def test_the_first_screen_says_whether_judges_agree(tmp_path, views):
    cases = {
        "agree": ({"held-out": 0.05, "hull": 0.02}, "The reward and the judges agree: the reward rose, and so did"),
        "split": ({"held-out": 0.05, "hull": -0.02}, "do not agree: the reward rose, but held-out rose, hull fell."),
        "none": ({}, "No judge other than the reward was recorded"),
    }
    for name, (judges, words) in cases.items():
        run = read_run(make_run(tmp_path / name, views, judges=judges))
        assert words in agreement(changes(run)), name
        sentence = headline(run, changes(run)).replace("\N{NO-BREAK SPACE}", " ")
        assert sentence.startswith("After 6 updates the MRC reward of 3 validation captions rose (+57.8 %, p =")


def test_a_judge_whose_distance_falls_has_risen(tmp_path, views):
    run = make_run(tmp_path / "run", views, judges={"distance": -0.02})
    for file in run.glob("validation/*/scores.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lower_is_better": ["distance"]}))
    assert changes(read_run(run))["distance"].direction == "rose"


def test_a_control_is_called_one(page, run_folder):
    control = read_run(run_folder.parent / "control")
    assert "a control" in headline(control, changes(control)) and "control (control)" in page.read_text()
    runs = [read_run(run_folder), control]
    assert "In the control control, whose advantages were shuffled, the reward" in controls(
        runs, {run.name: changes(run) for run in runs}
    )
    assert "is not shown" in controls(runs[:1], {"learned": changes(runs[0])})


def test_commands_repeat_the_configuration(tmp_path, views):
    folder = make_run(tmp_path / "a run", views, seed=7, **{"sample.prompt_suffix": ", on white"})
    found = commands(read_run(folder))
    assert found["repeat"] == (
        "CARVE3D_PROCESSES=1 bash carve3d_train.sh --config config/tiny.py "
        "--config.sample.prompt_suffix=', on white' --config.seed=7"
    )
    assert found["resume"] == f"{found['repeat']} --config.resume_from='{folder}'"


@pytest.mark.parametrize("name", STARTS)
def test_a_configuration_does_not_differ_from_itself(name):
    config = resolve(STARTS[name](), 2)
    found = differences(flatten(config), STARTS[name]())
    assert set(found) <= {"pretrained.model", "pretrained.lora", "recon.checkpoint"}  # paths that were made absolute


# -- what is missing ---------------------------------------------------------------------------------------------------


def test_what_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="does not exist: give the folder of a run"):
        write_report([tmp_path / "missing"])
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        report.main([str(tmp_path)])


def test_what_is_missing_or_damaged_is_said_in_the_page(tmp_path, views):
    folder = make_run(tmp_path / "run", views)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "epo\n[]\n')
    (folder / "validation/epoch_0002/scores.json").write_text("{")
    (folder / "validation/epoch_0004/0001.png").write_bytes(b"no picture")
    (folder / "validation/epoch_0000/0002.png").unlink()
    other = make_run(tmp_path / "other", views, captions=["another", *CAPTIONS[1:]])
    text = write_report([folder, other], device="cpu").read_text()
    for words in (
        "(line 13, 14)",
        "epoch_0002/scores.json is missing or damaged, so this validation is left out",
        "0001.png is missing or not a picture",
        "epoch_0000 has pictures of 2 of its 3 captions",
        "other was validated on other captions than run",
        "No pictures of this caption",
    ):
        assert words in text, words


def test_a_run_without_validations_has_a_page(tmp_path, views):
    folder = make_run(tmp_path / "run", views)
    shutil.rmtree(folder / "validation")
    (folder / "metrics.jsonl").unlink()
    (folder / "config.json").write_text("{}")
    text = write_report([folder], device="cpu").read_text()
    for words in (
        "there are no curves",
        "no validation",
        "There is no validation to show",
        "No configuration was found",
    ):
        assert words in text, words


def test_a_reconstructor_that_cannot_be_loaded_costs_the_objects_only(tmp_path, views):
    folder = make_run(tmp_path / "run", views, **{"recon.checkpoint": str(tmp_path / "nowhere")})
    text = write_report([folder], device="cpu").read_text()
    assert "There are no objects to turn" in text and "nowhere" in text and "Turn the object" not in text


def test_rewards_that_are_no_numbers_do_not_count(tmp_path, views):
    folder = make_run(tmp_path / "run", views)
    file = folder / "validation/epoch_0004/scores.json"
    scores = json.loads(file.read_text())
    scores["rewards"][1] = None
    file.write_text(json.dumps(scores))
    text = write_report([folder]).read_text()
    assert "-1000000000.0" in text and "left out" not in text


def test_the_command(run_folder, tmp_path, capsys):
    report.main([str(run_folder), "--no-objects", "--out", str(tmp_path / "page.html")])
    assert "page.html (0." in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    assert "Turn the object" not in text and "<dialog" not in text


# -- objects -----------------------------------------------------------------------------------------------------------


def test_a_page_that_cannot_be_written_does_not_fail_the_run(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError("no space left on device")

    said = []
    monkeypatch.setattr(carve3d_train, "write_report", fail)
    log = SimpleNamespace(say=said.append, report=None)
    run = SimpleNamespace(folder=tmp_path, accelerator=SimpleNamespace(device="cpu"), log=log)
    carve3d_train.Run.report(run)
    assert "no space left on device" in said[0] and f"python -m tools.report {tmp_path}" in said[0]


def test_a_table_has_a_page(tmp_path):
    picture = Image.new("RGB", (8, 8), "red")
    markdown = "| painter | MRC |\n| --- | --- |\n| base | 0.1 |\n| logs/a/final | <0.2 |"
    report = tmp_path / "logs/a/report.html"
    file = write_table(tmp_path / "out.html", "A & B", "note", markdown, {"logs/a/final": report}, picture, "red")
    html = file.read_text()
    assert "<h1>A &amp; B</h1>" in html and '<th scope="row">base</th><td>0.1</td>' in html
    assert '<a href="logs/a/report.html">logs/a/final</a></th><td>&lt;0.2</td>' in html
    assert 'src="data:image/webp' in html and "---" not in html


def test_pyramids_are_what_the_cameras_see():
    cameras = instant3d_cameras()
    strips = torch.from_numpy(pyramids(cameras))
    corners = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    for i, strip in enumerate(strips):
        assert torch.allclose(strip[0], cameras.c2w[i, :3, 3])
        seen, depth = project(strip[[1, 2, 4, 7]], cameras[i])
        assert sorted(seen[0].round(decimals=3).abs().tolist()) == sorted(corners.tolist())
        assert torch.allclose(depth, torch.tensor(0.3))
        edges = {frozenset(map(tuple, strip[[k, k + 1]].tolist())) for k in range(10)}
        assert len(edges) == 8


def test_a_glb_holds_the_mesh_and_the_lines():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    faces = np.array([[0, 2, 1], [0, 1, 3]])
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]])
    data = mesh_glb(vertices, faces, colours, [vertices[:3]])
    found = trimesh.load(io.BytesIO(data), file_type="glb", process=False)
    mesh = found.geometry["object"]
    assert mesh.faces.tolist() == faces.tolist()
    assert mesh.vertices[3].tolist() == [0, 1, 0]  # up is y
    assert mesh.vertices[2].tolist() == [0, 0, -1]
    tree = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")])
    assert tree["materials"][0]["extensions"] == {"KHR_materials_unlit": {}} and len(found.geometry) == 2
    accessor = tree["accessors"][tree["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]]
    start = 20 + int.from_bytes(data[12:16], "little") + 8 + tree["bufferViews"][accessor["bufferView"]]["byteOffset"]
    assert list(data[start : start + 16]) == [255, 0, 0, 255, 0, 255, 0, 255, 0, 0, 255, 255, 55, 55, 55, 255]


def test_a_splat_holds_the_most_visible_gaussians():
    scene = Gaussians(
        torch.tensor([[[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]]]),
        torch.tensor([[0.9, 0.01, 0.5]]),
        torch.tensor([[[0.1, 0.1, 0.1], [0.1, 0.1, 0.1], [0.2, 0.2, 0.2]]]),
        torch.tensor([[[2.0, 0, 0, 0]] * 3]),
        torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]]),
    )
    line = np.array([[0.0, 0, 0], [0.12, 0, 0]], np.float32)
    rows = np.frombuffer(gaussians_splat(scene, 2, [line]), SPLAT)
    assert rows["mean"][:2].tolist() == [[0, 0, 0.5], [0.5, 0, 0]]
    assert rows["colour"][:2].tolist() == [[0, 0, 255, 128], [255, 0, 0, 230]]
    assert rows["quaternion"][0].tolist() == [255, 128, 128, 128]
    assert len(rows) == 2 + 10 and np.allclose(np.diff(rows["mean"][2:, 0]), 0.012)


def test_views_that_a_reconstructor_cannot_take_are_a_problem():
    model = SimpleNamespace(num_views=4)
    assert "3 views, but the reconstructor takes 4" in scene_of_views(model, torch.ones(1, 3, 3, 8, 8)).problem


# -- in a browser ------------------------------------------------------------------------------------------------------

browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def tab():
    with chromium() as opened:
        yield opened


def canvas_pixels(tab, place):
    """The picture (S, S, 3) in [0, 1] in the pane of that number."""
    box = tab.run(
        f"(() => {{ const pane = document.querySelectorAll('.pane model-viewer, .pane canvas')[{place}];"
        "const {x, y, width, height} = pane.getBoundingClientRect();"
        "return {x: x + 2, y: y + 2, width: width - 4, height: height - 4} })()"
    )
    picture = Image.open(io.BytesIO(tab.screenshot(clip=box))).convert("RGB")
    return np.asarray(picture, dtype=float) / 255, box


def is_object(pixels):
    """Where something is drawn that is neither white nor the bluish lines of the cameras."""
    return (pixels.min(-1) < 0.85) & (np.abs(pixels - [0.30, 0.45, 0.75]).max(-1) > 0.12)


def overlap(a, b):
    """Intersection over union of two masks, brought to one size."""
    sides = (SIDE, SIDE)
    a, b = (np.asarray(Image.fromarray(mask).resize(sides, Image.Resampling.NEAREST)) for mask in (a, b))
    return (a & b).sum() / (a | b).sum()


@browser
@pytest.mark.slow
def test_a_browser_shows_the_page_without_complaint(tab, page):
    tab.errors.clear()
    tab.requests.clear()
    for width, dark in ((1440, False), (800, True), (390, False)):
        tab.open(page, width, dark=dark)
        assert tab.run("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
    assert not tab.errors
    assert {request.partition(":")[0] for request in tab.requests} <= {"file", "data", "blob"}
    assert len({request for request in tab.requests if request.startswith("file:")}) == 1


@browser
@pytest.mark.slow
def test_a_curve_tells_its_numbers(tab, page, run_folder):
    tab.open(page)
    means = [line["reward_mean"] for line in read_run(run_folder).of_kind("validation")]
    figure = "[...document.querySelectorAll('figure.curves')].find(f => f.ariaLabel === 'reward on validation prompts')"
    box = tab.run(
        f"(() => {{ {figure}.scrollIntoView(); const box = {figure}.querySelector('svg').getBoundingClientRect();"
        " return {x: box.x, y: box.y, width: box.width, height: box.height} })()"
    )
    tab.mouse("mouseMoved", box["x"] + box["width"] * 0.95, box["y"] + box["height"] / 2)
    assert f"learned, epochs done 4: {means[-1]:.4f} ± 0.0100" in tab.run(
        f"{figure}.querySelector('output').textContent"
    )
    tab.run(f"{figure}.focus()")
    tab.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft", code="ArrowLeft")
    assert f"epochs done 2: {means[1]:.4f}" in tab.run(f"{figure}.querySelector('output').textContent")


@browser
@pytest.mark.slow
def test_the_gallery_is_sorted_and_filtered(tab, page):
    tab.open(page)
    shown = "[...document.querySelectorAll('.card:not([hidden])')].map(card => card.dataset.caption)"
    assert tab.run(shown) == CAPTIONS
    tab.run("order.value = 'best'; order.dispatchEvent(new Event('change'))")
    assert tab.run(shown) == CAPTIONS[::-1]  # make_run lets later captions gain more
    tab.run("filter.value = 'sphere red'; filter.dispatchEvent(new Event('input'))")
    assert tab.run(shown) == CAPTIONS[:1] and tab.run("count.textContent") == "1 of 3 captions"


@browser
@pytest.mark.slow
def test_a_click_opens_an_object_that_turns_with_its_pair(tab, page, views):
    tab.errors.clear()
    tab.open(page)
    tab.run("document.querySelector('button[data-scenes]').click()")
    tab.wait("document.querySelector('dialog [role=status]').textContent.startsWith('Drag')")
    tab.wait("document.querySelectorAll('.pane model-viewer').length === 2")
    tab.run("[...document.querySelectorAll('.cameras button')].find(b => b.textContent === 'Camera 2').click()")
    tab.run("new Promise(done => setTimeout(done, 1500))")
    before, box = canvas_pixels(tab, 0)
    painted = views[0, 1].permute(1, 2, 0).numpy()
    assert overlap(is_object(before), painted.min(-1) < 0.85) > 0.8  # from there it looks as it was painted
    tab.drag(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, 160, 20)
    tab.run("new Promise(done => setTimeout(done, 1500))")
    after, _ = canvas_pixels(tab, 0)
    other, _ = canvas_pixels(tab, 1)
    assert is_object(after).mean() > 0.02 and np.abs(after - before).max() > 0.3
    assert np.abs(after - other).mean() < 0.01  # the same object twice, turned together
    tab.call("Input.dispatchKeyEvent", type="keyDown", key="Escape", code="Escape", windowsVirtualKeyCode=27)
    tab.wait("!document.querySelector('dialog').open && !document.querySelector('.pane model-viewer')")
    assert not tab.errors


@browser
@pytest.mark.slow
def test_gaussians_are_seen_as_the_renderer_sees_them(tab, tmp_path):
    """An ellipsoid off the middle, so that mirrored or upside-down views would not overlap."""
    generator = torch.Generator().manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(4000, 3, generator=generator), dim=-1)
    points = points * torch.tensor([0.5, 0.15, 0.25]) + torch.tensor([0.2, 0.1, 0.3])
    scene = Gaussians(
        points[None],
        torch.full((1, 4000), 0.95),
        torch.full((1, 4000, 3), 0.02),
        torch.tensor([1.0, 0, 0, 0]).repeat(1, 4000, 1),
        ((points + 1) / 2)[None] * torch.tensor([1.0, 0.3, 0.3]),
    )
    cameras = orbit_cameras([0.0, 90.0, 200.0], 20.0, 2.0, 50.0)
    shown = encode(SimpleNamespace(cameras=cameras), scene)
    file = write_viewer(tmp_path / "scene.html", "Gaussians", "A test.", shown, cameras, Image.new("RGB", (64, 16)))
    tab.errors.clear()
    tab.open(file)
    tab.wait("document.querySelector('[role=status]').textContent.startsWith('Drag')")
    renders = render_views(scene, cameras, SIDE)[0][0]
    for i in range(3):
        tab.run(f"document.querySelectorAll('.cameras button')[{i + 1}].click()")
        tab.run("new Promise(done => setTimeout(done, 1500))")
        pixels, box = canvas_pixels(tab, 0)
        rendered = renders[i].permute(1, 2, 0).numpy()
        assert overlap(is_object(pixels), rendered.min(-1) < 0.85) > 0.8, i
    tab.drag(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, 100, 0)
    tab.run("new Promise(done => setTimeout(done, 1000))")
    turned, _ = canvas_pixels(tab, 0)
    assert is_object(turned).mean() > 0.01 and np.abs(turned - pixels).max() > 0.3
    assert not tab.errors
