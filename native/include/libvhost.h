/*
 * libvhost: guest memory, virtqueues and the block and net engines behind them.
 *
 * This header is the contract.  C programs include it, and vdev's Python half reads the part
 * between the "cdef" marks through cffi, so the two cannot drift.  With virtio_wire.h and
 * vhost_wire.h, which have what goes over the wire, and vhost_memory.h, it declares once:
 *   - the served queue: guest memory, three ring addresses, size, features, next index, kick, call,
 *   - the iothread that owns a queue from start to stop,
 *   - the devices (block, net) whose requests a queue carries.
 *
 * Conventions.  Functions that can fail return 0 or a negative errno.  File descriptors given to
 * the library are duplicated; the caller keeps its own.  Functions that take a `token` only post a
 * message to the owning iothread: a VHOST_EVENT_DONE with that token follows when it has acted.
 * All other functions may be called from one control thread at a time.
 */
#ifndef LIBVHOST_H
#define LIBVHOST_H

#include <stdbool.h>
#include <stdint.h>
#include <vhost_memory.h>
#include <vhost_wire.h>
#include <virtio_wire.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cdef begin */

/* ---- the dirty log: which pages of guest memory were written ---- */

enum vhost_log_limit {
    VHOST_LOG_PAGE = 4096, /* bytes of guest memory to a bit, whatever the host's pages are */
};

/* Bits of the pages of guest physical addresses: page n is bit n % 8 of byte n / 8.  Reference
 * counted; any number of queues may set bits in it while others take them out. */
struct vhost_log;

/* Maps `size` bytes at `offset` of a file that others map too. Errors: as vhost_region_map. */
int vhost_log_map(int fd, uint64_t offset, uint64_t size, struct vhost_log **out);
/* One of our own, of at least so many pages. -EINVAL: 0. */
int vhost_log_new(uint64_t pages, struct vhost_log **out);
void vhost_log_unref(struct vhost_log *log);
/* Clears the bits of the pages [first_page, first_page + count) and adds those that were set to
 * `bits`, the first to bit 0 of bits[0].  A page that is read after this is as new as its bit.
 * -EINVAL: first_page is not a multiple of 8; -ERANGE: the log ends before. */
int vhost_log_take(struct vhost_log *log, uint64_t first_page, uint8_t *bits, uint64_t count);

/* ---- in-flight regions: what a server that is killed has popped and not completed ---- */

/* Shared memory that outlives this process, in the format of vhost-user's SET_INFLIGHT_FD for rings
 * of one layout; reference counted.  Whoever else maps it may change it at any time. */
struct vhost_inflight;

/* Bytes that the region has for so many queues of up to so many entries. */
uint64_t vhost_inflight_size(uint32_t num_queues, uint32_t queue_size, bool packed);
/* Maps it, at `offset` of a file. Errors: as vhost_region_map; -EINVAL also for an offset that is
 * not a multiple of 8. */
int vhost_inflight_map(int fd, uint64_t offset, uint32_t num_queues, uint32_t queue_size,
                       bool packed, struct vhost_inflight **out);
void vhost_inflight_unref(struct vhost_inflight *inflight);

/* ---- events: what iothreads tell the control thread ---- */

enum vhost_event_kind {
    VHOST_EVENT_DONE = 1,   /* the message with this token was carried out: result, value */
    VHOST_EVENT_BROKEN = 2, /* the queue with this token (its config's) broke: value = fault */
    VHOST_EVENT_CHAINS = 3, /* chains wait in the queue of index `token` of a batch device */
    VHOST_EVENT_RECALL = 4, /* the queue of index `token` drains: chains that were taken are due */
    /* The queue with this token (its config's) waits for its view of memory to have `value`, with
     * `result` of enum vhost_access; told once until it gets another view. */
    VHOST_EVENT_MISS = 5,
};

