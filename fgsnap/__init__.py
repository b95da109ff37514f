"""Portable, verified, tensor-parallel snapshots of Hugging Face checkpoints, and the runtime that maps them."""

__version__ = "0.1.0"
