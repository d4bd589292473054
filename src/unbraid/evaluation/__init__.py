"""How good an autoencoder is: reconstruction, sparsity, and what the model loses when it is spliced in."""
