"""A connected phone: adb, the runner on the phone, and the table of its measurements."""
