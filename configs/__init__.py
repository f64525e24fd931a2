"""Settings of the training programs, one file per program; each names its command, hardware and result."""
