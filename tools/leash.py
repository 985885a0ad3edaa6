"""`python leash.py SCRIPT ...`: run a script that ends when its parent does, however that ends.

The parent holds the other end of the standard input; the system closes it for a parent that is killed, too.
"""

import os
import runpy
import sys
import threading


def follow() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=follow, daemon=True).start()
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
