"""The judge: how well painted views agree with the 3D object that they imply."""

from mrc.bounding_box import compute_bounding_box, crop_box, make_square_bbox
from mrc.lpips import LPIPS
from mrc.mrc import MRC, MRCResult, score_views
from mrc.sanity_rewards import jpeg_compressibility, jpeg_incompressibility

__all__ = [
    "LPIPS",
    "MRC",
    "MRCResult",
    "compute_bounding_box",
    "crop_box",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "make_square_bbox",
    "score_views",
]
