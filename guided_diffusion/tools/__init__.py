"""Programs beside test.py and train.py."""
