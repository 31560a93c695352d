"""The installed ClientApp; an owner's runner uses its own installation and never this file."""

from clients.app import app

__all__ = ["app"]
