"""Reconstruct four pictures of one object and look at what comes out.

    python -m recon.show --config config/tiny.py --out logs/show --images a.png b.png c.png d.png

The pictures are square, in the order of the sculptor's cameras; transparent parts count as white. In --out there are
afterwards
    views.png       the pictures over the re-rendered views, with the MRC of each
    turntable.gif   the object from all sides
    scene.ply       the Gaussians, for viewers of Gaussian splats, or a coloured mesh of a radiance field
"""

import sys
from pathlib import Path

import numpy as np
import torch
import tqdm
from PIL import Image, UnidentifiedImageError

from recon.cameras import orbit_cameras
from recon.gaussian_splatting import Gaussians

FRAMES = 36
AT_ONCE = 4  # frames rendered together
MILLISECONDS = 80  # per frame


def load_views(files, count):
    """Square pictures of one size as views (1, V, 3, S, S) in [0, 1], what is transparent in white.

    count: how many the sculptor wants. Raises ValueError or FileNotFoundError."""
    if len(files) != count:
        raise ValueError(
            f"--images names {len(files)} pictures, but the sculptor wants {count}: give one for each of its cameras."
        )
    views = []
    for file in files:
        try:
            picture = Image.open(file).convert("RGBA")
        except UnidentifiedImageError:
            raise ValueError(f"--images: {file} is not a picture that can be read; give PNG or JPEG files.") from None
        if picture.width != picture.height:
            raise ValueError(
                f"--images: {file} is {picture.width}x{picture.height}, which is not square: crop or pad it."
            )
        if views and len(views[0]) != picture.height:
            raise ValueError(
                f"--images: {file} is {picture.width} pixels wide and {files[0]} is {len(views[0])}: give pictures "
                f"of one size."
            )
        views.append(np.array(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture))[..., :3])
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)[None] / 255


def turntable_cameras(cameras, frames):
    """`frames` cameras around the object, starting at the first of `cameras` (V,), at their height and distance."""
    azimuth = cameras.azimuth[0].item() + torch.arange(frames) * (360 / frames)
    radius = cameras.c2w[0, :3, 3].norm().item()
    return orbit_cameras(azimuth, cameras.elevation.mean().item(), radius, cameras.fov[0].item())


def save_scene(reconstructor, scene, file):
    """One scene as .ply: Gaussians as they are, a radiance field as a mesh."""
    if isinstance(scene, Gaussians):
        from recon.export import save_gaussians_ply

        save_gaussians_ply(scene, file)
    else:
        from recon.mesh import extract_mesh, save_mesh_ply

        device = scene.planes.device
        save_mesh_ply(file, *extract_mesh(reconstructor.field(scene.planes.float()), device=device))


def main(flags, images):
    """flags: the parsed command line; images: the files."""
    from config.validate import resolve
    from ddpo.run_log import sample_picture
    from mrc import LPIPS, score_views
    from mrc.mrc import resize_views
    from recon import load_reconstructor

    config, out = resolve(flags.config, 1), Path(flags.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reconstructor = load_reconstructor(config.recon, device)
    views = load_views(images, reconstructor.num_views).to(device)
    out.mkdir(parents=True, exist_ok=True)
    size, cameras = config.recon.render_size, reconstructor.cameras

    scene = reconstructor.reconstruct(resize_views(views, reconstructor.input_size), cameras)
    views = resize_views(views, size)
    renders = reconstructor.render(scene, cameras, size)[0]
    verdict = score_views(views, renders, LPIPS(config.mrc.lpips_checkpoint).to(device), config.mrc.bbox_lpips)
    note = "MRC of each view: " + ", ".join(f"{value:.3f}" for value in verdict.lpips[0].tolist())
    picture = sample_picture({"given": views.cpu(), "re-rendered": renders.cpu()}, [note], ["reconstruction"])
    picture.save(out / "views.png")

    around = turntable_cameras(cameras.to("cpu"), FRAMES).to(device)
    frames = []
    for first in tqdm.trange(0, FRAMES, AT_ONCE, desc="turntable"):
        images = reconstructor.render(scene, around[first : first + AT_ONCE], size)[0][0]
        frames += [Image.fromarray(image) for image in (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]
    frames[0].save(out / "turntable.gif", save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0)
    save_scene(reconstructor, scene, out / "scene.ply")
    print(f"{note}\nwrote {', '.join(str(out / name) for name in ('views.png', 'turntable.gif', 'scene.ply'))}")


def _command_line():
    from absl import app, flags
    from ml_collections import config_flags

    from config.validate import check_flags

    check_flags(sys.argv)
    config_flags.DEFINE_config_file("config", "config/tiny.py", "Whose reconstructor is used.")
    flags.DEFINE_string("images", None, "The pictures, one after another, in the order of the sculptor's cameras.")
    flags.DEFINE_string("out", "logs/show", "Folder for the results.")
    flags.mark_flag_as_required("images")
    flags.FLAGS.set_gnu_getopt()  # flags may follow the pictures
    app.run(lambda argv: main(flags.FLAGS, [flags.FLAGS.images, *argv[1:]]))


if __name__ == "__main__":
    try:
        _command_line()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"recon.show: {error}")
