/*
 * The structures and constants of vhost-user, each declared here and nowhere else, as they
 * go over the socket, and into the memory that comes with them.  Python reads the part between
 * the "cdef" marks, as of libvhost.h.
 *
 * Source: QEMU's vhost-user protocol specification.
 */
#ifndef VHOST_WIRE_H
#define VHOST_WIRE_H

#include <stdint.h>

/* cdef begin */

/* ---- vhost-user: messages (vhost-user specification, "Communication") ---- */

enum vhost_user_request {
    VHOST_USER_GET_FEATURES = 1,
    VHOST_USER_SET_FEATURES = 2,
    VHOST_USER_SET_OWNER = 3,
    VHOST_USER_RESET_OWNER = 4,
    VHOST_USER_SET_MEM_TABLE = 5,
    VHOST_USER_SET_LOG_BASE = 6,
    VHOST_USER_SET_LOG_FD = 7,
    VHOST_USER_SET_VRING_NUM = 8,
    VHOST_USER_SET_VRING_ADDR = 9,
    VHOST_USER_SET_VRING_BASE = 10,
    VHOST_USER_GET_VRING_BASE = 11,
    VHOST_USER_SET_VRING_KICK = 12,
    VHOST_USER_SET_VRING_CALL = 13,
    VHOST_USER_SET_VRING_ERR = 14,
    VHOST_USER_GET_PROTOCOL_FEATURES = 15,
    VHOST_USER_SET_PROTOCOL_FEATURES = 16,
    VHOST_USER_GET_QUEUE_NUM = 17,
    VHOST_USER_SET_VRING_ENABLE = 18,
    VHOST_USER_SEND_RARP = 19,
    VHOST_USER_NET_SET_MTU = 20,
    VHOST_USER_SET_BACKEND_REQ_FD = 21,
    VHOST_USER_IOTLB_MSG = 22,
    VHOST_USER_GET_CONFIG = 24,
    VHOST_USER_SET_CONFIG = 25,
    VHOST_USER_POSTCOPY_ADVISE = 28,
    VHOST_USER_POSTCOPY_LISTEN = 29,
    VHOST_USER_POSTCOPY_END = 30,
    VHOST_USER_GET_INFLIGHT_FD = 31,
    VHOST_USER_SET_INFLIGHT_FD = 32,
    VHOST_USER_RESET_DEVICE = 34,
    VHOST_USER_VRING_KICK = 35,
    VHOST_USER_GET_MAX_MEM_SLOTS = 36,
    VHOST_USER_ADD_MEM_REG = 37,
    VHOST_USER_REM_MEM_REG = 38,
    VHOST_USER_SET_STATUS = 39,
    VHOST_USER_GET_STATUS = 40,
    VHOST_USER_SET_DEVICE_STATE_FD = 42,
    VHOST_USER_CHECK_DEVICE_STATE = 43,
};

enum vhost_user_backend_request {
    VHOST_USER_BACKEND_IOTLB_MSG = 1,
    VHOST_USER_BACKEND_CONFIG_CHANGE_MSG = 2,
    VHOST_USER_BACKEND_VRING_HOST_NOTIFIER_MSG = 3,
    VHOST_USER_BACKEND_VRING_CALL = 4,
    VHOST_USER_BACKEND_VRING_ERR = 5,
};

enum vhost_user_protocol_feature {
    VHOST_USER_PROTOCOL_F_MQ = 0,
    VHOST_USER_PROTOCOL_F_LOG_SHMFD = 1,
    VHOST_USER_PROTOCOL_F_RARP = 2,
    VHOST_USER_PROTOCOL_F_REPLY_ACK = 3,
    VHOST_USER_PROTOCOL_F_MTU = 4,
    VHOST_USER_PROTOCOL_F_BACKEND_REQ = 5,
    VHOST_USER_PROTOCOL_F_CROSS_ENDIAN = 6,
    VHOST_USER_PROTOCOL_F_CRYPTO_SESSION = 7,
    VHOST_USER_PROTOCOL_F_PAGEFAULT = 8,
    VHOST_USER_PROTOCOL_F_CONFIG = 9,
    VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD = 10,
    VHOST_USER_PROTOCOL_F_HOST_NOTIFIER = 11,
    VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD = 12,
    VHOST_USER_PROTOCOL_F_RESET_DEVICE = 13,
    VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS = 14,
    VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS = 15,
    VHOST_USER_PROTOCOL_F_STATUS = 16,
    VHOST_USER_PROTOCOL_F_XEN_MMAP = 17,
    VHOST_USER_PROTOCOL_F_SHARED_OBJECT = 18,
    VHOST_USER_PROTOCOL_F_DEVICE_STATE = 19,
    VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT = 20,
};

enum vhost_user_flag {
    VHOST_USER_VERSION = 1,
    VHOST_USER_VERSION_MASK = 3,
    VHOST_USER_REPLY = 4,
    VHOST_USER_NEED_REPLY = 8,
};

