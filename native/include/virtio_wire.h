/*
 * The structures and constants of virtio, each declared here and nowhere else, as they
 * lie in guest memory and configuration spaces.  Python reads the part between
 * the "cdef" marks, as of libvhost.h.
 *
 * Source: Virtual I/O Device (VIRTIO) 1.3.
 */
#ifndef VIRTIO_WIRE_H
#define VIRTIO_WIRE_H

#include <stdint.h>

/* cdef begin */

/* ---- virtio: device ids and feature bits (virtio 1.3, sections 5 and 6) ---- */

enum virtio_id {
    VIRTIO_ID_NET = 1,
    VIRTIO_ID_BLOCK = 2,
    VIRTIO_ID_CONSOLE = 3,
    VIRTIO_ID_RNG = 4,
    VIRTIO_ID_BALLOON = 5,
    VIRTIO_ID_VSOCK = 19,
    VIRTIO_ID_FS = 26,
};

enum virtio_feature {
    VIRTIO_F_NOTIFY_ON_EMPTY = 24,
    VHOST_F_LOG_ALL = 26,
    VIRTIO_F_ANY_LAYOUT = 27,
    VIRTIO_F_INDIRECT_DESC = 28,
    VIRTIO_F_EVENT_IDX = 29,
    VHOST_USER_F_PROTOCOL_FEATURES = 30,
    VIRTIO_F_VERSION_1 = 32,
    VIRTIO_F_ACCESS_PLATFORM = 33,
    VIRTIO_F_RING_PACKED = 34,
    VIRTIO_F_IN_ORDER = 35,
    VIRTIO_F_ORDER_PLATFORM = 36,
    VIRTIO_F_NOTIFICATION_DATA = 38,
    VIRTIO_F_RING_RESET = 40,
};

enum virtio_status {
    VIRTIO_STATUS_ACKNOWLEDGE = 1,
    VIRTIO_STATUS_DRIVER = 2,
    VIRTIO_STATUS_DRIVER_OK = 4,
    VIRTIO_STATUS_FEATURES_OK = 8,
    VIRTIO_STATUS_NEEDS_RESET = 64,
    VIRTIO_STATUS_FAILED = 128,
};

enum virtio_limit {
    VIRTQUEUE_MAX_SIZE = 32768,
};

enum vring_desc_flag {
    VRING_DESC_F_NEXT = 1,
    VRING_DESC_F_WRITE = 2,
    VRING_DESC_F_INDIRECT = 4,
};

enum vring_flag {
    VRING_AVAIL_F_NO_INTERRUPT = 1,
    VRING_USED_F_NO_NOTIFY = 1,
};

struct vring_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags;
    uint16_t next;
};

struct vring_used_elem {
    uint32_t id;
    uint32_t len;
};

/* ---- packed virtqueues (virtio 1.3, section 2.8) ---- */

/* Besides NEXT, WRITE and INDIRECT. */
enum vring_packed_desc_flag {
    VRING_PACKED_DESC_F_AVAIL = 1 << 7,
    VRING_PACKED_DESC_F_USED = 1 << 15,
};

struct vring_packed_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t id;
    uint16_t flags;
};

enum vring_packed_event_flag {
    VRING_PACKED_EVENT_FLAG_ENABLE = 0,
    VRING_PACKED_EVENT_FLAG_DISABLE = 1,
    VRING_PACKED_EVENT_FLAG_DESC = 2, /* with EVENT_IDX: when it comes to the descriptor named */
};

struct vring_packed_desc_event {
    uint16_t off_wrap; /* a place in the ring; bit 15: the wrap counter */
    uint16_t flags;
};

/* ---- virtio-blk (virtio 1.3, section 5.2) ---- */

enum virtio_blk_feature {
    VIRTIO_BLK_F_SIZE_MAX = 1,
    VIRTIO_BLK_F_SEG_MAX = 2,
    VIRTIO_BLK_F_RO = 5,
    VIRTIO_BLK_F_BLK_SIZE = 6,
    VIRTIO_BLK_F_FLUSH = 9,
    VIRTIO_BLK_F_TOPOLOGY = 10,
    VIRTIO_BLK_F_CONFIG_WCE = 11,
    VIRTIO_BLK_F_MQ = 12,
    VIRTIO_BLK_F_DISCARD = 13,
    VIRTIO_BLK_F_WRITE_ZEROES = 14,
    VIRTIO_BLK_F_LIFETIME = 15,
    VIRTIO_BLK_F_SECURE_ERASE = 16,
    VIRTIO_BLK_F_ZONED = 17,
};

