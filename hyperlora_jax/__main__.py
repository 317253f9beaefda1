"""`python -m hyperlora_jax` is the `hyperlora` program."""

import sys

from hyperlora_jax.cli.main import main

sys.exit(main())
