"""Trained nets: prediction and export; USB and the trainer are not needed."""
