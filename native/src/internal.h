/*
 * What the rooms of libvhost know of each other.
 *
 *   memory.c      regions, lookup, SIGBUS               ring_split.c  the split virtqueue
 *   events.c      iothread -> control thread            queue.c       life of a served queue
 *   iothread*.c   the loop: messages, kicks, polling    device.c      counters, devices
 *   blk*.c        the block device                      net*.c        the net device
 *
 * And beside them the driver's side, for measuring and for tests:
 *   driver_ring.c a split ring as its driver has it     driver.c      block requests
 *   ping.c        the distance of two CPUs              net_driver*.c packets
 *
 * Ownership.  A queue belongs to the control thread until vhost_queue_start posts it, then to
 * the iothread until its stop was answered.  Fields need no locks because of that; what crosses
 * the border (messages, events, counters) is marked atomic or has its own lock off the path.
 */
#ifndef VHOST_INTERNAL_H
#define VHOST_INTERNAL_H

#include <libvhost.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/uio.h>
#include <time.h>

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
/* Code that a well-behaved peer never runs: out of line, so that it costs the rest no registers. */
#define cold_path __attribute__((noinline, cold))
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define container_of(ptr, type, member) ((type *)((char *)(ptr) - offsetof(type, member)))

static inline bool has_bit(uint64_t bits, unsigned bit)
{
    return (bits >> bit) & 1;
}

static inline uint64_t now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* In a loop that spins on another core's write. */
static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* ---- memory.c ---- */

struct vhost_region {
    uint64_t guest_addr;
    uint64_t size;
    char *host; /* host address of guest_addr */
    void *map;  /* what was mapped: page-aligned around it */
    size_t map_len;
    atomic_uint refs;
    atomic_bool broken; /* its file was truncated under us; set by the SIGBUS handler */
};

struct vhost_memory {
    atomic_uint refs;
    uint32_t count;
    struct vhost_region *region[]; /* sorted by guest_addr */
};

void memory_ref(struct vhost_memory *memory);
/* memory_find where the hint was wrong. */
struct vhost_region *memory_search(const struct vhost_memory *memory, uint64_t guest_addr,
                                   uint32_t *hint);

/* The region that holds guest_addr, or NULL.  `hint` is the index to try first, updated. */
static inline struct vhost_region *memory_find(const struct vhost_memory *memory,
                                               uint64_t guest_addr, uint32_t *hint)
{
    if (likely(*hint < memory->count)) {
        struct vhost_region *r = memory->region[*hint];
        if (likely(guest_addr - r->guest_addr < r->size))
            return r;
    }
    return memory_search(memory, guest_addr, hint);
}

/* Rises with every SIGBUS that was absorbed; queues compare it to notice one cheaply. */
extern atomic_uint memory_faults;
bool memory_is_broken(const struct vhost_memory *memory);

/* ---- events.c ---- */

void events_post(struct vhost_events *events, const struct vhost_event *event);

/* ---- the split ring (ring_split.c) ---- */

struct ring {
    const struct vring_desc *desc;
    uint16_t *avail; /* flags, idx, ring[size], used_event */
    uint16_t *used;  /* flags, idx, then elements, then avail_event */
    struct vring_used_elem *used_ring;
    uint16_t size;
    uint16_t next_avail;
    uint16_t used_idx;
    uint16_t called_idx; /* used_idx when call was last considered */
    bool event_idx;
    bool indirect;
};

/* One popped chain.  The iovecs point into guest memory and are valid until the next pop. */
struct chain {
    struct iovec *iov; /* readable ones first */
    uint32_t readable; /* count */
    uint32_t writable; /* count */
    uint64_t readable_len;
    uint64_t writable_len;
    uint32_t splits; /* iovecs more than descriptors: buffers over two regions */
    uint16_t head;
};

struct vhost_queue;

/* Finds the three ring areas of `q` in its memory. -EINVAL: alignment; -EFAULT: not mapped. */
int ring_map(struct vhost_queue *q);
/* Goes on where the ring says that it was left.  Only the avail index is the front-end's to tell
 * (vhost-user, SET_VRING_BASE); after a server died even that may count chains that were lost,
 * which a device that completes in order finds again. */
void ring_resume(struct vhost_queue *q);
/* How many chains wait.  A guest that broke the index breaks the ring: returns 0. */
uint32_t ring_pending(struct vhost_queue *q);
/* Pops the next chain.  False: the ring broke (queue_break was called). Needs ring_pending() > 0.
 */
bool ring_pop(struct vhost_queue *q, struct chain *chain);
/* Un-pops the chain popped last (again and again, newest first): it was only looked at. */
void ring_unpop(struct vhost_queue *q, uint16_t head);
/* Puts a chain on the used ring.  The iothread publishes once a pass. */
void ring_push(struct vhost_queue *q, uint16_t head, uint32_t len);
/* Makes pushed chains visible now, without a call: for a driver that polls. */
void ring_show(struct vhost_queue *q);
/* Makes pushed chains visible and calls the guest if it wants to be called (iothread only). */
void ring_publish(struct vhost_queue *q);
/* Asks the guest (not) to kick.  ring_arm returns true if work came in meanwhile. */
void ring_disarm(struct vhost_queue *q);
bool ring_arm(struct vhost_queue *q);

/* ---- queue.c ---- */

enum queue_op {
    QUEUE_START,
    QUEUE_STOP,
    QUEUE_CALL,
    QUEUE_ERR,
    QUEUE_KICK,
    QUEUE_ENABLE,
    QUEUE_MEMORY
};

