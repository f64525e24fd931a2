"""A connected phone: adb, the runner on it, and the table of what was measured."""
