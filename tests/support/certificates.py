"""Certificates for tests, made by openssl: an authority, and a server that it signed."""

import subprocess
from pathlib import Path


class Certificates:
    """Files in a folder: ``authority``, ``certificate``, ``key``.

    Args:
        folder: Where they are written.
        name: A name that the server's certificate is for, beside 127.0.0.1.
    """

    def __init__(self, folder: Path, *, name: str = "pool.test") -> None:
        self.authority, self.certificate, self.key = (folder / f"{part}.pem" for part in ("authority", "server", "key"))
        signing_key, request, names = folder / "signing.pem", folder / "request.pem", folder / "names"
        names.write_text(f"subjectAltName=DNS:{name},IP:127.0.0.1\n")
        new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        _openssl(["req", "-x509", *new, "-subj", "/CN=authority", "-keyout", signing_key, "-out", self.authority])
        _openssl(["req", *new[:-2], "-subj", f"/CN={name}", "-keyout", self.key, "-out", request])
        signer = ["-CA", self.authority, "-CAkey", signing_key, "-CAcreateserial"]
        _openssl(["x509", "-req", "-in", request, *signer, "-days", "2", "-extfile", names, "-out", self.certificate])


def _openssl(arguments: list[str | Path]) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=30)
