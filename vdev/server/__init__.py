"""Where devices and transports meet: servers, their endpoints and their control."""

from __future__ import annotations
