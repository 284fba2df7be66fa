"""Say what a network is: ``python guided_diffusion/tools/inspect.py FILE_OR_FOLDER``.

A program's own folder comes first on Python's path, and this file has the name of one of Python's
modules. So it does nothing but start inspection.py, or make way.
"""

import os
import sys

if __name__ in ("__main__", "inspect"):
    sys.path[0] = os.path.abspath(f"{__file__}/../../..")  # noqa: PTH100 - pathlib imports more

if __name__ == "__main__":
    from guided_diffusion.cli import command_line
    from guided_diffusion.tools.inspection import main

    command_line(main)
elif __name__ == "inspect":  # another program of this folder runs, and Python's own was meant
    del sys.modules["inspect"]
    sys.modules["inspect"] = __import__("inspect")
