"""A training of train.py."""
