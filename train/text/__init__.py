"""Parts of the text-encoder distillation."""
