/*
 * The other side of the ring: guest memory in a memfd and a driver that does what it is told, legal
 * or not.  The guest sees its memory in one piece; the library maps the same pages elsewhere, in
 * one region or in two adjacent ones, so a wrong translation shows.
 *
 * Rings are split, or packed where the features say so, or where the program is one of
 * PACKED_RINGS.
 */
#ifndef DRIVER_RING_H
#define DRIVER_RING_H

#include "packed_driver.h"
#include <errno.h>
#include <fcntl.h>
#include <libvhost.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define GUEST_BASE UINT64_C(0x100000)

enum {
    GUEST_SIZE = 1 << 20,
    PATIENCE_MS = 20000, /* how long to wait for what must come */
    RING_MAX = 1024,
    /* Where things lie in a ring's share of guest memory. */
    AT_DESC = 0,
    AT_AVAIL = 0x4000,
    AT_USED = 0x6000,
    AT_TABLE = 0xa000,
    AT_BUFFER = 0x10000,
    RING_SHARE = 0x40000,
};

#define VERSION_1 (UINT64_C(1) << VIRTIO_F_VERSION_1)
#define EVENT_IDX (UINT64_C(1) << VIRTIO_F_EVENT_IDX)
#define INDIRECT (UINT64_C(1) << VIRTIO_F_INDIRECT_DESC)
#define PACKED (UINT64_C(1) << VIRTIO_F_RING_PACKED)
#define IN_ORDER (UINT64_C(1) << VIRTIO_F_IN_ORDER)

/* What a program's rings are like, all of them. */
#ifdef PACKED_RINGS
#define LAYOUT PACKED
#else
#define LAYOUT 0
#endif

/* A next index so many (single descriptors) before it wraps. */
#define BEFORE_WRAP(size, n) ((uint16_t)(LAYOUT ? WRAP + (size) - (n) : 65536 - (n)))

struct guest {
    int fd;
    char *host;
    uint64_t size;
    struct vhost_memory *memory;
};

/* Maps [0, size) of the file at GUEST_BASE; if split, in two adjacent regions. */
static inline struct vhost_memory *guest_map(int fd, uint64_t size, uint64_t split)
{
    struct vhost_region *region[2];
    struct vhost_memory *memory;
    uint32_t n = split ? 2 : 1;

    CHECK_EQ(vhost_region_map(fd, 0, GUEST_BASE, split ? split : size, &region[0]), 0);
    if (split)
        CHECK_EQ(vhost_region_map(fd, split, GUEST_BASE + split, size - split, &region[1]), 0);
    CHECK_EQ(vhost_memory_new(region, n, &memory), 0);
    for (uint32_t i = 0; i < n; i++)
        vhost_region_unref(region[i]);
    return memory;
}

static inline struct guest guest_new(uint64_t size, uint64_t split)
{
    struct guest g = {.size = size};

    g.fd = memfd_create("guest", MFD_CLOEXEC);
    CHECK(g.fd >= 0);
    CHECK_EQ(ftruncate(g.fd, (off_t)size), 0);
    g.host = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, g.fd, 0);
    CHECK(g.host != MAP_FAILED);
    g.memory = guest_map(g.fd, size, split);
    return g;
}

static inline void guest_free(struct guest *g)
{
    vhost_memory_unref(g->memory);
    munmap(g->host, g->size);
    close(g->fd);
}

static inline void *guest_at(const struct guest *g, uint64_t addr)
{
    return g->host + (addr - GUEST_BASE);
}

/* ---- the ring ---- */

struct driver_ring {
    struct guest *guest;
    uint64_t base; /* guest address of its share */
    uint64_t features;
    uint16_t size;
    struct vring_desc *desc;
    struct packed_half *packed; /* or NULL */
    uint16_t *avail, *used;
    struct vring_used_elem *used_ring;
    uint16_t avail_idx; /* ours; the device sees it after driver_publish */
    uint16_t seen;      /* used entries taken */
    int kick, call, err;
};

/* A packed ring begins at the place `next_index`, or where all rings begin. */
static inline struct packed_half *packed_new(struct guest *g, uint64_t base, uint16_t size,
                                             uint16_t next_index)
{
    struct packed_half *p = calloc(1, sizeof(*p));

    CHECK(p != NULL);
    p->size = size;
    p->slot = guest_at(g, base + AT_DESC);
    p->driver_event = guest_at(g, base + AT_AVAIL);
    p->device_event = guest_at(g, base + AT_USED);
    packed_begin(p, next_index ? next_index : WRAP);
    return p;
}

