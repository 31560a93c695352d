"""X.509 for the two channels: a private CA at the server, a server certificate, one client each.

ECDSA on P-256 and P-384 (the CA). Private keys are made where they are used, written with mode 0600 and
never sent; a client sends a signing request, and the CA takes nothing from it but the public key. The
certificate's common name is the domain, decided by the server.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError, ParcelError
from common.files import sha256_bytes, write_atomic

CA_DAYS = 3650
LEAF_DAYS = 825
SKEW = timedelta(minutes=10)
CA_COMMON_NAME = "Isthmus CA"


@dataclass(frozen=True)
class TlsFiles:
    """Where one party's TLS things are: the CA it trusts, its own certificate and key (PEM)."""

    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class CertificateAuthority:
    """The CA of one merge server; `key` never leaves it."""

    certificate: Path
    key: Path


def create_ca(folder: Path) -> CertificateAuthority:
    """Make `ca.crt` and `ca.key` in `folder`; one that is there already is kept."""
    ca = CertificateAuthority(folder / "ca.crt", folder / "ca.key")
    if ca.certificate.exists():
        return ca
    key = _ensure_key(ca.key, ec.SECP384R1())
    name = _name(CA_COMMON_NAME)
    builder = _builder(name, name, key.public_key(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    certificate = builder.sign(key, hashes.SHA384())
    write_atomic(ca.certificate, certificate.public_bytes(serialization.Encoding.PEM))
    return ca


def issue_server_certificate(
    ca: CertificateAuthority, folder: Path, hosts: list[str], *, name: str = "server"
) -> TlsFiles:
    """Make `NAME.key` (kept if there) and `NAME.crt` for DNS names and IP addresses in `hosts`."""
    files = TlsFiles(ca.certificate, folder / f"{name}.crt", folder / f"{name}.key")
    key = _ensure_key(files.key, ec.SECP256R1())
    alternatives = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    pem = _sign(ca, name, key.public_key(), ExtendedKeyUsageOID.SERVER_AUTH, alternatives)
    write_atomic(files.certificate, pem)
    return files


def make_csr(domain: str, key_path: Path) -> bytes:
    """A PEM signing request for `domain`; the private key is made at `key_path` unless it is there."""
    key = _ensure_key(key_path, ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(domain)).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def sign_csr(ca: CertificateAuthority, csr: bytes, domain: str) -> bytes:
    """A PEM client certificate for `domain` over the request's public key.

    Raises ParcelError when the request is malformed, not signed by its own key, not for `domain`, or on
    another curve than P-256 and P-384.
    """
    try:
        request = x509.load_pem_x509_csr(csr)
        valid = request.is_signature_valid
        names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        key = request.public_key()
    except (ValueError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion):
        raise ParcelError("certificate request: malformed") from None
    if not valid or [name.value for name in names] != [domain]:
        raise ParcelError("certificate request: not signed by its key, or not for this domain")
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in ("secp256r1", "secp384r1"):
        raise ParcelError("certificate request: the key must be ECDSA on P-256 or P-384")
    return _sign(ca, domain, key, ExtendedKeyUsageOID.CLIENT_AUTH, None)


def certificate_fingerprint(pem: bytes) -> str:
    """SHA-256 of the certificate's DER bytes, hex. Raises ParcelError when it is no certificate."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise ParcelError("not a PEM certificate") from None
    return sha256_bytes(certificate.public_bytes(serialization.Encoding.DER))


def _sign(
    ca: CertificateAuthority,
    name: str,
    key: ec.EllipticCurvePublicKey,
    usage: x509.ObjectIdentifier,
    alternatives: x509.SubjectAlternativeName | None,
) -> bytes:
    ca_key, issuer = _load_key(ca.key), x509.load_pem_x509_certificate(ca.certificate.read_bytes())
    builder = _builder(_name(name), issuer.subject, key, LEAF_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = builder.add_extension(authority, critical=False)
    if alternatives is not None:
        builder = builder.add_extension(alternatives, critical=False)
    return builder.sign(ca_key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _ensure_key(path: Path, curve: ec.EllipticCurve) -> ec.EllipticCurvePrivateKey:
    if path.exists():
        return _load_key(path)
    key = ec.generate_private_key(curve)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomic(path, pem, mode=0o600)
    return key


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: not an ECDSA private key in PEM", next_step="restore the file")
    return key
