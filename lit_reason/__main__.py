"""`python -m lit_reason` is the same program as `lit-reason`."""

import sys

from lit_reason.cli.door import main

if __name__ == "__main__":
    sys.exit(main())
