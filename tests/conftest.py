"""Lets tests import the rooms of the repository from anywhere, and keeps arithmetic reproducible (one thread)."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)
