"""Directions in the residual stream: collected, found, saved, added."""
