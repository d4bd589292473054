"""Identity, hashes and lineage: what an artifact is, what it was made from, and whether it still fits."""
