"""What each latent does over a corpus, and which latents separate two sets of documents."""
