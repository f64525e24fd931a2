"""Block pruning: choice of the blocks, and training of the pruned denoiser."""
