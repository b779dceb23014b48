"""`python -m hxcomm.bench`, under torchrun."""

import sys

from hxcomm.bench.session import main

if __name__ == "__main__":
    sys.exit(main())
