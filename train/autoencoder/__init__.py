"""Training of a video autoencoder from random parameters."""
