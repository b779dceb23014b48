"""`python -m hxcomm.tune`, under torchrun."""

import sys

from hxcomm.tune.session import main

if __name__ == "__main__":
    sys.exit(main())
