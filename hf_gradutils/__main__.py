"""``python -m hf_gradutils``: the command ``hf-gradutils``, for launchers that start a module."""

import sys

from hf_gradutils.cli import main

if __name__ == "__main__":
    sys.exit(main())
