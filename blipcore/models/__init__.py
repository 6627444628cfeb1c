"""What the models are: architectures and presets, no training and no files."""
