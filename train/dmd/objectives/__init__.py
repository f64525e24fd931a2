"""Objectives of the step distillation, one file each; `weighted.py` adds them up."""
