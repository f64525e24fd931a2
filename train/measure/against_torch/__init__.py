"""Times of the denoiser and of a distillation step, beside a straightforward PyTorch version of both."""
