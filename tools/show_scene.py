"""Reconstruct the views of one object and look at what comes out.

    python -m tools.show_scene a.png b.png c.png d.png --config config/tiny.py [--config.KEY=VALUE ...]

--out   folder for the results (logs/show_scene)

The pictures are square, in the order of the reconstructor's cameras; transparent parts count as white, and with
config.recon.remove_background whatever is not the object. In --out there are afterwards
    views.png       the pictures over the re-rendered views, with the MRC of each
    turntable.gif   the object from all sides
    scene.html      the object and the cameras to turn, in any browser and without a network
    scene.ply       the Gaussians, for viewers of Gaussian splats, or a coloured mesh of a radiance field
    scene.glb       the mesh again, for viewers of glTF
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import tqdm
from absl import flags
from PIL import Image, ImageOps, UnidentifiedImageError

from config import cli
from config.errors import UserError, first_line
from config.validate import check_folder, validate_judge
from ddpo.pictures import sample_picture
from ddpo.report import write_viewer
from ddpo.report.scenes import Scene, pyramids
from mrc.mrc import resize_views
from mrc.rewards import MRCReward
from recon import reconstructor_cameras
from recon.cameras import Cameras, orbit_cameras
from recon.export import gaussians_splat, save_gaussians_ply
from recon.gaussian_splatting import Gaussians
from recon.mesh import extract_mesh, mesh_glb, save_mesh_ply
from recon.reconstructor import Reconstructor
from recon.weights import check_is_file

SMALLEST = 32  # side in pixels of a picture in which an object can be seen
FRAMES = 36
AT_ONCE = 4  # frames rendered together
MILLISECONDS = 80  # per frame
MOST_GAUSSIANS = 200_000  # in scene.html
WRITTEN = ("views.png", "turntable.gif", "scene.html", "scene.ply", "scene.glb")


def load_views(files: Sequence[str | Path], count: int) -> torch.Tensor:
    """Square pictures of one size as views (1, V, 3, S, S) in [0, 1], transparent parts in white.

    count: how many the reconstructor wants. Raises UserError or MissingFileError."""
    if len(files) != count:
        given = "1 picture is" if len(files) == 1 else f"{len(files)} pictures are"
        raise UserError(f"{given} given, but the reconstructor wants {count}: give one for each of its cameras")
    views = []
    for file in files:
        check_is_file(file, "give PNG or JPEG files")
        try:
            picture = ImageOps.exif_transpose(Image.open(file))
            mode, picture = picture.mode, picture.convert("RGBA")
        except UnidentifiedImageError:
            raise UserError(f"{file} is not a picture that can be read: give PNG or JPEG files") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{file} is a damaged picture ({first_line(error)}): make or copy it again") from error
        if mode[0] in "IF":  # Pillow would clip them to white
            raise UserError(f"{file} has more than 8 bits per pixel (mode {mode}): save it with 8 bits per channel")
        if picture.width != picture.height:
            raise UserError(f"{file} is {picture.width}x{picture.height}, which is not square: crop or pad it")
        if picture.width < SMALLEST:
            size = f"{picture.width} pixel{'s' * (picture.width > 1)}"
            raise UserError(f"{file} is {size} wide: give pictures of {SMALLEST} or more")
        if views and len(views[0]) != picture.height:
            raise UserError(
                f"{file} is {picture.width} pixels wide and {files[0]} is {len(views[0])}: give pictures of one size"
            )
        views.append(np.array(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture))[..., :3])
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)[None] / 255


def turntable_cameras(cameras: Cameras, frames: int) -> Cameras:
    """`frames` cameras around the object, starting at the first of `cameras` (V,), at their height and distance."""
    azimuth = cameras.azimuth[0].item() + torch.arange(frames) * (360 / frames)
    radius = cameras.c2w[0, :3, 3].norm().item()
    return orbit_cameras(azimuth, cameras.elevation.mean().item(), radius, cameras.fov[0].item())


def save_scene(reconstructor: Reconstructor, scene, out: Path) -> Scene:
    """One scene as scene.ply, Gaussians as they are and a radiance field as a mesh, which is also scene.glb.

    Returns it as a page shows it."""
    lines = pyramids(reconstructor.cameras.to("cpu"))
    if isinstance(scene, Gaussians):
        save_gaussians_ply(scene, out / "scene.ply")
        (out / "scene.glb").unlink(missing_ok=True)  # of another object
        return Scene("splat", gaussians_splat(scene, MOST_GAUSSIANS, lines))
    mesh = extract_mesh(reconstructor.radiance_field(scene), device=reconstructor.device)
    save_mesh_ply(out / "scene.ply", *mesh)
    (out / "scene.glb").write_bytes(mesh_glb(*mesh))
    return Scene("glb", mesh_glb(*mesh, lines))


def define_flags() -> None:
    flags.DEFINE_string("out", "logs/show_scene", "Folder for the results.")


def main(args, *pictures: str) -> None:
    """args: the parsed flags; pictures: files."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, out = validate_judge(args.config, device), Path(args.out)
    check_folder("--out", out)
    views = load_views(pictures, len(reconstructor_cameras(config.recon)))
    reward = MRCReward(config, device)
    views, judge = reward.prepared(views), reward.judge
    reconstructor, size = judge.reconstructor, config.recon.render_size
    out.mkdir(parents=True, exist_ok=True)

    scene = judge.reconstruct(views)
    result = judge.score(views, scene)
    note = "MRC of each view: " + ", ".join(f"{value:.3f}" for value in result.lpips[0].tolist())
    rows = {"given": resize_views(views, size), "re-rendered": result.renders}
    picture = sample_picture(rows, [note], ["reconstruction"])
    picture.save(out / "views.png")

    around = turntable_cameras(reconstructor.cameras.to("cpu"), FRAMES).to(reconstructor.device)
    frames = []
    for first in tqdm.trange(0, FRAMES, AT_ONCE, desc="turntable"):
        images = reconstructor.render(scene, around[first : first + AT_ONCE], size)[0][0]
        frames += [Image.fromarray(image) for image in (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]
    frames[0].save(out / "turntable.gif", save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0)
    shown = save_scene(reconstructor, scene, out)
    write_viewer(out / "scene.html", "Reconstruction", note, shown, reconstructor.cameras, picture)
    print(f"{note}\nwrote {', '.join(str(out / name) for name in WRITTEN if (out / name).exists())}")


if __name__ == "__main__":
    cli.run("show_scene", main, "config/tiny.py", define_flags, takes_words=True)
