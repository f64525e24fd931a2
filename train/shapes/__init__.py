"""The world of moving shapes: scenes, captions, and attributes read from videos."""
