"""The private CA: key modes, names, and what a signing request cannot smuggle in."""

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ParcelError
from common.tls import certificate_fingerprint, create_ca, issue_server_certificate, make_csr, sign_csr


def test_ca_server_and_client(tmp_path: Path) -> None:
    ca = create_ca(tmp_path)
    assert create_ca(tmp_path).certificate.read_bytes() == ca.certificate.read_bytes()
    files = issue_server_certificate(ca, tmp_path, ["127.0.0.1", "merge.example"])
    csr = make_csr("toys", tmp_path / "tls.key")
    client = sign_csr(ca, csr, "toys")
    for path in (ca.key, files.key, tmp_path / "tls.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    root = x509.load_pem_x509_certificate(ca.certificate.read_bytes())
    server = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    member = x509.load_pem_x509_certificate(client)
    for certificate, usage in (
        (server, ExtendedKeyUsageOID.SERVER_AUTH),
        (member, ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        certificate.verify_directly_issued_by(root)
        assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["merge.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert member.subject.rfc4514_string() == "CN=toys"
    again = x509.load_pem_x509_csr(make_csr("toys", tmp_path / "tls.key"))
    assert again.public_key() == member.public_key()
    assert len(certificate_fingerprint(client)) == 64


def test_bad_requests(tmp_path: Path) -> None:
    ca = create_ca(tmp_path)
    csr = make_csr("toys", tmp_path / "tls.key")
    body = bytearray(csr)
    body[200] = ord("A") if body[200] != ord("A") else ord("B")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "toys")])
    key = rsa.generate_private_key(65537, 2048)
    other = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    for bad in (b"", bytes(body), other.public_bytes(serialization.Encoding.PEM)):
        with pytest.raises(ParcelError):
            sign_csr(ca, bad, "toys")
    with pytest.raises(ParcelError):
        sign_csr(ca, csr, "beauty")