/* A control message; also what waits in a queue until it has drained. */
struct queue_message {
    struct queue_message *next;
    struct vhost_queue *queue;
    struct vhost_iothread *thread; /* to which it was posted */
    enum queue_op op;
    uint64_t token;
    int fd;
    bool enabled;
    struct vhost_memory *memory;
};

struct vhost_queue {
    struct ring ring;
    struct vhost_memory *memory;
    uint32_t memory_hint;
    uint32_t faults_seen; /* of memory_faults */
    struct vhost_device *device;
    const struct device_ops *ops;
    struct vhost_stats *stats;
    void *state; /* the device's own, a queue */
    uint64_t features;
    uint32_t index;
    uint32_t in_flight; /* popped and not yet pushed */

    bool enabled;
    bool broken;
    bool polling;  /* in the iothread's polling set, notifications off */
    bool dirty;    /* pushed since the last publish */
    bool no_kicks; /* the device waits for something else: sleep with notifications off */
    int kick_fd, call_fd, err_fd;
    bool call_blocks;   /* call_fd lacks O_NONBLOCK */
    uint64_t active_ns; /* when it last had work */

    struct vhost_iothread *thread;         /* NULL unless running; the iothread's own */
    _Atomic(struct vhost_iothread *) home; /* where the control thread posts to */
    atomic_uint unanswered;                /* messages */
    struct vhost_queue *next;              /* in the iothread's list */
    struct vhost_queue *next_dirty;
    struct queue_message *draining; /* STOP or MEMORY that waits for in_flight == 0 */

    uint64_t token;
    uint64_t desc_addr, avail_addr, used_addr;
    struct iovec *iov; /* scratch of ring_pop */
    uint32_t iov_max;
    uint32_t chain_max;       /* descriptors */
    uint64_t *busy;           /* bitmap of heads in flight */
    struct vring_desc *table; /* scratch: an indirect table that straddles two regions */
};

/* The guest's fault: this ring stops until it is set up anew; err fd and event tell of it. */
void queue_break(struct vhost_queue *q, enum vhost_fault fault);
/* Called by the iothread. */
void queue_handle(struct queue_message *message);
void queue_settle(struct vhost_queue *q); /* finishes a drain when nothing is in flight */
/* True while the device may pop: not broken, not draining. */
static inline bool queue_may_pop(const struct vhost_queue *q)
{
    return !q->broken && !q->draining;
}

static inline void count(struct vhost_queue *q, enum vhost_counter c, uint64_t n)
{
    /* One writer: a relaxed load and store make a counter that readers never see torn. */
    uint64_t *p = &q->stats->counter[c];
    __atomic_store_n(p, __atomic_load_n(p, __ATOMIC_RELAXED) + n, __ATOMIC_RELAXED);
}

uint32_t histogram_bucket(uint64_t ns);

static inline void count_latency(struct vhost_queue *q, uint64_t ns)
{
    uint64_t *p = &q->stats->latency[histogram_bucket(ns)];
    __atomic_store_n(p, __atomic_load_n(p, __ATOMIC_RELAXED) + 1, __ATOMIC_RELAXED);
}

/* ---- iothread.c ---- */

struct io_uring;

/* A file descriptor that an iothread watches for a device. */
struct watch {
    void (*ready)(struct watch *watch);
    int fd;
};

/* An operation that completes on an iothread: by io_uring (its user_data), or from a worker. */
struct io_op {
    struct io_op *next;
    void (*done)(struct io_op *op, int32_t result);
    int32_t result;
};

int iothread_post(struct vhost_iothread *thread, struct queue_message *message);
/* From any thread: has op->done called on the iothread. */
void iothread_complete(struct vhost_iothread *thread, struct io_op *op, int32_t result);

/* The rest only on the iothread itself. */
int iothread_add_queue(struct vhost_iothread *thread, struct vhost_queue *q);
void iothread_remove_queue(struct vhost_iothread *thread, struct vhost_queue *q);
int iothread_set_kick(struct vhost_iothread *thread, struct vhost_queue *q, int fd);
void iothread_mark_dirty(struct vhost_queue *q);
/* Publishes every queue that was pushed to: one call a queue. */
void iothread_publish(struct vhost_iothread *thread);
struct vhost_events *iothread_events(struct vhost_iothread *thread);
/* The time of the present batch of completions, messages or events. */
uint64_t iothread_now(const struct vhost_iothread *thread);
/* NULL where io_uring is refused.  Submission happens once a pass. */
struct io_uring *iothread_uring(struct vhost_iothread *thread);
/* Watches `events` (EPOLLIN...); 0 stops. */
int iothread_watch(struct vhost_iothread *thread, struct watch *watch, uint32_t events);
/* Has `q` served in the next pass, as if it had been kicked. */
void iothread_schedule(struct vhost_queue *q);

/* ---- device.c ---- */

struct device_ops {
    /* Control thread: the longest chain (descriptors) a driver may send, state of a queue. */
    int (*queue_open)(struct vhost_queue *q);
    void (*queue_close)(struct vhost_queue *q);
    /* Iothread. */
    void (*detach)(struct vhost_queue *q);  /* nothing is in flight; may be NULL */
    bool (*service)(struct vhost_queue *q); /* one pass; true if anything was done */
    void (*quiesce)(struct vhost_queue *q); /* a drain begins: give back what was only looked at */
    void (*free)(struct vhost_device *device);
    bool in_order;      /* chains are completed in the order in which they were made available */
    uint32_t chain_max; /* chains longer than this and than the ring break it */
};

struct vhost_device {
    const struct device_ops *ops;
    uint32_t num_queues;
    struct vhost_stats *stats; /* one a queue */
};

int device_init(struct vhost_device *device, const struct device_ops *ops, uint32_t num_queues);

#endif
