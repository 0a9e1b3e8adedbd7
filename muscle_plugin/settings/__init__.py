"""Settings: schema, sources, resolution, command line."""
