"""One good body for each message of the table."""

from __future__ import annotations

from typing import Any

from vdev._native import lib
from vdev.virtio.vhost_user.payloads import (
    CONFIG,
    EMPTY,
    INFLIGHT,
    IOTLB,
    LOG,
    MEMORY_TABLE,
    SINGLE_REGION,
    TRANSFER_STATE,
    U64,
    VRING_ADDR,
    VRING_STATE,
    ConfigAccess,
    Format,
    Inflight,
    IotlbMessage,
    Log,
    MemoryRegion,
    TransferState,
    VringAddr,
    VringState,
)

REGION = MemoryRegion(guest_addr=0x10_0000, size=0x10_0000, user_addr=0x7F00_0000, mmap_offset=0)
ADDR = VringAddr(
    ring=0,
    flags=0,
    desc=REGION.user_addr,
    used=REGION.user_addr + 0x2000,
    avail=REGION.user_addr + 0x1000,
    log=0,
)

BODIES: dict[Format, Any] = {
    EMPTY: None,
    U64: 0,
    VRING_STATE: VringState(0, 1),
    VRING_ADDR: ADDR,
    LOG: Log(4096, 0),
    TRANSFER_STATE: TransferState(0, 0),
    MEMORY_TABLE: (REGION, REGION._replace(guest_addr=0, user_addr=0x10000)),
    SINGLE_REGION: REGION,
    CONFIG: ConfigAccess(0, 4, 0, b"abcd"),
    INFLIGHT: Inflight(4096, 0, 1, 64),
    IOTLB: IotlbMessage(0x5000, 0x1000, REGION.user_addr, 3, lib.VHOST_USER_IOTLB_UPDATE),
}
