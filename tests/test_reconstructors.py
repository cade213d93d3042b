"""What all reconstructors have in common: the protocol, the registry, and views that are not on white."""

import ast
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import recon
from config import base
from recon import RECONSTRUCTORS, Reconstructor, background_remover, load_reconstructor, reconstructor_cameras
from recon.cameras import Cameras, orbit_cameras
from recon.grm import GRM
from recon.mesh import extract_mesh
from recon.openlrm import OpenLRM
from tests.tiny_models import SMALL_RECONSTRUCTORS
from tools.rehearsal.checkpoints import GRM_PARAMS

OTHER_ROOMS = {"benchmarks", "config", "ddpo", "diffusers_patch", "mrc", "prompts", "tests", "tiny", "tools"}


@pytest.fixture(params=list(RECONSTRUCTORS))
def model(request):
    torch.manual_seed(0)
    return SMALL_RECONSTRUCTORS[request.param]().eval().requires_grad_(False)


def random_views(model, count):
    """Views (count, V, 3, S, S): noise in the middle, white around it."""
    views = torch.ones(count, model.num_views, 3, model.input_size, model.input_size)
    quarter = model.input_size // 4
    views[..., quarter:-quarter, quarter:-quarter] = torch.rand_like(views[..., quarter:-quarter, quarter:-quarter])
    return views


# -- the protocol -----------------------------------------------------------------------------------------------------


def test_shapes(model):
    assert isinstance(model, Reconstructor) and len(model.cameras) == model.num_views == 4
    scene = model.reconstruct(random_views(model, 2), model.cameras)
    assert len(scene) == 2
    for cameras in (orbit_cameras([0.0, 10.0, 20.0], 0.0, 2.7, 50.0), orbit_cameras([0.0], 0.0, 2.7, 50.0)):
        images, alpha = model.render(scene, cameras, 12)
        assert images.shape == (2, len(cameras), 3, 12, 12) and alpha.shape == (2, len(cameras), 1, 12, 12)
        assert images.dtype == alpha.dtype == torch.float32
        assert 0 <= images.min() and images.max() <= 1 and 0 <= alpha.min() and alpha.max() < 1 + 1e-5


def test_every_object_may_have_its_own_cameras(model, monkeypatch):
    """Those of two orbits, in batches that are not reconstructed at once."""
    monkeypatch.setattr(f"{type(model).__module__}.RECONSTRUCT_BATCH", 1)
    views, orbits = random_views(model, 2), [model.cameras, orbit_cameras([0.0, 90.0, 180.0, 270.0], 10.0, 2.0, 50.0)]
    both = Cameras(torch.stack([o.c2w for o in orbits]), torch.stack([o.fxfycxcy for o in orbits]))
    images, _ = model.render(model.reconstruct(views, both), both, 12)
    for b, cameras in enumerate(orbits):
        alone, _ = model.render(model.reconstruct(views[b : b + 1], cameras), cameras, 12)
        assert torch.allclose(alone[0], images[b], atol=1e-4)
    assert not torch.allclose(images[0], images[1], atol=1e-2)


def test_compare(model):
    """One distance and one render per view; the same twice; an object is compared by itself."""
    views = random_views(model, 2)

    def compare(views):
        def distance(renders):
            assert renders.shape == views.shape
            return (renders - views).abs().mean((2, 3, 4))

        scene = model.reconstruct(views, model.cameras)
        return scene, *model.compare(scene, model.cameras, model.input_size, distance)

    scene, distances, renders = compare(views)
    assert distances.shape == (2, 4) and renders.shape == views.shape and (distances > 0).all()
    assert all(torch.equal(*pair) for pair in zip(compare(views)[1:], (distances, renders), strict=True))
    assert torch.allclose(compare(views[1:])[1], distances[1:], atol=1e-5)
    if not isinstance(model, OpenLRM):  # the scene was reconstructed from all views
        assert torch.equal(renders, model.render(scene, model.cameras, model.input_size)[0])
        assert torch.equal(distances, (renders - views).abs().mean((2, 3, 4)))


def test_cameras_follow_the_device():
    for make in SMALL_RECONSTRUCTORS.values():
        with torch.device("meta"):
            assert make().cameras.c2w.device.type == "meta"


def test_a_reconstructor_must_provide_the_protocol():
    class Incomplete(Reconstructor):
        def reconstruct(self, views, cameras): ...

    with pytest.raises(TypeError, match="abstract.*render"):
        Incomplete()


