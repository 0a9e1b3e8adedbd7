"""One training run and its directory."""
