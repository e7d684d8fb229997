"""The console script as a module: `python -m offline_lmrl.cli`."""

import sys

from offline_lmrl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
