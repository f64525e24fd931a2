"""The world of moving shapes: its scenes, its language, and what is read from its videos."""
