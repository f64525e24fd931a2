"""Settings of the training programs, one file per program. Each documents its command, hardware and expected result."""
