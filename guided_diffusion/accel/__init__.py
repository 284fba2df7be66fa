"""How the networks are made fast; accelerate.py is the one door."""
