"""Typed configs and the errors a user meets."""
