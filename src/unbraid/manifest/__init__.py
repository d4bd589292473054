"""Identity, hashes and lineage of artifacts: what a folder is, what it was made from, and whether it still fits."""