enum vhost_user_limit {
    VHOST_USER_MAX_PAYLOAD = 4096,
    VHOST_USER_MEM_REGIONS = 8, /* in one SET_MEM_TABLE */
    VHOST_USER_MEM_SLOTS = 509, /* by ADD_MEM_REG */
    VHOST_USER_VRING_INDEX_MASK = 255,
    VHOST_USER_INFLIGHT_ALIGN = 64, /* bytes */
    VHOST_USER_INFLIGHT_VERSION = 1,
    VHOST_USER_VRING_NOFD = 256,
    VHOST_USER_CONFIG_MAX = 256,
};

struct vhost_user_header {
    uint32_t request;
    uint32_t flags;
    uint32_t size;
};

struct vhost_user_vring_state {
    uint32_t index;
    uint32_t num;
};

struct vhost_user_vring_addr {
    uint32_t index;
    uint32_t flags;
    uint64_t desc;
    uint64_t used;
    uint64_t avail;
    uint64_t log;
};

struct vhost_user_mem_region {
    uint64_t guest_addr;
    uint64_t size;
    uint64_t user_addr;
    uint64_t mmap_offset;
};

struct vhost_user_memory_header {
    uint32_t num_regions;
    uint32_t padding;
};

struct vhost_user_single_region {
    uint64_t padding;
    struct vhost_user_mem_region region;
};

struct vhost_user_config_header {
    uint32_t offset;
    uint32_t size;
    uint32_t flags;
};

struct vhost_user_log {
    uint64_t mmap_size;
    uint64_t mmap_offset;
};

struct vhost_user_inflight {
    uint64_t mmap_size;
    uint64_t mmap_offset;
    uint16_t num_queues;
    uint16_t queue_size;
};

/* In shared memory ("Inflight I/O tracking"): one of these a queue, each followed by one state a
 * descriptor, and each at a multiple of VHOST_USER_INFLIGHT_ALIGN.  Those of split queues: */
struct vhost_user_inflight_split {
    uint64_t features;
    uint16_t version; /* 0: not yet in use */
    uint16_t desc_num;
    uint16_t last_batch_head;
    uint16_t used_idx;
};

struct vhost_user_inflight_chain {
    uint8_t inflight;
    uint8_t padding[5];
    uint16_t next;    /* of the last batch */
    uint64_t counter; /* in the order of popping */
};

/* Those of packed queues.  What is `old` is what counts until an update is complete. */
struct vhost_user_inflight_packed {
    uint64_t features;
    uint16_t version; /* 0: not yet in use */
    uint16_t desc_num;
    uint16_t free_head; /* of the list of free entries */
    uint16_t old_free_head;
    uint16_t used_idx;
    uint16_t old_used_idx;
    uint8_t used_wrap_counter;
    uint8_t old_used_wrap_counter;
    uint8_t padding[10];
};

/* A copy of a descriptor; the first of a chain has the chain's state. */
struct vhost_user_inflight_desc {
    uint8_t inflight;
    uint8_t padding;
    uint16_t next;    /* the next free entry, or that of the chain's next descriptor */
    uint16_t last;    /* entry of the chain */
    uint16_t num;     /* descriptors in the chain */
    uint64_t counter; /* in the order of popping */
    uint16_t id;
    uint16_t flags;
    uint32_t len;
    uint64_t addr;
};

/* Payload of IOTLB messages, in both directions. */
struct vhost_user_iotlb {
    uint64_t iova;
    uint64_t size;
    uint64_t user_addr;
    uint8_t access; /* of enum vhost_access */
    uint8_t type;   /* of enum vhost_user_iotlb_type */
};

enum vhost_user_iotlb_type {
    VHOST_USER_IOTLB_MISS = 1, /* from the back-end: it lacks this address */
    VHOST_USER_IOTLB_UPDATE = 2,
    VHOST_USER_IOTLB_INVALIDATE = 3,
    VHOST_USER_IOTLB_ACCESS_FAIL = 4,
};

enum vhost_access {
    VHOST_ACCESS_READ = 1,
    VHOST_ACCESS_WRITE = 2,
};

enum vhost_user_transfer_direction {
    VHOST_USER_TRANSFER_SAVE = 0, /* from the back-end */
    VHOST_USER_TRANSFER_LOAD = 1,
};

enum vhost_user_transfer_phase {
    VHOST_USER_TRANSFER_STOPPED = 0, /* all rings are */
};

enum vhost_user_transfer_reply {
    VHOST_USER_TRANSFER_ERROR_MASK = 0xff,
    VHOST_USER_TRANSFER_NOFD = 0x100, /* the front-end's channel is used */
};

struct vhost_user_transfer_state {
    uint32_t direction;
    uint32_t phase;
};

/* cdef end */

#endif
