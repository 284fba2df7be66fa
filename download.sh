#!/usr/bin/env bash
# Fetch the published checkpoints and data: bash download.sh --help
# Python follows links to this file, so that it is the data/ beside the file itself that is filled.
probe='import os, sys
if sys.version_info < (3, 10): sys.exit(3)
sys.path = [folder for folder in sys.path if folder]
try: import tqdm
except ImportError: sys.exit(4)
sys.stdout.buffer.write(os.path.dirname(os.path.realpath(os.fsencode(sys.argv[1]))))'
problem='Python 3.10 or newer is needed, and is not installed'
for candidate in python python3; do # a virtual environment has both, and its own comes first
  here=$("$candidate" -c "$probe" "${BASH_SOURCE[0]}" 2>/dev/null)
  case $? in
    0) exec "$candidate" "$here/guided_diffusion/tools/download.py" "$@" ;;
    4) problem="$candidate lacks the package tqdm: $candidate -m pip install -r requirements.txt" ;;
  esac
done
printf 'error: %s\n' "$problem" >&2
exit 2
