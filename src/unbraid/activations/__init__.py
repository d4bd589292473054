"""Corpora, their tokens, and a model's activations on them: captured to shards, read back shuffled."""
