"""The commands: d2v-train and d2v-probe."""

from __future__ import annotations

import logging
import sys

from d2v_fast.config import ConfigError


def _setup() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Each request and each weight report of a library is not news to the user of this one.
    for name in ("httpx", "datasets", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)


def train() -> None:
    """d2v-train: pre-train."""
    _setup()
    try:
        from d2v_fast.config import parse

        config, fused = parse(sys.argv[1:])
        if fused:
            raise ConfigError("--fused: this version has no fused kernel for any device; leave it out to train without")
        from d2v_fast import training

        code = training.train(config)
    except (ValueError, OSError) as error:
        sys.exit(f"d2v-train: {error}")
    sys.exit(code)


def probe() -> None:
    """d2v-probe: what a frozen encoder has learned."""
    _setup()
    try:
        from d2v_fast.probe import main

        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"d2v-probe: {error}")
