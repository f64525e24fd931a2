"""What every program runs on: states, checkpoints, optimizers, metrics, plans and traces."""
