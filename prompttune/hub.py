"""The Hugging Face hub: whether it can be reached."""

from __future__ import annotations

import functools
import logging

from huggingface_hub import constants, get_session

HUB_TIMEOUT_S = 5.0

logger = logging.getLogger("prompttune")


def hub_answers() -> bool:
    """Whether the hub can be reached; its own client would retry for nearly a minute if not."""
    return not constants.HF_HUB_OFFLINE and endpoint_answers(constants.ENDPOINT)


@functools.cache
def endpoint_answers(address: str) -> bool:
    """Whether a hub answers, asked once per process: with a hanging hub every request costs the whole timeout."""
    try:
        get_session().head(address, timeout=HUB_TIMEOUT_S)
    except Exception as problem:  # the client's HTTP library, and so its errors, differ between versions
        logger.info("Hugging Face hub out of reach: %s", problem)
        return False
    return True