enum virtio_blk_type {
    VIRTIO_BLK_T_IN = 0,
    VIRTIO_BLK_T_OUT = 1,
    VIRTIO_BLK_T_FLUSH = 4,
    VIRTIO_BLK_T_GET_ID = 8,
    VIRTIO_BLK_T_GET_LIFETIME = 10,
    VIRTIO_BLK_T_DISCARD = 11,
    VIRTIO_BLK_T_WRITE_ZEROES = 13,
    VIRTIO_BLK_T_SECURE_ERASE = 14,
};

enum virtio_blk_status {
    VIRTIO_BLK_S_OK = 0,
    VIRTIO_BLK_S_IOERR = 1,
    VIRTIO_BLK_S_UNSUPP = 2,
};

enum virtio_blk_limit {
    VIRTIO_BLK_SECTOR_SHIFT = 9,
    VIRTIO_BLK_ID_BYTES = 20,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1,
};

struct virtio_blk_req_hdr {
    uint32_t type;
    uint32_t reserved;
    uint64_t sector;
};

struct virtio_blk_range {
    uint64_t sector;
    uint32_t num_sectors;
    uint32_t flags;
};

struct virtio_blk_config {
    uint64_t capacity;
    uint32_t size_max;
    uint32_t seg_max;
    uint16_t cylinders;
    uint8_t heads;
    uint8_t sectors;
    uint32_t blk_size;
    uint8_t physical_block_exp;
    uint8_t alignment_offset;
    uint16_t min_io_size;
    uint32_t opt_io_size;
    uint8_t writeback;
    uint8_t unused0;
    uint16_t num_queues;
    uint32_t max_discard_sectors;
    uint32_t max_discard_seg;
    uint32_t discard_sector_alignment;
    uint32_t max_write_zeroes_sectors;
    uint32_t max_write_zeroes_seg;
    uint8_t write_zeroes_may_unmap;
    uint8_t unused1[3];
    uint32_t max_secure_erase_sectors;
    uint32_t max_secure_erase_seg;
    uint32_t secure_erase_sector_alignment;
    uint32_t zone_sectors;
    uint32_t max_open_zones;
    uint32_t max_active_zones;
    uint32_t max_append_sectors;
    uint32_t write_granularity;
    uint8_t zoned_model;
    uint8_t unused2[3];
};

/* ---- virtio-net (virtio 1.3, section 5.1) ---- */

enum virtio_net_feature {
    VIRTIO_NET_F_CSUM = 0,
    VIRTIO_NET_F_GUEST_CSUM = 1,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS = 2,
    VIRTIO_NET_F_MTU = 3,
    VIRTIO_NET_F_MAC = 5,
    VIRTIO_NET_F_GUEST_TSO4 = 7,
    VIRTIO_NET_F_GUEST_TSO6 = 8,
    VIRTIO_NET_F_GUEST_ECN = 9,
    VIRTIO_NET_F_GUEST_UFO = 10,
    VIRTIO_NET_F_HOST_TSO4 = 11,
    VIRTIO_NET_F_HOST_TSO6 = 12,
    VIRTIO_NET_F_HOST_ECN = 13,
    VIRTIO_NET_F_HOST_UFO = 14,
    VIRTIO_NET_F_MRG_RXBUF = 15,
    VIRTIO_NET_F_STATUS = 16,
    VIRTIO_NET_F_CTRL_VQ = 17,
    VIRTIO_NET_F_CTRL_RX = 18,
    VIRTIO_NET_F_CTRL_VLAN = 19,
    VIRTIO_NET_F_CTRL_RX_EXTRA = 20,
    VIRTIO_NET_F_GUEST_ANNOUNCE = 21,
    VIRTIO_NET_F_MQ = 22,
    VIRTIO_NET_F_CTRL_MAC_ADDR = 23,
    VIRTIO_NET_F_HASH_REPORT = 57,
    VIRTIO_NET_F_RSS = 60,
};

enum virtio_net_hdr_value {
    VIRTIO_NET_HDR_F_NEEDS_CSUM = 1, /* of flags */
    VIRTIO_NET_HDR_F_DATA_VALID = 2,
    VIRTIO_NET_HDR_GSO_NONE = 0, /* of gso_type */
    VIRTIO_NET_HDR_GSO_TCPV4 = 1,
    VIRTIO_NET_HDR_GSO_TCPV6 = 4,
    VIRTIO_NET_HDR_GSO_ECN = 0x80,
};

enum virtio_net_ctrl {
    VIRTIO_NET_OK = 0,
    VIRTIO_NET_ERR = 1,
    VIRTIO_NET_CTRL_MQ = 4,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET = 0,
};

