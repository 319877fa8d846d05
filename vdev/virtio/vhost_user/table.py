"""All messages of a front-end, one row each; what the code, the tests and the documentation read.

A row says what a message carries, what must hold before it is accepted, and how it is answered.
`handler` names what is particular to it: `Session.check_<handler>` and `commit_<handler>` (state),
`Backend.<handler>` (effects, value of the reply).  A row with a `refusal` is known, not offered.

Source: vhost-user specification, "Front-end message types".
"""

from __future__ import annotations

import enum
from dataclasses import KW_ONLY, dataclass

from vdev._native import ffi, lib
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
    Format,
)


class Needs(enum.Flag):
    """What must hold of the session, or of the ring that the message names."""

    NOTHING = 0
    NO_OWNER = enum.auto()  # nobody owns the session
    FEATURES = enum.auto()  # the virtio features are agreed
    PROTOCOL = enum.auto()  # VHOST_USER_F_PROTOCOL_FEATURES is agreed
    MEMORY = enum.auto()  # guest memory is known
    IOMMU = enum.auto()  # VIRTIO_F_ACCESS_PLATFORM is agreed
    RING_READY = enum.auto()  # size and addresses of the ring are known


@dataclass(frozen=True, slots=True)
class Row:
    """One message.

    payload: layout of the request.  reply: layout of the answer; None = an ack where one is asked
    for (REPLY_ACK).  fds: fewest and most file descriptors.  reply_fds: how many the answer has.
    protocol_feature: the bit that must have been agreed.  needs: see Needs.  error_reply: payload
    of the reply that says no, for messages that have one.  refusal: why the message is always
    refused.
    """

    request: int
    handler: str
    payload: Format = EMPTY
    reply: Format | None = None
    fds: tuple[int, int] = (0, 0)
    _: KW_ONLY
    reply_fds: int = 0
    protocol_feature: int | None = None
    needs: Needs = Needs.NOTHING
    error_reply: bytes | None = None
    refusal: str | None = None

    @property
    def name(self) -> str:
        return _NAMES[self.request]


_NAMES: dict[int, str] = {
    value: name.removeprefix("VHOST_USER_")
    for value, name in ffi.typeof("enum vhost_user_request").elements.items()
}
_NO_POSTCOPY = "post-copy migration is not offered"

_F_LOG: int = lib.VHOST_USER_PROTOCOL_F_LOG_SHMFD
_F_MQ: int = lib.VHOST_USER_PROTOCOL_F_MQ
_F_CONFIG: int = lib.VHOST_USER_PROTOCOL_F_CONFIG
_F_SLOTS: int = lib.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
_F_STATUS: int = lib.VHOST_USER_PROTOCOL_F_STATUS
_F_INFLIGHT: int = lib.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
_F_PAGEFAULT: int = lib.VHOST_USER_PROTOCOL_F_PAGEFAULT
_F_STATE: int = lib.VHOST_USER_PROTOCOL_F_DEVICE_STATE

_MANY = (1, lib.VHOST_USER_MEM_REGIONS)
_ONE = (1, 1)
_MAYBE = (0, 1)
_START = Needs.FEATURES | Needs.MEMORY | Needs.RING_READY

