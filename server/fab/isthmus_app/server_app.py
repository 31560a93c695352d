"""The installed ServerApp."""

from server.app import app

__all__ = ["app"]
