"""Parts of the autoencoder and decoder programs."""
