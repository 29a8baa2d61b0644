"""Addresses of servers. They are stored in runs and shown in errors, so they must not contain keys."""

import re
from urllib.parse import urlsplit


def check_address(address: str) -> None:
    """
    Check the address of a server.

    Args:
        address (`str`):
            The address, such as `http://localhost:8000/v1`.

    Raises:
        ValueError: If the address is not a URL, or contains a user name, a password or a query. The message does not
            contain these.
    """
    form = "Use the form http://localhost:8000/v1."
    try:
        url = urlsplit(address)
        is_url = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # an invalid port or IPv6 address
        is_url = False
    if not is_url or not address.isprintable() or " " in address:
        raise ValueError(f"The server's address {without_secrets(address)!r} is not a URL. {form}")
    if without_secrets(address) != address:
        raise ValueError(
            f"The server's address {without_secrets(address)!r} contains a user name, a password or a query (*** "
            "above), which would be written to the files of the run. Remove it, and set the environment variable "
            "OPENAI_API_KEY, or the one that --api-key-env names, to the API key."
        )


def without_secrets(address: str) -> str:
    """
    Replace the parts of an address that may contain keys: user name, password, query and fragment.

    Args:
        address (`str`):
            The address. It may be invalid.

    Returns:
        `str`: The address with `***` in place of these parts.
    """
    address = re.sub(r"[?#].*", "?***", address, flags=re.DOTALL)
    return re.sub(r"^(\w*:?//)?.*@", r"\g<1>***@", address, flags=re.DOTALL)