@pytest.mark.parametrize("name", ["tiny_lrm", "openlrm", "instantmesh"])
def test_the_radiance_field_is_the_one_that_is_rendered(name):
    """Alpha of a ray from the field, sampled finely in the common world, against `render`."""
    torch.manual_seed(0)
    model = SMALL_RECONSTRUCTORS[name]().eval().requires_grad_(False)
    if name != "tiny_lrm":
        model.samples = 400  # of a ray, since it takes half an interval at either side of the box for empty
    scene = model.reconstruct(random_views(model, 1), model.cameras)
    field = model.radiance_field(scene)
    cameras = orbit_cameras([10.0, 130.0], 30.0, 2.7, 30.0)
    depths = torch.linspace(0.5, 4.9, 2000)
    origins, forward = cameras.c2w[:, :3, 3], cameras.c2w[:, :3, 2]
    density, colour = field((origins[:, None] + depths[:, None] * forward[:, None]).reshape(1, -1, 3))
    assert density.shape == (1, 4000) and colour.shape == (1, 4000, 3) and (density >= 0).all()
    inside = ((origins[:, None] + depths[:, None] * forward[:, None]).abs() <= 1).all(-1)
    if name == "tiny_lrm":  # its field does not end at the box, its rendering does
        density = density * inside.flatten()
    expected = 1 - torch.exp(-density.reshape(2, -1).sum(-1) * (depths[1] - depths[0]))
    _, alpha = model.render(scene, cameras, 1)  # the only pixel's ray is the optical axis
    assert torch.allclose(alpha.flatten(), expected, atol=0.02) and (0.1 < expected).all() and (expected < 0.999).all()
    with pytest.raises(ValueError, match="of one object and the scene holds 2"):
        model.radiance_field(model.reconstruct(random_views(model, 2), model.cameras))
    vertices, _, colours = extract_mesh(field, resolution=16, density=density[0, inside.flatten()].median().item())
    assert len(vertices) == len(colours) > 10


# -- the registry -----------------------------------------------------------------------------------------------------


def test_the_room_imports_no_other_room():
    for file in Path(recon.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = set(names) - {"config.errors"}  # how every room tells the user of a mistake
            assert not OTHER_ROOMS & {name.partition(".")[0] for name in names}, file.name


@pytest.mark.parametrize("name", list(RECONSTRUCTORS))
def test_cameras_are_known_before_weights_are_loaded(name):
    config = base.get_config().recon
    config.name, config.checkpoint = name, "nothing"
    assert torch.equal(reconstructor_cameras(config).c2w, SMALL_RECONSTRUCTORS[name]().cameras.c2w)


def test_unknown_names():
    config = base.get_config().recon
    config.name = "instant_mesh"
    for function in (reconstructor_cameras, load_reconstructor):
        with pytest.raises(ValueError, match="config.recon.name is 'instant_mesh': choose one of tiny_lrm, lgm, grm"):
            function(config)


@pytest.mark.parametrize("name", list(RECONSTRUCTORS))
def test_loading_by_name(name, monkeypatch):
    """Every model gets its precision and chunks, OpenLRM the number of input views; none can be trained."""
    module, _, attribute = RECONSTRUCTORS[name].partition(":")
    cls = getattr(import_module(module), attribute)
    monkeypatch.setattr(cls, "from_pretrained", lambda checkpoint: SMALL_RECONSTRUCTORS[name]().train())
    config = base.get_config().recon
    config.name, config.dtype, config.chunk_size, config.input_views = name, "bf16", 1000, 2
    model = load_reconstructor(config)
    assert type(model) is cls and not model.training and not any(p.requires_grad for p in model.parameters())
    assert next(model.parameters()).dtype == torch.bfloat16 and model.chunk_size == 1000
    assert getattr(model, "input_views", None) == (2 if name == "openlrm" else None)


def test_grm_by_name(tmp_path):
    GRM(**GRM_PARAMS).save_pretrained(tmp_path)
    config = base.get_config().recon
    config.name, config.checkpoint, config.dtype = "grm", str(tmp_path), "bf16"
    model = load_reconstructor(config)
    assert model.out_layer_depth.weight.dtype == torch.bfloat16 and not model.training
    scene = model.reconstruct(random_views(model, 1), model.cameras)
    assert scene.means.dtype == torch.float32 and scene.means.shape == (1, 4 * model.input_size**2, 3)


# -- backgrounds ------------------------------------------------------------------------------------------------------


def gray_views():
    """Two objects, the second on gray."""
    views = torch.ones(2, 4, 3, 32, 32)
    views[1] = 0.6
    views[..., 8:24, 8:24] = 0.2
    return views


@pytest.fixture
def rembg(monkeypatch):
    """A stand-in for rembg that takes everything lighter than 0.4 for background."""

    def remove(image, session):
        assert session == "session"
        image = image.convert("RGBA")
        image.putalpha(image.convert("L").point(lambda value: 255 * (value < 0.4 * 255)))
        return image

    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(new_session=lambda: "session", remove=remove))


def test_the_background_is_removed(rembg):
    views = background_remover()(gray_views())
    assert torch.allclose(views, gray_views()[:1].expand(2, -1, -1, -1, -1)) and views.shape == (2, 4, 3, 32, 32)


def test_without_rembg_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(ValueError, match="config.recon.remove_background is True, but rembg is not installed"):
        background_remover()
