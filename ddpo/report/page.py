"""Fills the templates of page/ and writes them as single files."""

import base64
import io
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from ml_collections import ConfigDict
from PIL import Image

from config import base
from config.validate import flatten, resolve
from ddpo.files import whole
from ddpo.pictures import load_views
from ddpo.report import summary
from ddpo.report.curves import figures
from ddpo.report.read import Run, read_run
from ddpo.report.scenes import Scene, scenes_of_pictures
from recon import background_remover, load_reconstructor
from recon.cameras import Cameras

HERE = Path(__file__).parent
VIEWERS = {"glb": "model-viewer.min.js", "splat": "gsplat.js"}  # kind of scene -> what shows it
SIDE = 160  # pixels of a view in the page, at most
QUALITY = 90  # of its pictures, WebP
SCENE_BYTES = 6_500_000  # of the page that objects may take; a report of the small world fits with all of them
STRIPS = 8  # captions whose samples over time are shown at once


@dataclass
class Card:
    """One validation caption in the gallery. rewards: {validation: number}; views: MRC of every view of the first and
    of the last validation, or None; pictures: {validation: data URL}; judges: {name: (before, after)}; others: the
    same caption in other runs, {run: (before, after)}."""

    index: int
    caption: str
    rewards: dict[int, float]
    views: tuple[np.ndarray, np.ndarray] | None
    pictures: dict[int, str]
    judges: dict[str, tuple[float, float]]
    others: dict[str, tuple[float, float]]

    @property
    def before(self) -> float:
        return next(iter(self.rewards.values()))

    @property
    def after(self) -> float:
        return list(self.rewards.values())[-1]

    @property
    def gain(self) -> float:
        return self.after - self.before


def write_report(
    folders: Sequence[str | Path],
    file: str | Path | None = None,
    device: str | torch.device | None = None,
) -> Path:
    """Write the report of one or more runs; pictures and objects are those of the first.

    folders: logs/RUN. file: None = report.html in the first of them. device: where the run's reconstructor makes the
    objects; None = the page has none.
    Returns the file. Raises FileNotFoundError for a folder that holds no run."""
    runs = [read_run(folder) for folder in folders]
    first = runs[0]
    found = {run.name: summary.changes(run) for run in runs}
    cards = gallery(first, runs[1:])
    scenes, cameras = {}, []
    if device is not None and cards:
        scenes, cameras = objects(first, device)
    problems = [problem for run in runs for problem in run.problems]
    problems += [
        f"{run.name} was validated on other captions than {first.name}, so that their rewards are not to be compared."
        for run in runs[1:]
        if run.validations and first.validations and run.validations[0].prompts != first.validations[0].prompts
    ]
    configs = {run.name: summary.flat(run) for run in runs}
    html = _template("report.html.jinja").render(
        runs=runs,
        first=first,
        changes=found,
        judges=list(dict.fromkeys(name for change in found.values() for name in change if name != "reward")),
        headline=summary.headline(first, found[first.name]),
        agreement=summary.agreement(found[first.name]),
        controls=summary.controls(runs, found),
        facts=summary.facts(first),
        problems=problems,
        figures=figures(runs),
        cards=cards,
        times=[validation.epochs_done for validation in first.comparable],
        strips=STRIPS,
        scenes=scenes,
        cameras=cameras,
        configs=configs,
        base=flatten(base.get_config()),
        differing={name: summary.differences(config, base.get_config()) for name, config in configs.items() if config},
        commands={run.name: summary.commands(run) for run in runs},
        **_parts({scene.kind for pair in scenes.values() for scene in pair if scene.data}),
    )
    return _write(html, Path(file) if file else first.folder / "report.html")


def write_viewer(file: str | Path, title: str, note: str, scene: Scene, cameras: Cameras, picture: Image.Image) -> Path:
    """Write a page that shows one object. note: words beneath the title; picture: shown beneath the object."""
    html = _template("scene.html.jinja").render(
        title=title,
        note=note,
        scene=scene,
        cameras=_camera_angles(cameras),
        picture=data_url(picture),
        **_parts({scene.kind} if scene.data else set()),
    )
    return _write(html, Path(file))