ROWS: tuple[Row, ...] = (
    Row(lib.VHOST_USER_GET_FEATURES, "get_features", reply=U64),
    Row(lib.VHOST_USER_SET_FEATURES, "set_features", U64),
    Row(lib.VHOST_USER_SET_OWNER, "set_owner", needs=Needs.NO_OWNER),
    Row(lib.VHOST_USER_RESET_OWNER, "reset_owner"),
    Row(lib.VHOST_USER_SET_MEM_TABLE, "set_mem_table", MEMORY_TABLE, fds=_MANY),
    Row(
        lib.VHOST_USER_SET_LOG_BASE,
        "set_log_base",
        LOG,
        U64,
        _ONE,
        protocol_feature=_F_LOG,
    ),
    # An eventfd to be told by; but nobody waits for a log that lies in shared memory, and it is
    # closed unused.
    Row(lib.VHOST_USER_SET_LOG_FD, "set_log_fd", EMPTY, fds=_ONE, protocol_feature=_F_LOG),
    Row(lib.VHOST_USER_SET_VRING_NUM, "set_vring_num", VRING_STATE),
    Row(lib.VHOST_USER_SET_VRING_ADDR, "set_vring_addr", VRING_ADDR, needs=Needs.MEMORY),
    Row(lib.VHOST_USER_SET_VRING_BASE, "set_vring_base", VRING_STATE),
    Row(lib.VHOST_USER_GET_VRING_BASE, "get_vring_base", VRING_STATE, VRING_STATE),
    Row(lib.VHOST_USER_SET_VRING_KICK, "set_vring_kick", U64, fds=_MAYBE, needs=_START),
    Row(lib.VHOST_USER_SET_VRING_CALL, "set_vring_call", U64, fds=_MAYBE),
    Row(lib.VHOST_USER_SET_VRING_ERR, "set_vring_err", U64, fds=_MAYBE),
    Row(lib.VHOST_USER_GET_PROTOCOL_FEATURES, "get_protocol_features", reply=U64),
    Row(lib.VHOST_USER_SET_PROTOCOL_FEATURES, "set_protocol_features", U64),
    Row(lib.VHOST_USER_GET_QUEUE_NUM, "get_queue_num", reply=U64, protocol_feature=_F_MQ),
    Row(lib.VHOST_USER_SET_VRING_ENABLE, "set_vring_enable", VRING_STATE, needs=Needs.PROTOCOL),
    Row(
        lib.VHOST_USER_SEND_RARP,
        "send_rarp",
        U64,
        protocol_feature=lib.VHOST_USER_PROTOCOL_F_RARP,
    ),
    Row(
        lib.VHOST_USER_NET_SET_MTU,
        "net_set_mtu",
        U64,
        protocol_feature=lib.VHOST_USER_PROTOCOL_F_MTU,
    ),
    Row(
        lib.VHOST_USER_SET_BACKEND_REQ_FD,
        "set_backend_req_fd",
        EMPTY,
        fds=_ONE,
        protocol_feature=lib.VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    ),
    Row(lib.VHOST_USER_IOTLB_MSG, "iotlb_msg", IOTLB, needs=Needs.IOMMU | Needs.MEMORY),
    Row(
        lib.VHOST_USER_GET_CONFIG,
        "get_config",
        CONFIG,
        CONFIG,
        protocol_feature=_F_CONFIG,
        error_reply=b"",
    ),
    Row(lib.VHOST_USER_SET_CONFIG, "set_config", CONFIG, protocol_feature=_F_CONFIG),
    Row(
        lib.VHOST_USER_POSTCOPY_ADVISE,
        "postcopy_advise",
        protocol_feature=_F_PAGEFAULT,
        refusal=_NO_POSTCOPY,
    ),
    Row(
        lib.VHOST_USER_POSTCOPY_LISTEN,
        "postcopy_listen",
        protocol_feature=_F_PAGEFAULT,
        refusal=_NO_POSTCOPY,
    ),
    Row(
        lib.VHOST_USER_POSTCOPY_END,
        "postcopy_end",
        protocol_feature=_F_PAGEFAULT,
        refusal=_NO_POSTCOPY,
    ),
    Row(
        lib.VHOST_USER_GET_INFLIGHT_FD,
        "get_inflight_fd",
        INFLIGHT,
        INFLIGHT,
        protocol_feature=_F_INFLIGHT,
        reply_fds=1,
    ),
    Row(
        lib.VHOST_USER_SET_INFLIGHT_FD,
        "set_inflight_fd",
        INFLIGHT,
        fds=_ONE,
        protocol_feature=_F_INFLIGHT,
    ),
    Row(
        lib.VHOST_USER_RESET_DEVICE,
        "reset_device",
        protocol_feature=lib.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    ),
    Row(
        lib.VHOST_USER_VRING_KICK,
        "vring_kick",
        VRING_STATE,
        protocol_feature=lib.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
        refusal="in-band notifications are not offered",
    ),
    Row(
        lib.VHOST_USER_GET_MAX_MEM_SLOTS,
        "get_max_mem_slots",
        reply=U64,
        protocol_feature=_F_SLOTS,
    ),
    Row(
        lib.VHOST_USER_ADD_MEM_REG,
        "add_mem_reg",
        SINGLE_REGION,
        fds=_ONE,
        protocol_feature=_F_SLOTS,
    ),
    # "For compatibility with existing incorrect implementations, the back-end MAY accept messages
    # with one file descriptor": it is closed unused.
    Row(
        lib.VHOST_USER_REM_MEM_REG,
        "rem_mem_reg",
        SINGLE_REGION,
        fds=_MAYBE,
        protocol_feature=_F_SLOTS,
    ),
    Row(lib.VHOST_USER_SET_STATUS, "set_status", U64, protocol_feature=_F_STATUS),
    Row(lib.VHOST_USER_GET_STATUS, "get_status", reply=U64, protocol_feature=_F_STATUS),
    Row(
        lib.VHOST_USER_SET_DEVICE_STATE_FD,
        "set_device_state_fd",
        TRANSFER_STATE,
        U64,
        _ONE,
        protocol_feature=_F_STATE,
        error_reply=U64.encode(lib.VHOST_USER_TRANSFER_NOFD | 1),
    ),
    Row(
        lib.VHOST_USER_CHECK_DEVICE_STATE,
        "check_device_state",
        reply=U64,
        protocol_feature=_F_STATE,
        error_reply=U64.encode(1),
    ),
)

TABLE: dict[int, Row] = {row.request: row for row in ROWS}

# Offered whatever the device is; MTU, RARP and INFLIGHT_SHMFD depend on it.
PROTOCOL_FEATURES: int = (
    1 << lib.VHOST_USER_PROTOCOL_F_MQ
    | 1 << lib.VHOST_USER_PROTOCOL_F_LOG_SHMFD
    | 1 << lib.VHOST_USER_PROTOCOL_F_REPLY_ACK
    | 1 << lib.VHOST_USER_PROTOCOL_F_BACKEND_REQ
    | 1 << lib.VHOST_USER_PROTOCOL_F_CONFIG
    | 1 << lib.VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD
    | 1 << lib.VHOST_USER_PROTOCOL_F_RESET_DEVICE
    | 1 << lib.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
    | 1 << lib.VHOST_USER_PROTOCOL_F_STATUS
    | 1 << _F_STATE
)
