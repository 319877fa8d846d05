/*
 * libvhost: guest memory, virtqueues and the block and net engines behind them.
 *
 * This header is the contract.  C programs include it, and vdev's Python half reads the part
 * between the "cdef" marks through cffi, so the two cannot drift.  It declares once:
 *   - the wire structures and constants of virtio and vhost-user,
 *   - the served queue: guest memory, three ring addresses, size, features, next index, kick, call,
 *   - the iothread that owns a queue from start to stop,
 *   - the devices (block, net) whose requests a queue carries.
 *
 * Conventions.  Functions that can fail return 0 or a negative errno.  File descriptors given to
 * the library are duplicated; the caller keeps its own.  Functions that take a `token` only post a
 * message to the owning iothread: a VHOST_EVENT_DONE with that token follows when it has acted.
 * All other functions may be called from one control thread at a time.
 *
 * Sources: Virtual I/O Device (VIRTIO) 1.3 and QEMU's vhost-user protocol specification.
 */
#ifndef LIBVHOST_H
#define LIBVHOST_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cdef begin */

/* ---- virtio: device ids and feature bits (virtio 1.3, sections 5 and 6) ---- */

enum virtio_id {
    VIRTIO_ID_NET = 1,
    VIRTIO_ID_BLOCK = 2,
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
    VIRTIO_NET_F_GUEST_ANNOUNCE = 21,
    VIRTIO_NET_F_MQ = 22,
};

