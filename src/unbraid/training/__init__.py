"""Training autoencoders on captured activations."""
