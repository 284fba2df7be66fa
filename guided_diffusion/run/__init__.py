"""A run of test.py: what is to be done, and doing it."""
