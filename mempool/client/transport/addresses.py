"""Addresses of pools and shards as people write them. Leaves reaching them to the others here."""

from mempool.errors import InvalidRequest


def addresses_of(text: str) -> list[str]:
    """The addresses of "a:7077,b:7077".

    Raises:
        InvalidRequest: One is not "host:port"; the message says what it should be.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"address = {text!r} must be text, as in 'localhost:7077'.")
    return [_checked(part.strip()) for part in text.split(",")]


def is_address(text: str) -> bool:
    """Whether this is one address, as pools and shards tell theirs."""
    try:
        return "," not in text and addresses_of(text) == [text]
    except InvalidRequest:
        return False


def _checked(address: str) -> str:
    scheme, separator, rest = address.partition("://")
    if separator:
        raise _wrong(address, f"there is no {scheme}:// before it; give {rest.strip('/')!r}")
    host, separator, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if ":" in host and not bracketed:
        raise _wrong(address, f"an IPv6 address stands in brackets; give '[{host}]:{port}'")
    if "/" in address or any(character.isspace() for character in address):
        raise _wrong(address, "a host and a port are all of it")
    if not separator or not port:
        known = host or port or "localhost"
        raise _wrong(address, f"the port is missing; a pool's is 7077 unless its file says otherwise: '{known}:7077'")
    if not host or host == "[]":
        raise _wrong(address, f"the host is missing; this machine is 'localhost:{port}'")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65_536):
        raise _wrong(address, f"the port is {port!r}, must be a number from 1 to 65535")
    return address


def _wrong(address: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"address {address!r} is not host:port, as in 'localhost:7077': {why}.")
