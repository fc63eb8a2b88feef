"""`python3 -m scorer_client`."""

import sys

from scorer_client.cli import main

sys.exit(main())
