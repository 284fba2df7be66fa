"""One thread a test: networks this small only wait for more, and files are tested side by side."""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # also in the programs that tests start

import torch

torch.set_num_threads(1)

# A shell that starts the tests in the background has them ignore Ctrl-C, which programs inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
