"""Planted worlds with known answers: the practice world and the assistant that was trained on it."""
