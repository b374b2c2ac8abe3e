"""Language models: one port, one adapter per dialect, a registry read from a file."""
