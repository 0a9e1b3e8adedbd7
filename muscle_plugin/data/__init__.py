"""Data: sources, splits, batched views and the order of images."""
