"""Parts of block pruning: which blocks matter, and a denoiser without the others."""
