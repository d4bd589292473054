"""The arithmetic of a training step on sparse codes: plain PyTorch to read, compiled loops to run."""
