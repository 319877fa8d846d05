"""Servers that are replaced while their front-ends stay connected."""

from __future__ import annotations
