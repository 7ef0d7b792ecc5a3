"""Rewrites that change no value and only pay in front of Inductor."""
