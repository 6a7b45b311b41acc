"""`python -m minitron_mcore VERB …`, and so `torchrun -m minitron_mcore VERB …`."""

import sys

from minitron_mcore.cli import main

if __name__ == "__main__":
    sys.exit(main())
