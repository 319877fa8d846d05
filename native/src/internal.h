/*
 * What the rooms of libvhost know of each other.
 *
 *   memory.c      regions, lookup, SIGBUS               queue.c       life of a served queue
 *   events.c      iothread -> control thread            ring_*.c      split and packed virtqueues
 *   iothread*.c   the loop: messages, kicks, polling    device.c      counters, devices
 *   blk*.c        the block device                      net*.c        the net device
 *   batch.c       devices that the control thread works for
 *   log.c         which pages were written              inflight*.c   which chains are out
 *   chain.c       what both layouts share               order.c       used as made available
 *   view.c        memory behind an IOMMU                switch*.c     the virtual switch
 *
 * And beside them the driver's side, for measuring and for tests:
 *   driver_ring.c a ring as its driver has it           driver.c      block requests
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
    bool copy; /* private: what is written stays here */
    atomic_uint refs;
    atomic_bool broken; /* its file was truncated under us; set by the SIGBUS handler */
};

struct vhost_memory {
    atomic_uint refs;
    uint32_t count;
    struct vhost_region **by_host; /* the same, sorted by host */
    /* Of a view, which has no regions of its own, see view.c. */
    struct vhost_memory *behind;           /* or NULL */
    const struct translation *translation; /* sorted by IOVA */
    uint32_t translations;
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
/* The guest address of what lies at `host`, in one of the regions, or of those behind a view.
 * `hint`: of a search of its own, the index in by_host to try first, updated. */
uint64_t memory_guest_addr(const struct vhost_memory *memory, const void *host, uint32_t *hint);

/* Maps pieces of shared regions once more, one behind the other: whole pages but for what is before
 * the first and behind the last.  -EINVAL: they are not; else what mremap(2) says. */
int region_join(const struct iovec *piece, uint32_t n, struct vhost_region **out);

/* ---- view.c ---- */

struct vhost_queue;

enum ring_area { AREA_DESC, AREA_AVAIL, AREA_USED, AREAS };

/* The host address of what a view has at `iova` for such an access (enum vhost_access), and how
 * many bytes there are; or NULL.  `hint` as of memory_find. */
char *view_find(const struct vhost_memory *view, uint64_t iova, unsigned access, uint32_t *hint,
                uint64_t *room);
/* The host address of an area of the ring, or NULL where it is not in memory, or in a view not for
 * such an access. */
void *ring_part(struct vhost_queue *q, enum ring_area area, uint64_t addr, uint64_t size,
                unsigned access);
/* chain_add_split and chain_table (chain.h) of queues in a view, for buffers to be written or not.
 * Where something is lacking they note that (q->lacks), and what they return does not count. */
int view_add(struct vhost_queue *q, uint64_t addr, uint32_t len, uint32_t iovs, bool write);
const void *view_table(struct vhost_queue *q, uint64_t addr, uint32_t len);
/* True if memory that was mapped for the ring alone went away. */
bool ring_is_broken(const struct vhost_queue *q);
/* log_mark of what lies at an IOVA of a queue's view. */
void view_log(struct vhost_queue *q, uint64_t iova, uint64_t len);

/* ---- log.c ---- */

struct vhost_log {
    atomic_uint refs;
    struct vhost_region *region; /* NULL: the bits are ours alone */
    uint8_t *bits;
    uint64_t size; /* bytes */
};

/* Bits of one byte of the log. */
struct log_mark {
    uint64_t at;
    uint8_t bits;
};

enum { LOG_MARKS = 24 };

void log_ref(struct vhost_log *log);
bool log_is_broken(const struct vhost_log *log);
/* Notes that the device has written [guest_addr, guest_addr + len), len > 0.  What tells the driver
 * of it comes after log_flush.  This and log_written need q->log; callers look first. */
void log_mark(struct vhost_queue *q, uint64_t guest_addr, uint64_t len);
/* Sets the bits of what was noted; log_set: where a full barrier has followed what was written. */
void log_flush(struct vhost_queue *q);
void log_set(struct vhost_queue *q);
/* log_mark of the first `len` bytes of buffers that were popped. */
void log_written(struct vhost_queue *q, const struct iovec *iov, uint32_t n, uint64_t len);

/* ---- inflight.c ---- */

struct tracker;

/* Has the chains of `q`, which is not running yet, noted in `region`, and the queue go on from
 * what stands there. Errors: as vhost_queue_new; nothing has changed then. */
int inflight_open(struct vhost_queue *q, struct vhost_inflight *region);
void inflight_close(struct vhost_queue *q);
bool inflight_is_broken(const struct tracker *t);

/* ---- order.c ---- */

struct order;

/* Has the chains of `q`, which is not running yet, used in order. -ENOMEM. */
int order_open(struct vhost_queue *q);
void order_close(struct vhost_queue *q);

/* ---- events.c ---- */

void events_post(struct vhost_events *events, const struct vhost_event *event);

/* ---- rings: one interface (here) to two layouts (ring_split.c, ring_packed.c) ---- */

struct chain;

/* A layout's half of the functions below the queue.  Each ring has a copy: one load less a call,
 * and what only some queues need (inflight.c, order.c) puts functions of its own before the
 * layout's. */
struct ring_layout {
    int (*map)(struct vhost_queue *q);
    int (*resume)(struct vhost_queue *q, uint32_t next_index);
    uint32_t (*next_index)(const struct vhost_queue *q);
    uint32_t (*pending)(struct vhost_queue *q);
    bool (*pop)(struct vhost_queue *q, struct chain *chain);
    bool (*pop_in_view)(struct vhost_queue *q, struct chain *chain); /* pop, of queues in a view */
    void (*unpop)(struct vhost_queue *q, uint16_t head);
    void (*push)(struct vhost_queue *q, uint16_t head, uint32_t len);
    /* IN_ORDER: a push of which the one before, not shown yet, tells as well; or NULL. */
    void (*join)(struct vhost_queue *q, uint16_t head, uint32_t len);
    void (*show)(struct vhost_queue *q);
    void (*publish)(struct vhost_queue *q);
    void (*disarm)(struct vhost_queue *q);
    bool (*arm)(struct vhost_queue *q);
};

extern const struct ring_layout ring_split, ring_packed;

/* A chain that the driver is yet to be shown. */
struct used {
    uint32_t len;
    uint16_t id, taken; /* descriptors; 0: the next one tells of it */
};

struct ring {
    struct ring_layout layout;
    bool packed;
    uint16_t size;
    uint16_t next_avail;
    uint16_t used_idx;
    bool event_idx;
    bool indirect;
    union {
        struct { /* split: indexes count up to 65535 */
            const struct vring_desc *desc;
            uint16_t *avail; /* flags, idx, ring[size], used_event */
            uint16_t *used;  /* flags, idx, then elements, then avail_event */
            struct vring_used_elem *used_ring;
            const uint16_t *heads; /* avail's ring, or, before it, what is popped once more */
            uint16_t called_idx;   /* used_idx when call was last considered */
        };
        struct { /* packed: indexes are places in the ring */
            struct vring_packed_desc *slot;
            const struct vring_packed_desc
                *offered;                 /* slot, or, before it, what is popped once more */
            const uint32_t *driver_event; /* struct vring_packed_desc_event */
            uint32_t *device_event;
            uint32_t taken;       /* descriptors that are not the driver's */
            uint16_t avail_bits;  /* flags of what is available at next_avail */
            uint16_t used_bits;   /* flags of what is used at used_idx */
            struct used *unshown; /* what was pushed since, from used_idx on */
            uint32_t num_unshown;
            uint32_t uncalled; /* descriptors since call was last considered */
        };
    };
};

/* One popped chain.  The iovecs point into guest memory and are valid until the next pop. */
struct chain {
    struct iovec *iov; /* readable ones first */
    uint32_t readable; /* count */
    uint32_t writable; /* count */
    uint64_t readable_len;
    uint64_t writable_len;
    uint32_t splits; /* iovecs more than descriptors: buffers over two regions */
    uint16_t head;   /* names it while it is in flight, less than the ring's size */
};

/* ---- queue.c ---- */

enum queue_op {
    QUEUE_START,
    QUEUE_STOP,
    QUEUE_CALL,
    QUEUE_ERR,
    QUEUE_KICK,
    QUEUE_ENABLE,
    QUEUE_MEMORY,
    QUEUE_EXTEND,
    QUEUE_LOG
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
    bool suspend; /* of STOP: what has not begun stays noted */
    struct vhost_memory *memory;
    struct vhost_log *log;
    uint64_t log_used;
};

struct vhost_queue {
    struct ring ring;
    struct vhost_memory *memory;
    uint32_t memory_hint;
    uint32_t faults_seen; /* of memory_faults */
    uint32_t log_hint;
    uint32_t num_marks;
    struct log_mark marks[LOG_MARKS]; /* noted, not set yet */
    struct vhost_log *log;            /* NULL: nothing is logged */
    uint64_t log_used;                /* where the used ring is logged (its IOVA), or UINT64_MAX */
    struct tracker *tracker;          /* NULL: nobody notes what is in flight */
    struct order *order;              /* NULL: chains are used in any order */
    struct vhost_device *device;
    const struct device_ops *ops;
    struct vhost_stats *stats;
    void *state; /* the device's own, a queue */
    uint64_t features;
    uint32_t index;
    uint32_t in_flight; /* popped and not yet pushed */

