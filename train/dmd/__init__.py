"""Parts of the step distillation."""
