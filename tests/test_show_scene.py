"""Reconstructing pictures from the command line, and the mesh of a field."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from config import tiny
from config.validate import SPLATTING
from mrc import LPIPS, MRC
from recon import RECONSTRUCTORS
from recon.cameras import instant3d_cameras
from recon.gaussian_splatting import Gaussians
from recon.mesh import extract_mesh, save_mesh_ply
from tests.tiny_models import SMALL_RECONSTRUCTORS
from tiny.objects import build, fixed_views
from tools import show_scene
from tools.show_scene import load_views, save_scene, turntable_cameras


def ball(points):
    """A ball of radius 0.6 whose density falls by 100 per unit length and is 10 at its surface; its colour is the
    place."""
    return (0.6 - points.norm(dim=-1)) * 100 + 10, (points + 1) / 2


def test_the_mesh_of_a_ball():
    vertices, faces, colours = extract_mesh(ball, resolution=48)
    assert np.abs(np.linalg.norm(vertices, axis=1) - 0.6).max() < 0.01
    assert np.abs(colours - (vertices + 1) / 2).max() < 1e-5
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    volume = (np.cross(a, b) * c).sum() / 6  # positive if the faces look outwards
    assert volume == pytest.approx(4 / 3 * np.pi * 0.6**3, rel=0.02)
    with pytest.raises(ValueError, match="nothing was reconstructed"):
        extract_mesh(lambda points: (torch.zeros(points.shape[:2]), points), resolution=8)


def test_a_mesh_file(tmp_path):
    vertices, faces = np.eye(3, dtype=np.float32), np.array([[0, 1, 2]])
    save_mesh_ply(tmp_path / "mesh.ply", vertices, faces, np.full((3, 3), 0.5))
    header, _, data = (tmp_path / "mesh.ply").read_bytes().partition(b"end_header\n")
    assert b"element vertex 3" in header and b"element face 1" in header
    vertex = np.frombuffer(data[: 3 * 15], [("place", "<f4", 3), ("colour", "u1", 3)])
    assert (vertex["place"] == vertices).all() and (vertex["colour"] == 128).all()
    assert list(np.frombuffer(data[3 * 15 + 1 :], "<i4")) == [0, 1, 2] and data[3 * 15] == 3


def test_a_turntable_keeps_height_and_distance():
    cameras, around = instant3d_cameras(), turntable_cameras(instant3d_cameras(), 8)
    assert torch.allclose(around.c2w[::2].sum(0), cameras.c2w.sum(0), atol=1e-4) and len(around) == 8
    assert torch.allclose(around.c2w[0], cameras.c2w[0], atol=1e-5)
    assert torch.allclose(around.fxfycxcy[:4], cameras.fxfycxcy, atol=1e-5)


@pytest.fixture
def pictures(tmp_path):
    """Files of the four views of an object, the third with a transparent background."""
    views = fixed_views(build(["a red cube on top of a blue sphere"], torch.Generator().manual_seed(3)))[0]
    files = [tmp_path / f"view{i}.png" for i in range(4)]
    for i, (file, view) in enumerate(zip(files, views, strict=True)):
        picture = Image.fromarray((view * 255).round().byte().permute(1, 2, 0).numpy())
        if i == 2:
            picture.putalpha(Image.fromarray(((view < 0.999).any(0).byte() * 255).numpy()))
        picture.save(file)
    return files, views


def test_pictures_become_views(pictures):
    files, views = pictures
    assert (load_views(files, 4)[0] - views).abs().max() < 0.51 / 255


def test_bad_pictures_get_one_sentence(pictures, tmp_path):
    files, _ = pictures
    with pytest.raises(ValueError, match="3 pictures are given, but the reconstructor wants 4"):
        load_views(files[:3], 4)
    Image.new("RGB", (64, 32)).save(tmp_path / "wide.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("not a picture")
    for name, words in (("wide", "64x32, which is not square"), ("small", "32 pixels wide"), ("text", "not a picture")):
        with pytest.raises(ValueError, match=words):
            load_views([*files[:3], tmp_path / f"{name}.png"], 4)
    with pytest.raises(FileNotFoundError):
        load_views([*files[:3], tmp_path / "missing.png"], 4)
    Image.fromarray(np.full((64, 64), 30000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="deep.png has more than 8 bits per pixel .mode I;16."):
        load_views([*files[:3], tmp_path / "deep.png"], 4)


def test_a_photograph_is_turned_as_its_camera_was_held(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert (load_views([tmp_path / "a.png"], 1)[0, 0, 0, :, -4:] == 1).all()


def test_the_background_is_removed_as_for_a_reward(pictures, tmp_path, monkeypatch):
    """A gray wall behind the object, and a stand-in for rembg that knows it."""

    def remove(image, session):
        pixels = np.array(image.convert("RGBA"))
        pixels[(pixels[..., :3] == 128).all(-1), 3] = 0
        return Image.fromarray(pixels)

    rembg = SimpleNamespace(new_session=lambda: None, remove=remove, __spec__="of a module that is installed")
    monkeypatch.setitem(sys.modules, "rembg", rembg)
    monkeypatch.setattr(show_scene, "FRAMES", 1)
    config, files = tiny.get_config(), pictures[0]
    config.recon.remove_background = True
    for file, view in zip(files, pictures[1], strict=True):
        on_gray = torch.where((view > 0.999).all(0), 128 / 255, view)
        Image.fromarray((on_gray * 255).round().byte().permute(1, 2, 0).numpy()).save(file)
    show_scene.main(SimpleNamespace(config=config, out=str(tmp_path / "out")), *files)
    given = np.array(Image.open(tmp_path / "out" / "views.png").convert("RGB"))
    assert (given == 128).all(-1).mean() < 0.01  # but for letters


def test_the_command(pictures, tmp_path, monkeypatch, capsys):
    files, _ = pictures
    monkeypatch.setattr(show_scene, "FRAMES", 4)
    show_scene.main(SimpleNamespace(config=tiny.get_config(), out=str(tmp_path / "out")), *files)
    values = capsys.readouterr().out.splitlines()[0].removeprefix("MRC of each view: ").split(", ")
    assert len(values) == 4 and all(0 < float(value) < 0.05 for value in values)
    with Image.open(tmp_path / "out" / "turntable.gif") as turntable:
        assert turntable.n_frames == 4 and turntable.size == (64, 64)
    assert (tmp_path / "out" / "views.png").exists() and (tmp_path / "out" / "scene.ply").stat().st_size > 100_000


@pytest.mark.parametrize("name", list(RECONSTRUCTORS))
def test_the_command_takes_every_reconstructor(name, pictures, tmp_path, monkeypatch, capsys):
    """With random weights; a mesh of such a field need not exist, so one is put in its place."""
    torch.manual_seed(0)
    model = SMALL_RECONSTRUCTORS[name]().eval().requires_grad_(False)
    monkeypatch.setattr(show_scene, "FRAMES", 2)
    monkeypatch.setattr("mrc.rewards.load_mrc", lambda config, device: MRC(model, LPIPS(), render_size=32))
    monkeypatch.setattr(show_scene, "extract_mesh", lambda field, device: extract_mesh(ball, resolution=8))
    config = tiny.get_config()
    config.recon.render_size = 32
    (tmp_path / "out").mkdir()
    for other in ("scene.glb", "notes.txt"):
        (tmp_path / "out" / other).write_text("of another object")
    show_scene.main(SimpleNamespace(config=config, out=str(tmp_path / "out")), *pictures[0])
    said = capsys.readouterr().out
    assert "MRC of each view" in said and "notes.txt" not in said
    names = {file.name for file in (tmp_path / "out").iterdir()} - {"notes.txt"}
    assert all(name in said for name in names) and names - {"scene.glb"} == {
        "scene.html",
        "scene.ply",
        "turntable.gif",
        "views.png",
    }
    assert ("scene.glb" in names) == (name not in SPLATTING)  # a mesh, and none that was there before
    assert "scene.glb" not in names or (tmp_path / "out" / "scene.glb").read_bytes()[:4] == b"glTF"


def test_a_scene_of_gaussians_is_written_as_it_is(tmp_path):
    scene = Gaussians.from_packed(torch.rand(1, 5, 14))
    shown = save_scene(SimpleNamespace(cameras=instant3d_cameras()), scene, tmp_path)
    assert shown.kind == "splat" and len(shown.data) > 5 * 32
    header = (tmp_path / "scene.ply").read_bytes().partition(b"end_header")[0]
    assert b"element vertex 5" in header and b"f_dc_0" in header