enum virtio_net_hdr_value {
    VIRTIO_NET_HDR_F_NEEDS_CSUM = 1, /* of flags */
    VIRTIO_NET_HDR_GSO_TCPV4 = 1,    /* of gso_type */
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
    VHOST_USER_MEM_SLOTS = 256, /* by ADD_MEM_REG */
    VHOST_USER_VRING_INDEX_MASK = 255,
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

struct vhost_user_transfer_state {
    uint32_t direction;
    uint32_t phase;
};

/* ---- guest memory ---- */

/* A mapping of a part of a file at a guest physical address; reference counted. */
struct vhost_region;
/* An immutable set of regions, sorted by guest address; reference counted. */
struct vhost_memory;

/* Maps `size` bytes at `offset` of the regular file `fd`.
 * -EINVAL: size 0, or an address or offset that wraps; -ENODEV: not a regular file;
 * -ENXIO: the file is shorter than the region; else what mmap(2) says. */
int vhost_region_map(int fd, uint64_t offset, uint64_t guest_addr, uint64_t size,
                     struct vhost_region **out);
void vhost_region_unref(struct vhost_region *region);

/* -EEXIST: two regions share guest addresses. */
int vhost_memory_new(struct vhost_region **regions, uint32_t count, struct vhost_memory **out);
void vhost_memory_unref(struct vhost_memory *memory);
/* The host address of [guest_addr, guest_addr + size) where one region holds it whole, or NULL. */
void *vhost_memory_translate(const struct vhost_memory *memory, uint64_t guest_addr, uint64_t size);

/* ---- events: what iothreads tell the control thread ---- */

enum vhost_event_kind {
    VHOST_EVENT_DONE = 1,   /* the message with this token was carried out: result, value */
    VHOST_EVENT_BROKEN = 2, /* the queue with this token (its config's) broke: value = fault */
};

/* Why a queue broke: the guest's fault each time, and only that queue's end. */
enum vhost_fault {
    VHOST_FAULT_NONE = 0,
    VHOST_FAULT_AVAIL_INDEX = 1,    /* avail.idx ran ahead by more than the ring, or back */
    VHOST_FAULT_HEAD_RANGE = 2,     /* a head outside the descriptor table */
    VHOST_FAULT_HEAD_BUSY = 3,      /* a head made available while still in flight */
    VHOST_FAULT_CHAIN_LENGTH = 4,   /* a loop, or a chain longer than the device takes */
    VHOST_FAULT_NEXT_RANGE = 5,     /* a next outside its table */
    VHOST_FAULT_INDIRECT = 6,       /* not negotiated, nested, chained, or of a wrong length */
    VHOST_FAULT_ADDRESS = 7,        /* a buffer outside guest memory */
    VHOST_FAULT_LENGTH = 8,         /* a zero-length descriptor, or 4 GiB and more in a chain */
    VHOST_FAULT_ORDER = 9,          /* a readable descriptor after a writable one */
    VHOST_FAULT_MEMORY = 10,        /* guest memory went away (its file was truncated) */
    VHOST_FAULT_RING_UNMAPPED = 11, /* the region that held the ring was removed */
};

struct vhost_event {
    uint64_t token;
    uint64_t value;
    int32_t kind;
    int32_t result;
};

struct vhost_events;

int vhost_events_new(struct vhost_events **out);
void vhost_events_free(struct vhost_events *events);
/* An eventfd, readable while events wait. */
int vhost_events_fd(const struct vhost_events *events);
/* Takes up to `max` events; returns how many. */
int vhost_events_read(struct vhost_events *events, struct vhost_event *out, int max);

/* ---- iothreads ---- */

enum vhost_iothread_flag {
    VHOST_IOTHREAD_NO_IO_URING = 1, /* do not try io_uring */
    VHOST_IOTHREAD_POLL_ALWAYS = 2, /* never sleep: for a core of its own */
};

struct vhost_iothread_config {
    uint32_t flags;
    uint32_t poll_max_us; /* ceiling of the adaptive polling window; 0 = never poll */
    int32_t cpu;          /* pin to this CPU, or -1 */
};

struct vhost_iothread_stats {
    uint64_t wakeups;
    uint64_t poll_ns; /* the present polling window */
};

struct vhost_iothread;

int vhost_iothread_new(const struct vhost_iothread_config *config, struct vhost_events *events,
                       struct vhost_iothread **out);
/* Ends and joins the thread.  -EBUSY while queues run on it. */
int vhost_iothread_free(struct vhost_iothread *thread);
bool vhost_iothread_has_io_uring(const struct vhost_iothread *thread);
int vhost_iothread_tid(const struct vhost_iothread *thread);
void vhost_iothread_read_stats(const struct vhost_iothread *thread,
                               struct vhost_iothread_stats *out);

/* ---- counters, one set a queue index of a device; they outlive connections ---- */

enum vhost_counter {
    VHOST_COUNTER_KICKS = 0,
    VHOST_COUNTER_CALLS = 1,
    VHOST_COUNTER_CALLS_SUPPRESSED = 2,
    VHOST_COUNTER_BATCHES = 3,
    VHOST_COUNTER_REQUESTS = 4,
    VHOST_COUNTER_COMPLETIONS = 5,
    VHOST_COUNTER_BYTES_READ = 6,    /* device to guest */
    VHOST_COUNTER_BYTES_WRITTEN = 7, /* guest to device */
    VHOST_COUNTER_READS = 8,
    VHOST_COUNTER_WRITES = 9,
    VHOST_COUNTER_FLUSHES = 10,
    VHOST_COUNTER_DISCARDS = 11,
    VHOST_COUNTER_WRITE_ZEROES = 12,
    VHOST_COUNTER_ERRORS = 13,      /* requests answered IOERR */
    VHOST_COUNTER_UNSUPPORTED = 14, /* requests answered UNSUPP */
    VHOST_COUNTER_INLINE = 15,      /* requests served from the page cache without waiting */
    VHOST_COUNTER_PACKETS = 16,
    VHOST_COUNTER_DROPS_SHORT = 17,    /* no longer than the header, or a wrong direction */
    VHOST_COUNTER_DROPS_DISABLED = 18, /* sent on a disabled queue */
    VHOST_COUNTER_DROPS_REFUSED = 19,  /* the tap refused the frame */
    VHOST_COUNTER_DROPS_NOBUF = 20,    /* the receive buffers were too small */
    VHOST_COUNTER_BREAKS = 21,
    VHOST_COUNTER_COUNT = 24, /* room: a set is whole cache lines */
};

/* Log-linear latency histogram in nanoseconds: 8 buckets to each power of two. */
enum vhost_histogram {
    VHOST_HISTOGRAM_SUB_BITS = 3,
    VHOST_HISTOGRAM_BUCKETS = 304,
};

struct vhost_stats {
    uint64_t counter[VHOST_COUNTER_COUNT];
    uint64_t latency[VHOST_HISTOGRAM_BUCKETS];
};

/* The smallest latency, in nanoseconds, that falls into `bucket`. */
uint64_t vhost_histogram_floor(uint32_t bucket);

/* ---- devices ---- */

struct vhost_device;

void vhost_device_free(struct vhost_device *device);
/* Copies the counters of queue `index` without disturbing the path. -ERANGE: no such queue. */
int vhost_device_read_stats(const struct vhost_device *device, uint32_t index,
                            struct vhost_stats *out);

enum vhost_blk_flag {
    VHOST_BLK_READ_ONLY = 1,
    VHOST_BLK_NULL = 2, /* no file: reads give zeroes, writes vanish */
    VHOST_BLK_BLOCK_DEVICE = 4,
    VHOST_BLK_THREADS = 16,  /* use the thread pool although io_uring is there */
    VHOST_BLK_NO_FLUSH = 32, /* cache=unsafe: FLUSH succeeds at once */
};

struct vhost_blk_config {
    int32_t fd; /* the image, open for reading (and writing); ignored for VHOST_BLK_NULL */
    uint32_t flags;
    uint64_t capacity; /* sectors of 512 bytes */
    uint32_t num_queues;
    uint32_t seg_max;
    uint32_t max_discard_seg;
    uint32_t max_discard_sectors;
    uint8_t id[VIRTIO_BLK_ID_BYTES];
};

int vhost_blk_new(const struct vhost_blk_config *config, struct vhost_device **out);
/* The write cache: on = FLUSH makes durable, off = every write is durable when it completes. */
void vhost_blk_set_writeback(struct vhost_device *device, bool on);
void vhost_blk_set_capacity(struct vhost_device *device, uint64_t sectors);

struct vhost_net_config {
    const int *tap_fds; /* one a queue pair, IFF_VNET_HDR set, nonblocking */
    uint32_t num_pairs;
};

int vhost_net_new(const struct vhost_net_config *config, struct vhost_device **out);

/* ---- the served queue ---- */

struct vhost_queue_config {
    uint64_t token; /* names the queue in VHOST_EVENT_BROKEN */
    uint64_t features;
    uint64_t desc; /* guest physical addresses */
    uint64_t avail;
    uint64_t used;
    uint32_t index;
    uint32_t size;
    uint16_t next_index;
    bool enabled;
    int32_t kick_fd; /* an eventfd, or -1: the ring is always polled */
    int32_t call_fd; /* an eventfd, or -1 */
    int32_t err_fd;  /* an eventfd, or -1 */
};

struct vhost_queue;

/* -EINVAL: size or alignment; -EFAULT: a ring outside guest memory; -ERANGE: no such index. */
int vhost_queue_new(const struct vhost_queue_config *config, struct vhost_device *device,
                    struct vhost_memory *memory, struct vhost_queue **out);
/* Only before start or after stop. -EBUSY otherwise. */
int vhost_queue_free(struct vhost_queue *queue);

int vhost_queue_start(struct vhost_queue *queue, struct vhost_iothread *thread, uint64_t token);
/* Stops popping, completes what is in flight, hands the ring back: value = next index. */
int vhost_queue_stop(struct vhost_queue *queue, uint64_t token);
int vhost_queue_set_call(struct vhost_queue *queue, int fd, uint64_t token);
int vhost_queue_set_err(struct vhost_queue *queue, int fd, uint64_t token);
int vhost_queue_set_kick(struct vhost_queue *queue, int fd, uint64_t token);
int vhost_queue_set_enabled(struct vhost_queue *queue, bool enabled, uint64_t token);
/* Drains, then goes on in `memory`; a ring that is no longer mapped breaks. */
int vhost_queue_set_memory(struct vhost_queue *queue, struct vhost_memory *memory, uint64_t token);

/* ---- the driver's side: a load generator for block queues, for measuring and for tests ---- */

enum vhost_load_flag {
    VHOST_LOAD_RANDOM = 1,    /* random blocks; otherwise one after another */
    VHOST_LOAD_POLL = 2,      /* spin on the used ring; otherwise sleep on the call fd */
    VHOST_LOAD_EVENT_IDX = 4, /* negotiated */
    VHOST_LOAD_INDIRECT = 8,  /* negotiated: one descriptor a request, otherwise three */
    VHOST_LOAD_VERIFY = 16,   /* stamp what is written, check the stamps of what is read */
};

struct vhost_load_config {
    void *memory; /* guest memory, one region: [guest_addr, guest_addr + memory_size) */
    uint64_t memory_size;
    uint64_t guest_addr;
    uint64_t desc; /* guest physical addresses of the ring */
    uint64_t avail;
    uint64_t used;
    uint64_t buffers;     /* depth * (4096 + block_size) bytes, a multiple of 4096 */
    uint64_t span;        /* bytes of the disk to work on, from its start */
    uint64_t requests;    /* stop after so many, or 0 */
    uint64_t duration_ns; /* stop after so long, or 0; one of the two is needed */
    uint64_t seed;
    uint32_t flags;
    uint32_t queue_size; /* at least depth descriptors if INDIRECT, otherwise three times that */
    uint32_t depth;      /* requests in flight */
    uint32_t block_size; /* bytes a request, a multiple of 512 */
    uint32_t write_percent;
    uint32_t stall_ms; /* give up after so long without a completion; 0 = never */
    int32_t kick_fd;
    int32_t call_fd; /* may be -1 with VHOST_LOAD_POLL */
    int32_t cpu;     /* pin the calling thread to this CPU meanwhile, or -1 */
};

struct vhost_load_result {
    uint64_t requests; /* completed, the failed ones too */
    uint64_t bytes;
    uint64_t errors;  /* completed with a status other than OK */
    uint64_t corrupt; /* sectors that were not what was written there */
    uint64_t kicks;
    uint64_t sleeps;
    uint64_t elapsed_ns;
    uint64_t cpu_ns; /* of the calling thread */
    uint64_t latency[VHOST_HISTOGRAM_BUCKETS];
};

/* Drives a block queue that is set up and idle, in the calling thread, and leaves it idle.
 * -EINVAL: the config contradicts itself; -ETIMEDOUT: stalled (the result counts until then);
 * -EPROTO: the device returned a head that was not in flight. */
int vhost_driver_run(const struct vhost_load_config *config, struct vhost_load_result *result);
/* Nanoseconds for a cache line to go from one CPU to another and back: the median of
 * `rounds` rounds of 1000. */
int vhost_driver_ping(int cpu_a, int cpu_b, uint32_t rounds, double *round_trip_ns);

/* ---- the driver's side: a packet generator for net queues, for measuring and for tests ---- */

enum vhost_packet_flag {
    VHOST_PACKET_EVENT_IDX = 1,  /* of a port: negotiated */
    VHOST_PACKET_MERGEABLE = 2,  /* of a port: MRG_RXBUF was negotiated */
    VHOST_PACKET_POLL = 4,       /* of a run: spin on the used rings; otherwise sleep on call fds */
    VHOST_PACKET_VERIFY = 8,     /* of a run: fill frames with a pattern, and check every byte */
    VHOST_PACKET_ROUND_TRIP = 16 /* of a run: port b sends back what arrives there */
};

enum vhost_packet_limit {
    VHOST_PACKET_MIN = 60,    /* bytes of a frame: what no switch needs to pad */
    VHOST_PACKET_MAX = 65593, /* IPv6 with 65535 bytes of payload, behind Ethernet and a VLAN tag */
    VHOST_PACKET_STAMP = 16,  /* bytes that a frame needs behind its header */
    VHOST_PACKET_HEADER_MAX = 256,
    VHOST_PACKET_DEPTH_MAX = 65536,
};

struct vhost_packet_ring {
    uint64_t desc; /* guest physical addresses */
    uint64_t avail;
    uint64_t used;
    uint32_t size;
    int32_t kick_fd; /* an eventfd, or -1: the device polls */
    int32_t call_fd; /* an eventfd, or -1 where all runs poll */
};

/* One queue pair of a virtio-net device that speaks VERSION_1, in guest memory of one region. */
struct vhost_packet_port_config {
    void *memory; /* [guest_addr, guest_addr + memory_size); stays mapped while the port lives */
    uint64_t memory_size;
    uint64_t guest_addr;
    struct vhost_packet_ring rx;
    struct vhost_packet_ring tx;
    /* A multiple of 64.  Each receive buffer, and each frame that waits to be sent, takes its size
     * (a frame's with the virtio-net header) and up to 190 bytes more.  The receive buffers come
     * first; what remains bounds the frames that the server can hold unsent. */
    uint64_t buffers;
    uint64_t buffers_size;
    uint32_t rx_buffer_size; /* bytes of a receive buffer: one descriptor */
    uint32_t flags;
    struct virtio_net_hdr vnet; /* of each frame sent; num_buffers is ignored */
    const uint8_t *header;      /* what each frame sent starts with: Ethernet, IP, TCP...; copied */
    uint32_t header_len;
};

/* The rings of a pair and what the driver knows of them, from run to run. */
struct vhost_packet_port;

/* Takes over two rings that are idle, and fills the receive ring; nothing is kicked before the
 * first run.  -EINVAL: the config contradicts itself, leaves memory, or names a ring in use. */
int vhost_packet_port_new(const struct vhost_packet_port_config *config,
                          struct vhost_packet_port **out);
/* The receive ring is left full: set the rings up anew before they are used again. */
void vhost_packet_port_free(struct vhost_packet_port *port);

struct vhost_packet_config {
    struct vhost_packet_port *port_a; /* sends */
    struct vhost_packet_port *port_b; /* receives; port a once more where the server echoes */
    uint64_t packets;                 /* stop sending after so many, or 0 */
    uint64_t duration_ns; /* stop sending after so long, or 0; one of the two is needed */
    uint64_t seed;        /* tells the frames of runs apart, with the time */
    uint32_t packet_size; /* bytes of a frame, without the virtio-net header */
    uint32_t depth;       /* frames in flight at most; 0 = no limit: as many as the ring takes */
    uint32_t lost_ms;     /* a frame that is not back after so long is lost; more than 0 */
    uint32_t stall_ms;    /* give up where the server holds frames to be sent so long; 0 = never */
    uint32_t flags;
    int32_t cpu; /* pin the calling thread to this CPU meanwhile, or -1 */
};

/* sent = received + lost.  With a depth of 0 the lost are counted at the end, or when the 65536th
 * frame after them is sent. */
struct vhost_packet_result {
    uint64_t sent;     /* by port a */
    uint64_t received; /* each frame once; with ROUND_TRIP those that came back */
    uint64_t lost;
    uint64_t corrupt; /* of the received: not as sent; a round trip ends where that is seen */
    uint64_t stale;   /* of this run, but received before, or lost */
    uint64_t foreign; /* not of this run, or not where it belongs */
    uint64_t bytes;   /* of the frames received, without virtio-net headers */
    uint64_t kicks;   /* on all rings */
    uint64_t sleeps;
    uint64_t elapsed_ns;                       /* until the last frame was sent or received */
    uint64_t cpu_ns;                           /* of the calling thread */
    uint64_t latency[VHOST_HISTOGRAM_BUCKETS]; /* of the received that are not corrupt */
};

/* Sends frames from port a to port b (and back), in the calling thread.
 * -EINVAL: the config contradicts itself; -EBUSY: frames that an earlier run sent are still with
 * the server; -ETIMEDOUT: stalled (the result counts until then); -EPROTO: the device broke a
 * ring of the ports, now or in an earlier run. */
int vhost_packet_run(const struct vhost_packet_config *config, struct vhost_packet_result *result);

/* cdef end */

#ifdef __cplusplus
}
#endif
#endif