def write_table(
    file: str | Path,
    title: str,
    note: str,
    table: str,
    links: dict[str, str | Path] | None = None,
    picture: Image.Image | None = None,
    alt: str = "",
) -> Path:
    """Write a page that shows one table. table: Markdown; note: words beneath the title; links: {first cell of a row:
    the page that it leads to}, named from the page's folder; picture: shown beneath the table, alt: what it shows."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if not line.startswith("| ---")]
    file = Path(file)
    html = _template("table.html.jinja").render(
        title=title,
        note=note,
        rows=[[cell.strip() for cell in row] for row in rows],
        links={name: os.path.relpath(page, file.parent) for name, page in (links or {}).items()},
        picture=picture and data_url(picture),
        alt=alt,
        css=_page_file("report.css"),
    )
    return _write(html, file)


def gallery(run: Run, others: Sequence[Run]) -> list[Card]:
    """One card for every validation caption, in the order of the file."""
    if not run.validations:
        return []
    same = run.comparable
    first, last = same[0], same[-1]
    pictures = {v.epochs_done: {index: _picture(run, file) for index, file in v.pictures.items()} for v in same}
    comparable = {o.name: o for o in others if o.validations and o.validations[0].prompts == first.prompts}
    return [
        Card(
            index,
            caption,
            {v.epochs_done: float(v.rewards[index]) for v in same},
            None if first.views is None or last.views is None else (first.views[index], last.views[index]),
            {time: found[index] for time, found in pictures.items() if found.get(index)},
            {
                name: (float(values[index]), float(last.judges[name][index]))
                for name, values in first.judges.items()
                if name in last.judges
            },
            {name: _first_and_last(other, index) for name, other in comparable.items()},
        )
        for index, caption in enumerate(first.prompts)
    ]


def _first_and_last(run: Run, index: int) -> tuple[float, float]:
    return float(run.comparable[0].rewards[index]), float(run.comparable[-1].rewards[index])


def objects(run: Run, device: str | torch.device) -> tuple[dict[int, tuple[Scene, ...]], list[dict]]:
    """{index of the caption: its objects before and after}, as many captions as SCENE_BYTES allow, and the cameras.

    What cannot be reconstructed becomes a problem of the run."""
    first, last = run.comparable[0], run.comparable[-1]
    indices = sorted(first.pictures.keys() & last.pictures.keys())
    try:
        config = resolve(ConfigDict(run.config), 1).recon
        on_white = background_remover() if config.remove_background else None
        reconstructor = load_reconstructor(config, config.device or device)
    except (ValueError, OSError, AttributeError) as error:
        run.problems.append(f"There are no objects to turn, because the reconstructor cannot be loaded: {error}")
        return {}, []
    validations = [first] if first is last else [first, last]
    files = [[validation.pictures[index] for index in indices] for validation in validations]
    pairs = zip(*(scenes_of_pictures(reconstructor, some, on_white) for some in files), strict=True)
    scenes, size = {}, 0
    for index, pair in zip(indices, pairs, strict=True):
        size += sum(len(packed(scene.data)) for scene in pair)
        if size > SCENE_BYTES:
            run.problems.append(
                f"Objects are shown for the first {len(scenes)} of {len(indices)} captions: more would make the page "
                f"too large."
            )
            break
        scenes[index] = pair
    return scenes, _camera_angles(reconstructor.cameras)


def _camera_angles(cameras: Cameras) -> list[dict]:
    """What a viewer needs to stand where a camera stands: degrees and world units, as JSON values."""
    radius = cameras.c2w[:, :3, 3].norm(dim=-1)
    columns = {"azimuth": cameras.azimuth, "elevation": cameras.elevation, "distance": radius, "fov": cameras.fov}
    return [{name: round(float(values[i]), 3) for name, values in columns.items()} for i in range(len(cameras))]


def packed(data: bytes) -> str:
    """Bytes as a page holds them: zlib, then base64. viewer.js unpacks them."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def data_url(picture: Image.Image) -> str:
    """A picture as the address of itself."""
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _picture(run, file):
    """The data URL of a validation's picture, or None and a sentence."""
    try:
        rows = load_views(file)
    except ValueError as error:
        run.problems.append(f"{error}.")
        return None
    pixels = torch.cat([views.permute(2, 0, 3, 1).flatten(1, 2) for views in rows.values()])  # one row above the other
    picture = Image.fromarray(pixels.numpy())
    largest = (len(rows["views"]) * SIDE, len(rows) * SIDE)
    picture.thumbnail(largest, Image.Resampling.LANCZOS)
    return data_url(picture)


def _template(name):
    tidy = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    environment = Environment(loader=FileSystemLoader(HERE / "page"), autoescape=True, **tidy)
    environment.filters["packed"] = lambda data: Markup(packed(data))
    return environment.get_template(name)


def _page_file(name):
    return Markup((HERE / "page" / name).read_text())


def _parts(kinds):
    """Style, scripts, and the viewers for these kinds of scenes."""
    return {
        "css": _page_file("report.css"),
        "js": _page_file("report.js"),
        "viewer_js": _page_file("viewer.js"),
        "viewers": {kind: (HERE / "vendor" / VIEWERS[kind]).read_bytes() for kind in sorted(kinds)},
        "licences": {
            kind: (HERE / "vendor" / VIEWERS[kind]).with_name(VIEWERS[kind].split(".")[0] + ".LICENSE").read_text()
            for kind in sorted(kinds)
        },
    }


def _write(html, file):
    with whole(file) as partial:
        partial.write_text(html)
    return file