static inline struct driver_ring driver_new(struct guest *g, uint32_t share, uint16_t size,
                                            uint64_t features, uint16_t next_index)
{
    uint64_t base = GUEST_BASE + (uint64_t)share * RING_SHARE;
    struct driver_ring d = {
        .guest = g,
        .base = base,
        .features = features | LAYOUT,
        .size = size,
        .avail_idx = next_index,
        .seen = next_index,
    };

    CHECK(size <= RING_MAX);
    d.desc = guest_at(g, base + AT_DESC);
    d.avail = guest_at(g, base + AT_AVAIL);
    d.used = guest_at(g, base + AT_USED);
    d.used_ring = (struct vring_used_elem *)(d.used + 2);
    if (d.features & PACKED) {
        d.packed = packed_new(g, base, size, next_index);
        d.desc = calloc(size, sizeof(*d.desc));
        CHECK(d.desc != NULL);
    } else {
        d.avail[1] = d.used[1] = next_index;
    }
    d.kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    d.call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    d.err = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(d.kick >= 0 && d.call >= 0 && d.err >= 0);
    return d;
}

static inline void driver_free(struct driver_ring *d)
{
    close(d->kick);
    close(d->call);
    close(d->err);
    if (d->packed)
        free(d->desc);
    free(d->packed);
}

static inline struct vhost_queue_config driver_config(const struct driver_ring *d, uint32_t index)
{
    return (struct vhost_queue_config){
        .token = 1000 + index,
        .features = d->features,
        .desc = d->base + AT_DESC,
        .avail = d->base + AT_AVAIL,
        .used = d->base + AT_USED,
        .index = index,
        .size = d->size,
        .next_index = d->packed ? index_of(d->packed->fill) * 0x10001u : d->avail_idx,
        .enabled = true,
        .kick_fd = d->kick,
        .call_fd = d->call,
        .err_fd = d->err,
    };
}

static inline uint64_t buffer_addr(const struct driver_ring *d, uint64_t offset)
{
    return d->base + AT_BUFFER + offset;
}

static inline void *buffer_at(const struct driver_ring *d, uint64_t offset)
{
    return guest_at(d->guest, buffer_addr(d, offset));
}

static inline void set_desc(struct vring_desc *table, uint16_t i, uint64_t addr, uint32_t len,
                            uint16_t flags, uint16_t next)
{
    table[i] = (struct vring_desc){.addr = addr, .len = len, .flags = flags, .next = next};
}

/* The indirect table of descriptor `head`: entries in the share's table area. */
static inline struct vring_desc *driver_table(const struct driver_ring *d)
{
    return guest_at(d->guest, d->base + AT_TABLE);
}

static inline void driver_offer(struct driver_ring *d, uint16_t head)
{
    if (d->packed) {
        bool indirect = d->desc[head].flags & VRING_DESC_F_INDIRECT;
        packed_offer(d->packed, d->desc, head,
                     indirect ? guest_at(d->guest, d->desc[head].addr) : NULL);
        d->avail_idx++;
        return;
    }
    d->avail[2 + (d->avail_idx++ & (d->size - 1))] = head;
}