    bool enabled;
    bool blocked;  /* broken, or waiting for another view of memory */
    bool polling;  /* in the iothread's polling set, notifications off */
    bool dirty;    /* pushed since the last publish */
    bool leaving;  /* it is being suspended: chains may stay in flight */
    bool no_kicks; /* the device waits for something else: sleep with notifications off */
    bool broken;
    uint8_t lacks; /* what its view lacks (enum vhost_access), at lacks_addr; 0: nothing */
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
    uint64_t lacks_addr;
    struct vhost_region *joined[AREAS]; /* of a ring in pieces */
    struct iovec *iov;                  /* scratch of ring_pop */
    uint32_t iov_max;
    uint32_t chain_max;       /* descriptors */
    uint64_t *busy;           /* split: bitmap of heads in flight */
    uint16_t *lengths;        /* packed: descriptors of chains in flight, by buffer id; 0: none */
    struct vring_desc *table; /* scratch: an indirect table that straddles two regions */
};

/* Finds the three ring areas of `q` in its memory. -EINVAL: alignment; -EFAULT: not mapped. */
static inline int ring_map(struct vhost_queue *q)
{
    return q->ring.layout.map(q);
}

/* Goes on where the front-end says that the ring was left.  A split ring knows the used index
 * itself.  After a server died the avail index may count chains that were lost, which a device that
 * completes in order finds again.  -EINVAL: no index of such a ring. */
static inline int ring_resume(struct vhost_queue *q, uint32_t next_index)
{
    return q->ring.layout.resume(q, next_index);
}

/* Where to go on, in the format of struct vhost_queue_config. */
static inline uint32_t ring_next_index(const struct vhost_queue *q)
{
    return q->ring.layout.next_index(q);
}

/* 0, or how many chains wait at most: a packed ring tells only whether one does.  A guest that
 * broke the index breaks the ring: 0. */
static inline uint32_t ring_pending(struct vhost_queue *q)
{
    return q->ring.layout.pending(q);
}

/* Pops the next chain.  False: there is none, or the ring broke (queue_break was called). Needs
 * ring_pending() > 0, and no more pops than that. */
static inline bool ring_pop(struct vhost_queue *q, struct chain *chain)
{
    return q->ring.layout.pop(q, chain);
}

/* Un-pops the chain popped last (again and again, newest first): it was only looked at. */
static inline void ring_unpop(struct vhost_queue *q, uint16_t head)
{
    q->ring.layout.unpop(q, head);
}

/* Puts a chain on the used ring.  The iothread publishes once a pass. */
static inline void ring_push(struct vhost_queue *q, uint16_t head, uint32_t len)
{
    q->ring.layout.push(q, head, len);
}

/* Makes pushed chains visible now, without a call: for a driver that polls. */
static inline void ring_show(struct vhost_queue *q)
{
    q->ring.layout.show(q);
}

/* Makes pushed chains visible and calls the guest if it wants to be called (iothread only). */
static inline void ring_publish(struct vhost_queue *q)
{
    q->ring.layout.publish(q);
}

/* Asks the guest (not) to kick.  ring_arm returns true if work came in meanwhile. */
static inline void ring_disarm(struct vhost_queue *q)
{
    q->ring.layout.disarm(q);
}

static inline bool ring_arm(struct vhost_queue *q)
{
    return q->ring.layout.arm(q);
}

/* The guest's fault: this ring stops until it is set up anew; err fd and event tell of it. */
void queue_break(struct vhost_queue *q, enum vhost_fault fault);
/* It cannot go on before it gets another view, one that has q->lacks_addr for q->lacks. */
void queue_wait_for_view(struct vhost_queue *q);
/* Called by the iothread. */
void queue_handle(struct queue_message *message);
void queue_settle(struct vhost_queue *q); /* finishes a drain when nothing is in flight */
/* True until all that an earlier server had popped was popped again: a drain waits for it. */
bool queue_resumes(const struct vhost_queue *q);

/* True while the device may pop: not blocked, not draining. */
static inline bool queue_may_pop(const struct vhost_queue *q)
{
    return !q->blocked && (!q->draining || (queue_resumes(q) && !q->leaving));
}

/* True while the chain of this head, or buffer id, is in flight. */
static inline bool queue_holds(const struct vhost_queue *q, uint32_t head)
{
    return q->ring.packed ? q->lengths[head] != 0 : q->busy[head / 64] >> head % 64 & 1;
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
    void (*recall)(struct vhost_queue *q);  /* has what has not begun end undone; may be NULL */
    void (*free)(struct vhost_device *device);
    bool in_order;      /* chains are completed in the order in which they were made available */
    bool tracked;       /* chains may be noted in an in-flight region: none is ever un-popped */
    uint32_t chain_max; /* chains longer than this and than the ring break it */
};

/* Its used index tells what is in flight: all that was made available behind it. */
static inline bool queue_is_in_order(const struct vhost_queue *q)
{
    return q->ops->in_order || has_bit(q->features, VIRTIO_F_IN_ORDER);
}

struct vhost_device {
    const struct device_ops *ops;
    uint32_t num_queues;
    struct vhost_stats *stats; /* one a queue */
};

int device_init(struct vhost_device *device, const struct device_ops *ops, uint32_t num_queues);

#endif
