"""Checkpoints that serve: to and from the formats that inference engines load."""
