"""Runtime of the training programs: states, checkpoints, optimizers, metrics, plans and traces."""