enum virtio_net_limit {
    VIRTIO_NET_S_LINK_UP = 1,
    VIRTIO_NET_MTU_MIN = 68,
    VIRTIO_NET_MTU_MAX = 65535,
};

struct virtio_net_hdr {
    uint8_t flags;
    uint8_t gso_type;
    uint16_t hdr_len;
    uint16_t gso_size;
    uint16_t csum_start;
    uint16_t csum_offset;
    uint16_t num_buffers;
};

struct virtio_net_config {
    uint8_t mac[6];
    uint16_t status;
    uint16_t max_virtqueue_pairs;
    uint16_t mtu;
    uint32_t speed;
    uint8_t duplex;
    uint8_t rss_max_key_size;
    uint16_t rss_max_indirection_table_length;
    uint32_t supported_hash_types;
};

/* ---- virtio-console (virtio 1.3, section 5.3) ---- */

enum virtio_console_feature {
    VIRTIO_CONSOLE_F_SIZE = 0,
    VIRTIO_CONSOLE_F_MULTIPORT = 1,
    VIRTIO_CONSOLE_F_EMERG_WRITE = 2,
};

struct virtio_console_config {
    uint16_t cols;
    uint16_t rows;
    uint32_t max_nr_ports;
    uint32_t emerg_wr;
};

/* ---- virtio-balloon (virtio 1.3, section 5.5) ---- */

enum virtio_balloon_feature {
    VIRTIO_BALLOON_F_MUST_TELL_HOST = 0,
    VIRTIO_BALLOON_F_STATS_VQ = 1,
    VIRTIO_BALLOON_F_DEFLATE_ON_OOM = 2,
    VIRTIO_BALLOON_F_FREE_PAGE_HINT = 3,
    VIRTIO_BALLOON_F_PAGE_POISON = 4,
    VIRTIO_BALLOON_F_PAGE_REPORTING = 5,
};

enum virtio_balloon_stat_tag {
    VIRTIO_BALLOON_S_SWAP_IN = 0,
    VIRTIO_BALLOON_S_SWAP_OUT = 1,
    VIRTIO_BALLOON_S_MAJFLT = 2,
    VIRTIO_BALLOON_S_MINFLT = 3,
    VIRTIO_BALLOON_S_MEMFREE = 4,
    VIRTIO_BALLOON_S_MEMTOT = 5,
    VIRTIO_BALLOON_S_AVAIL = 6,
    VIRTIO_BALLOON_S_CACHES = 7,
    VIRTIO_BALLOON_S_HTLB_PGALLOC = 8,
    VIRTIO_BALLOON_S_HTLB_PGFAIL = 9,
};

enum virtio_balloon_limit {
    VIRTIO_BALLOON_PFN_SHIFT = 12,
};

struct virtio_balloon_config {
    uint32_t num_pages;
    uint32_t actual;
    uint32_t free_page_hint_cmd_id;
    uint32_t poison_val;
};

/* ---- virtio-vsock (virtio 1.3, section 5.10); its packet header is packed: see vdev ---- */

enum virtio_vsock_feature {
    VIRTIO_VSOCK_F_STREAM = 0,
    VIRTIO_VSOCK_F_SEQPACKET = 1,
    VIRTIO_VSOCK_F_NO_IMPLIED_STREAM = 2,
};

enum virtio_vsock_op {
    VIRTIO_VSOCK_OP_INVALID = 0,
    VIRTIO_VSOCK_OP_REQUEST = 1,
    VIRTIO_VSOCK_OP_RESPONSE = 2,
    VIRTIO_VSOCK_OP_RST = 3,
    VIRTIO_VSOCK_OP_SHUTDOWN = 4,
    VIRTIO_VSOCK_OP_RW = 5,
    VIRTIO_VSOCK_OP_CREDIT_UPDATE = 6,
    VIRTIO_VSOCK_OP_CREDIT_REQUEST = 7,
};

enum virtio_vsock_value {
    VIRTIO_VSOCK_HEADER_SIZE = 44,
    VIRTIO_VSOCK_HOST_CID = 2,
    VIRTIO_VSOCK_TYPE_STREAM = 1,
    VIRTIO_VSOCK_SHUTDOWN_RECEIVE = 1,
    VIRTIO_VSOCK_SHUTDOWN_SEND = 2,
    VIRTIO_VSOCK_EVENT_TRANSPORT_RESET = 0,
};

struct virtio_vsock_config {
    uint64_t guest_cid;
};

/* cdef end */

#endif
