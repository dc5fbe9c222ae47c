"""Steering: directions found in labelled texts, added while the model generates."""
