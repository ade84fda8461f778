"""Access control: bearer tokens with two access levels, and TLS."""

from __future__ import annotations

import hashlib
import hmac
import logging
import ssl
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from prompttune.errors import UsageError
from prompttune.serve.messages import ForbiddenError, UnauthorizedError

logger = logging.getLogger(__name__)


class Access(Enum):
    """Access that a call needs."""

    OPEN = "open"
    """No token: health, and the page's files, which hold no data."""
    INFERENCE = "inference"
    """A token of the inference set, if there is one."""
    CONTROL = "control"
    """Repository control switched on, and a token of the control set, if there is one."""


class Tokens:
    """A set of bearer tokens, kept as digests so that logs and debuggers do not show them."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._digests = tuple(_digest(token) for token in tokens)

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, token: str) -> bool:
        """Whether ``token`` is in the set; takes the same time for right and wrong tokens."""
        digest = _digest(token)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)

    def __repr__(self) -> str:
        return f"<{len(self)} tokens>"


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def read_tokens(path: Path) -> Tokens:
    """Read tokens from a file, one per line; blank lines and lines that start with ``#`` are skipped.

    Raises:
        UsageError: the file cannot be read, does not hold a token, or has a line with a space.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"cannot read the token file {path}: {problem}") from None
    tokens = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not tokens:
        raise UsageError(f"the token file {path} holds no token: write one token per line")
    if any(len(token.split()) > 1 for token in tokens):
        raise UsageError(f"the token file {path} has a space inside a line: write one token per line")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.warning("other users can read the token file %s: chmod 600 it", path)
    return Tokens(tokens)


@dataclass(frozen=True)
class Guard:
    """Checks the ``Authorization`` of a call, for both transports."""

    tokens: Tokens | None = None
    control_tokens: Tokens | None = None
    control: bool = False

    def __post_init__(self) -> None:
        if self.control and self.tokens is not None and self.control_tokens is None:
            raise UsageError(
                "repository control is on and inference needs a token, but control does not have its own: "
                "set a token file for control too"
            )

    def check(self, access: Access, authorization: str) -> None:
        """Return if the ``Authorization`` value of a call, empty for none, allows it.

        Raises:
            UnauthorizedError: the call needs a token, and its token is missing or wrong.
            ForbiddenError: repository control is switched off.
        """
        if access is Access.OPEN:
            return
        if access is Access.CONTROL and not self.control:
            raise ForbiddenError("repository control is off: start the server with --allow-control")
        known = self.control_tokens if access is Access.CONTROL else self.tokens
        if known is None:
            return
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise UnauthorizedError(f"{access.value} needs a token: send 'Authorization: Bearer TOKEN'")
        if token.strip() not in known:
            raise UnauthorizedError(f"the token is not one for {access.value}")


@dataclass(frozen=True)
class Tls:
    """A certificate chain and its key in PEM; with ``client_ca``, clients must show a certificate of that authority.

    Raises:
        UsageError: a file cannot be read, or the key does not belong to the certificate.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        try:
            self._check()
        except (OSError, ssl.SSLError) as problem:
            raise UsageError(f"the TLS certificate {self.certificate} or its key does not work: {problem}") from None

    def _check(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Otherwise an encrypted key would ask for its password on the terminal.
        context.load_cert_chain(self.certificate, self.key, password=lambda: b"")
        if self.client_ca is not None:
            context.load_verify_locations(self.client_ca)