static inline void driver_publish(struct driver_ring *d)
{
    if (d->packed)
        packed_publish(d->packed);
    else
        __atomic_store_n(&d->avail[1], d->avail_idx, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static inline void driver_kick(struct driver_ring *d)
{
    CHECK_EQ(eventfd_write(d->kick, 1), 0);
}

static inline void driver_send(struct driver_ring *d, uint16_t head)
{
    driver_offer(d, head);
    driver_publish(d);
    driver_kick(d);
}

/* A buffer of no bytes, which breaks any ring. */
static inline void driver_send_empty(struct driver_ring *d, uint16_t head)
{
    set_desc(d->desc, head, buffer_addr(d, 0), 0, 0, 0);
    driver_send(d, head);
}

static inline uint16_t *driver_used_event(struct driver_ring *d)
{
    return &d->avail[2 + d->size];
}

static inline uint16_t driver_avail_event(struct driver_ring *d)
{
    return __atomic_load_n((uint16_t *)&d->used_ring[d->size], __ATOMIC_ACQUIRE);
}

static inline uint16_t driver_used_flags(struct driver_ring *d)
{
    return __atomic_load_n(&d->used[0], __ATOMIC_ACQUIRE);
}

/* How many were used since the start, and those before. */
static inline uint16_t driver_used_idx(struct driver_ring *d)
{
    if (d->packed)
        return (uint16_t)(d->seen + packed_used(d->packed));
    return __atomic_load_n(&d->used[1], __ATOMIC_ACQUIRE);
}

/* ---- wishes ---- */

static inline void driver_want_calls(struct driver_ring *d, bool wanted)
{
    if (d->packed)
        d->packed->driver_event->flags =
            wanted ? VRING_PACKED_EVENT_FLAG_ENABLE : VRING_PACKED_EVENT_FLAG_DISABLE;
    else
        d->avail[0] = wanted ? 0 : VRING_AVAIL_F_NO_INTERRUPT;
}

/* With EVENT_IDX: a call when one more than `n` are used, each of one descriptor. */
static inline void driver_want_call_after(struct driver_ring *d, uint16_t n)
{
    if (d->packed)
        *d->packed->driver_event = (struct vring_packed_desc_event){
            .off_wrap = index_of(place_after(d->packed->take, n, d->size)),
            .flags = VRING_PACKED_EVENT_FLAG_DESC};
    else
        *driver_used_event(d) = (uint16_t)(d->seen + n);
}

/* Whether the device wants a kick for what is offered next. */
static inline bool driver_is_kick_wanted(struct driver_ring *d)
{
    bool event_idx = d->features & EVENT_IDX;

    if (!d->packed)
        return event_idx ? driver_avail_event(d) == d->avail_idx
                         : !(driver_used_flags(d) & VRING_USED_F_NO_NOTIFY);
    struct vring_packed_desc_event wish;
    __atomic_load(d->packed->device_event, &wish, __ATOMIC_ACQUIRE);
    return event_idx ? wish.flags == VRING_PACKED_EVENT_FLAG_DESC &&
                           wish.off_wrap == index_of(d->packed->fill)
                     : wish.flags == VRING_PACKED_EVENT_FLAG_ENABLE;
}

/* Whether it wants one for the last `n` that were published, each of one descriptor. */
static inline bool driver_wants_kick(struct driver_ring *d, uint16_t n)
{
    bool event_idx = d->features & EVENT_IDX;

    if (!d->packed)
        return event_idx ? (uint16_t)(d->avail_idx - driver_avail_event(d) - 1) < n
                         : !(driver_used_flags(d) & VRING_USED_F_NO_NOTIFY);
    struct vring_packed_desc_event wish;
    __atomic_load(d->packed->device_event, &wish, __ATOMIC_ACQUIRE);
    if (wish.flags != VRING_PACKED_EVENT_FLAG_DESC)
        return wish.flags == VRING_PACKED_EVENT_FLAG_ENABLE;
    uint32_t passed = packed_distance(d->packed, place_of(wish.off_wrap), d->packed->fill);
    return (passed - 1) % (2u * d->size) < n;
}

/* ---- next indexes ---- */

/* Of a ring that is new but for `n` chains of one descriptor. */
static inline uint32_t driver_next_index(const struct driver_ring *d, uint16_t n)
{
    if (!d->packed)
        return n;
    struct place at = place_of(WRAP);
    for (; n >= d->size; n = (uint16_t)(n - d->size))
        at.wrap = !at.wrap;
    return index_of(place_after(at, n, d->size)) * 0x10001u;
}

/* How many chains of one descriptor were offered behind this one. */
static inline uint16_t driver_offered_since(const struct driver_ring *d, uint32_t next_index)
{
    if (!d->packed)
        return (uint16_t)(d->avail_idx - next_index);
    return (uint16_t)packed_distance(d->packed, place_of((uint16_t)next_index), d->packed->fill);
}

/* How often the fd was signalled since it was last read. */
static inline uint64_t take_signals(int fd)
{
    eventfd_t n = 0;

    if (eventfd_read(fd, &n) < 0)
        CHECK_EQ(errno, EAGAIN);
    return n;
}

static inline void await_signal(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};

    CHECK_EQ(poll(&p, 1, PATIENCE_MS), 1);
}

/* Waits for the device by its used index alone, as a polling driver does. */
static inline void driver_await_used(struct driver_ring *d, uint16_t n)
{
    uint64_t turns = 0;

    while ((uint16_t)(driver_used_idx(d) - d->seen) < n) {
        struct pollfd p = {.fd = d->err, .events = POLLIN};
        CHECK_EQ(poll(&p, 1, ++turns % 1024 ? 0 : 1), 0); /* an error means: it will not come */
        CHECK(turns < 1024 * (uint64_t)PATIENCE_MS);
    }
}

/* Takes the next used element, waiting for it. */
static inline struct vring_used_elem driver_take(struct driver_ring *d)
{
    driver_await_used(d, 1);
    if (d->packed) {
        d->seen++;
        return packed_take(d->packed);
    }
    return d->used_ring[d->seen++ & (d->size - 1)];
}

/* Each descriptor a chain of its own: one byte for the device to write. */
static inline void one_byte_each(struct driver_ring *d)
{
    for (uint16_t i = 0; i < d->size; i++)
        set_desc(d->desc, i, buffer_addr(d, i), 1, VRING_DESC_F_WRITE, 0);
}

static inline void round_trip(struct driver_ring *d, uint16_t head)
{
    driver_send(d, head);
    CHECK_EQ(driver_take(d).id, head);
}

#endif
