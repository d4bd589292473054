"""What a latent causes: edits measured on probes, beside controls, with intervals."""
