"""What stock diffusers lacks: a denoising step that reports its log-probability, and painters built around it."""
