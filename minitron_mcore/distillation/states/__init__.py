"""Losses between inner states of teacher and student."""