/* Why a queue broke: the guest's or front-end's fault each time, and only that queue's end. */
enum vhost_fault {
    VHOST_FAULT_NONE = 0,
    VHOST_FAULT_AVAIL_INDEX = 1,    /* avail.idx ran ahead by more than the ring, or back */
    VHOST_FAULT_HEAD_RANGE = 2,     /* a head or buffer id that the ring does not have */
    VHOST_FAULT_HEAD_BUSY = 3,      /* one made available while still in flight */
    VHOST_FAULT_CHAIN_LENGTH = 4,   /* a loop, or a chain longer than the device takes */
    VHOST_FAULT_NEXT_RANGE = 5,     /* a next outside its table */
    VHOST_FAULT_INDIRECT = 6,       /* not negotiated, nested, chained, or of a wrong length */
    VHOST_FAULT_ADDRESS = 7,        /* a buffer outside guest memory */
    VHOST_FAULT_LENGTH = 8,         /* a zero-length descriptor, or 4 GiB and more in a chain */
    VHOST_FAULT_ORDER = 9,          /* a readable descriptor after a writable one */
    VHOST_FAULT_MEMORY = 10,        /* guest memory went away (its file was truncated) */
    VHOST_FAULT_RING_UNMAPPED = 11, /* the region that held the ring was removed */
    VHOST_FAULT_LOG = 12,           /* the dirty log is too short, or its file was truncated */
    VHOST_FAULT_INFLIGHT = 13,      /* the file of the in-flight region was truncated */
    VHOST_FAULT_EVENT = 14,         /* a wish to be called that no packed ring has */
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
/* Makes a hole in a file, or behind its end, of which the size stays. */
int vhost_file_punch(int fd, uint64_t offset, uint64_t len);

struct vhost_net_config {
    const int *tap_fds; /* one a queue pair, IFF_VNET_HDR set, nonblocking */
    uint32_t num_pairs;
};

int vhost_net_new(const struct vhost_net_config *config, struct vhost_device **out);

/* ---- batches: a device whose requests the control thread works on ---- */

enum vhost_batch_limit {
    /* What a queue has popped and not yet given back, at most; the rest waits in the ring. */
    VHOST_BATCH_CHAINS = 256,
    VHOST_BATCH_BUFFERS = 8192, /* a first chain is popped whatever its length */
};

struct vhost_buffer {
    void *base; /* in guest memory */
    uint64_t size;
    uint64_t guest_addr;
};

/* A chain that the control thread has taken. */
struct vhost_chain {
    const struct vhost_buffer *buffers; /* the readable first; valid until the chain is done */
    uint64_t readable_len;              /* bytes */
    uint64_t writable_len;
    uint32_t readable; /* count */
    uint32_t writable; /* count */
    uint32_t id;       /* names the chain in its queue until it is done */
};

struct vhost_chain_done {
    uint32_t id;
    uint32_t written; /* bytes */
};

/* A device whose queues pop chains ahead.  VHOST_EVENT_CHAINS, once a batch, tells `events` (of
 * the caller, who keeps them until the device is freed) that some wait to be taken. */
int vhost_batch_new(uint32_t num_queues, struct vhost_events *events, struct vhost_device **out);
/* Takes up to `max` waiting chains, oldest first, and returns how many.  If there are any,
 * *memory is a reference to the table that their buffers lie in, for the caller to give back.
 * Chains that nobody takes go back into the ring, unseen, when their queue stops. */
int vhost_batch_take(struct vhost_device *device, uint32_t index, struct vhost_chain *out,
                     uint32_t max, struct vhost_memory **memory);
/* Completes chains that were taken.  -EINVAL: one was not, or is done; -ERANGE: more was written
 * than there is room for; in both cases nothing was completed. */
int vhost_batch_complete(struct vhost_device *device, uint32_t index,
                         const struct vhost_chain_done *done, uint32_t count);
/* The chain waits again, as if it had not been taken, without an event.  When the queue stops it
 * goes back into the ring, or, where later chains were completed, is completed with length 0.
 * -EINVAL: it was not taken, or is done. */
int vhost_batch_give_back(struct vhost_device *device, uint32_t index, uint32_t id);

/* ---- the served queue ---- */

struct vhost_queue_config {
    uint64_t token; /* names the queue in VHOST_EVENT_BROKEN */
    uint64_t features;
    uint64_t desc;  /* guest addresses, or IOVAs; of a packed ring: the descriptors, */
    uint64_t avail; /* the driver's, */
    uint64_t used;  /* and the device's event suppression structure */
    uint32_t index;
    uint32_t size;
    /* Where to go on, as SET_VRING_BASE says it.  A split ring: the avail index.  A packed ring:
     * the place of the next available descriptor and its wrap counter (bit 15), and the same of the
     * next used one in the upper half; of a ring that is new all is 0 but the counters. */
    uint32_t next_index;
    bool enabled;
    int32_t kick_fd; /* an eventfd, or -1: the ring is always polled */
    int32_t call_fd; /* an eventfd, or -1 */
    int32_t err_fd;  /* an eventfd, or -1 */
    /* As for vhost_queue_set_log; the queue takes a reference of its own. */
    struct vhost_log *log;
    uint64_t log_used;
    /* What is popped and not completed is noted there, if there is room for a queue of this index;
     * the queue takes a reference of its own.  If it was in use before, the queue goes on from it,
     * whatever next_index is, and begins with what is noted in it.  NULL: nothing is noted. */
    struct vhost_inflight *inflight;
};

struct vhost_queue;
/* -EINVAL: size, alignment or next index; -EFAULT: a ring outside guest memory; -ERANGE: no such
 * index; of the in-flight region: -EBADMSG: it says what cannot be, or is for the other layout;
 * -ENODATA: its file was truncated; -EOPNOTSUPP: not with this device. */
int vhost_queue_new(const struct vhost_queue_config *config, struct vhost_device *device,
                    struct vhost_memory *memory, struct vhost_queue **out);
/* Only before start or after stop. -EBUSY otherwise. */
int vhost_queue_free(struct vhost_queue *queue);
int vhost_queue_start(struct vhost_queue *queue, struct vhost_iothread *thread, uint64_t token);
/* Stops popping, completes what is in flight, hands the ring back: value = next index. */
int vhost_queue_stop(struct vhost_queue *queue, uint64_t token);
/* The same; what has not begun stays in flight, noted in the in-flight region if there is one. */
int vhost_queue_suspend(struct vhost_queue *queue, uint64_t token);
int vhost_queue_set_call(struct vhost_queue *queue, int fd, uint64_t token);
int vhost_queue_set_err(struct vhost_queue *queue, int fd, uint64_t token);
int vhost_queue_set_kick(struct vhost_queue *queue, int fd, uint64_t token);
int vhost_queue_set_enabled(struct vhost_queue *queue, bool enabled, uint64_t token);
/* Drains, then goes on in `memory`; a ring that is no longer mapped breaks. */
int vhost_queue_set_memory(struct vhost_queue *queue, struct vhost_memory *memory, uint64_t token);
/* Goes on in `memory` without a drain: all that the present one has is there, and at its place. */
int vhost_queue_extend_memory(struct vhost_queue *queue, struct vhost_memory *memory,
                              uint64_t token);
/* Logs what the device writes to guest memory from the answer on, in `log` or, with NULL, nowhere:
 * buffers as far as they were written, what requests in flight write included; and the used ring as
 * if it lay at guest address `used`, or not at all (UINT64_MAX); of a packed ring the descriptors
 * with the device's structure at `used`.  In a view it is logged where it lies, whatever `used` is.
 * A write beyond the end of the log breaks the queue. */
int vhost_queue_set_log(struct vhost_queue *queue, struct vhost_log *log, uint64_t used,
                        uint64_t token);

/* ---- the driver's side: a load generator for block queues, for measuring and for tests ---- */

enum vhost_load_flag {
    VHOST_LOAD_RANDOM = 1,    /* random blocks; otherwise one after another */
    VHOST_LOAD_POLL = 2,      /* spin on the used ring; otherwise sleep on the call fd */
    VHOST_LOAD_EVENT_IDX = 4, /* negotiated */
    VHOST_LOAD_INDIRECT = 8,  /* negotiated: one descriptor a request, otherwise three */
    VHOST_LOAD_VERIFY = 16,   /* stamp what is written, check the stamps of what is read */
    VHOST_LOAD_PACKED = 32,   /* negotiated: the ring is packed */
    VHOST_LOAD_IN_ORDER = 64, /* negotiated: -EPROTO where requests are used in another order */
};

struct vhost_load_config {
    void *memory; /* guest memory, one region: [guest_addr, guest_addr + memory_size) */
    uint64_t memory_size;
    uint64_t guest_addr;
    uint64_t desc; /* guest physical addresses of the ring */
    uint64_t avail;
    uint64_t used;
    uint64_t buffers;     /* depth * (4096 + block_size) bytes, a multiple of 4096 */
    uint64_t start;       /* the first byte of the disk to work on, a multiple of 512 */
    uint64_t span;        /* bytes to work on, from there */
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
    VHOST_PACKET_EVENT_IDX = 1, /* of a port: negotiated */
    VHOST_PACKET_MERGEABLE = 2, /* of a port: MRG_RXBUF was negotiated */
    VHOST_PACKET_POLL = 4,      /* of a run: spin on the used rings; otherwise sleep on call fds */
    VHOST_PACKET_VERIFY = 8,    /* of a run: fill frames with a pattern, and check every byte */
    VHOST_PACKET_ROUND_TRIP = 16, /* of a run: port b sends back what arrives there */
    VHOST_PACKET_PACKED = 32,     /* of a port: negotiated, its rings are packed */
    VHOST_PACKET_IN_ORDER = 64    /* of a port: negotiated; another order breaks its rings */
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
