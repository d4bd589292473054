"""What latents mean: labels as hypotheses, who proposes them, how they are scored, who accepts them."""
