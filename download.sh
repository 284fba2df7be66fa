#!/bin/sh
# Fetch the published checkpoints and data: sh download.sh --help
probe='import sys
sys.path = [folder for folder in sys.path if folder]
if sys.version_info < (3, 10): sys.exit("3.10 or newer is needed, and this is %d.%d" % sys.version_info[:2])
try: import filelock, gdown, tqdm
except ImportError as error: sys.exit("%s (%s -m pip install -r requirements.txt)" % (error, sys.executable))'
# Python, and not the shell, follows links to this file: data/ is filled beside the file itself.
start='import os, runpy, sys
root = os.path.dirname(os.path.realpath(sys.argv.pop(1)))
sys.path[0] = root
runpy.run_path(os.path.join(root, "guided_diffusion", "tools", "download.py"), run_name="__main__")'
problems=
for python in python python3; do # a virtual environment has both, and its own comes first
  command -v "$python" >/dev/null 2>&1 || continue
  message=$("$python" -c "$probe" 2>&1) && exec "$python" -c "$start" "$0" "$@"
  problems="$problems; $python: ${message##*
}"
done
printf 'error: %s\n' "Python 3.10 or newer is needed${problems:-, and neither python nor python3 is installed}" >&2
exit 2
