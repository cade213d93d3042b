"""Do the views show what the caption says? The CLIP similarity that text-to-image models are compared by."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from config.errors import UserError, first_line
from mrc.mrc import resize_views


class CLIPSimilarity:
    """`CLIPSimilarity(path)(views, captions) -> (B,)`: cosine between a caption and a view, mean over the views.

    path: folder or hub id of a CLIP for transformers, such as "openai/clip-vit-large-patch14". Values of
    different CLIPs cannot be compared. Raises UserError if it cannot be loaded or is incomplete.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu"):
        remedy = "give a folder or hub id such as 'openai/clip-vit-large-patch14'"
        if not Path(path).is_dir() and path.count("/") != 1:
            raise UserError(f"{path!r} is neither a folder nor a hub id: {remedy}")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            model, found = CLIPModel.from_pretrained(path, output_loading_info=True)
        except Exception as error:  # of many kinds: not there, not downloaded, not a CLIP, damaged
            raise UserError(
                f"{path!r} is not a CLIP that transformers can load ({first_line(error)}): {remedy}"
            ) from error
        if found["missing_keys"]:  # which transformers would fill with random numbers
            raise UserError(f"{path!r} lacks {len(found['missing_keys'])} weights of a CLIP: {remedy}")
        self.model = model.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def __call__(self, views: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """views: (B, V, 3, S, S) in [0, 1]; captions: B, cut at the length that the CLIP reads. Returns (B,)."""
        device, config = self.model.device, self.model.config
        tokens = self.tokenizer(
            captions,
            padding=True,
            truncation=True,
            max_length=config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(device)
        pixels = resize_views(views.float().to(device), config.vision_config.image_size).flatten(0, 1)
        mean, std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        )
        output = self.model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=(pixels - mean) / std
        )
        images = output.image_embeds.unflatten(0, views.shape[:2])  # (B, V, D), of length 1 like the captions'
        return (images * output.text_embeds[:, None]).sum(-1).mean(1)
