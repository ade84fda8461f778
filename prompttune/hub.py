"""The Hugging Face hub: whether it can be reached."""

from __future__ import annotations

import logging

from huggingface_hub import constants, get_session

HUB_TIMEOUT_S = 5.0

logger = logging.getLogger("prompttune")


def hub_answers() -> bool:
    """Whether the hub can be reached at all: its own client retries for nearly a minute when it cannot."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception as problem:  # the client's HTTP library, and so its errors, differ between versions
        logger.info("Hugging Face hub out of reach: %s", problem)
        return False
    return True
