/*
 * The driver's side of a ring, as the load generators use it.
 *
 * What is made available becomes visible by driver_ring_publish, once a batch: one release store,
 * one full barrier, one look at whether the device wants to be kicked.  What the device has used
 * is counted by driver_ring_pending, whose acquire covers every element that it counts.
 *
 * Calls are the exception here.  A ring is kept quiet by driver_ring_disarm, called once a batch,
 * and asks for a call by driver_ring_arm, after which the used index must be looked at once more
 * before the thread sleeps.
 *
 * A packed ring is used the same way.  Its chains are laid out like those of a split ring, in a
 * table of our own, and copied into the ring when they are offered; the head is the buffer id.  All
 * are of one length, so the place of the next used one is known before it is there.  What is
 * offered becomes visible by the flags of its first descriptor, and what was seen to be used is
 * counted on from where the count ended.
 *
 * With VIRTIO_F_IN_ORDER a device may tell of a batch by one element, which stands where that of
 * the first chain would and names the last (virtio 1.3, sections 2.7.9 and 2.8.9).  So which chains
 * are used is known from the order in which they were offered, and each element must name one of
 * those that can be.  It has the last one's length; the others' are used completely.  A split
 * ring's descriptors are copied into the ring then, too, as they have to go round it one after
 * another.
 */
#ifndef VHOST_DRIVER_RING_H
#define VHOST_DRIVER_RING_H

#include "internal.h"

enum { DRIVER_AVAIL = VRING_PACKED_DESC_F_AVAIL, DRIVER_USED = VRING_PACKED_DESC_F_USED };

/* A driver's ring that was told of a chain which was not next; no chain has this head. */
enum { OUT_OF_ORDER = 0xffff };

/* A place in a packed ring, and the wrap counter there. */
struct driver_place {
    uint16_t at;
    bool wrap;
};

/* A chain that was offered, where they are used in order. */
struct driver_chain {
    uint16_t head;
    uint32_t len; /* once it is seen to be used: what the device has written */
};

/* Guest memory of one region, as the driver maps it. */
struct driver_memory {
    char *host; /* host address of guest_addr */
    uint64_t size;
    uint64_t guest_addr;
};

struct driver_ring {
    struct vring_desc *desc; /* a packed ring's, or in order: our own, to be copied from */
    uint16_t *avail;         /* flags, idx, ring[size], used_event */
    uint16_t *used;          /* flags, idx, then elements, then avail_event */
    struct vring_used_elem *used_ring;
    uint32_t size;
    uint16_t avail_idx; /* the device sees it as far as it is published */
    uint16_t published;
    uint16_t used_idx; /* taken so far */
    bool event_idx;
    int kick_fd, call_fd; /* or -1 */
    uint64_t kicks;
    uint16_t chain; /* packed, or in order: descriptors of each */

    uint16_t seen; /* packed, or in order: chains that are used, from used_idx on */

    /* In order; NULL where chains are used in any order. */
    struct driver_chain *offered; /* by avail_idx modulo the size */
    struct vring_desc *placed;    /* split: the ring's own descriptors */

    /* Packed; slot is NULL where the ring is split. */
    struct vring_packed_desc *slot;
    const uint32_t *device_event; /* struct vring_packed_desc_event */
    uint32_t *driver_event;
    uint32_t wish;                   /* what stands there */
    struct driver_place fill;        /* where the next is offered */
    struct driver_place take;        /* where the next is used */
    struct driver_place unknown;     /* where the first is used that was not seen */
    struct vring_packed_desc *first; /* offered and not yet published: its flags are missing */
    uint16_t first_flags;
};

/* The host address of [addr, addr + size), or NULL. */
char *driver_memory_at(const struct driver_memory *memory, uint64_t addr, uint64_t size);

enum driver_ring_kind { DRIVER_RING_SPLIT = 0, DRIVER_RING_PACKED = 1, DRIVER_RING_IN_ORDER = 2 };

/* Finds the ring's areas, and sets its indexes to where the ring was left; the rest of `r` is
 * the caller's to set.  `kind`: bits; `chain`: the length of each chain.
 * -EINVAL: size, alignment (virtio 1.3, sections 2.7 and 2.8), an area outside memory, or a split
 * ring with chains in flight; -ENOMEM. */
int driver_ring_open(struct driver_ring *r, const struct driver_memory *memory, uint64_t desc,
                     uint64_t avail, uint64_t used, uint32_t size, uint16_t chain, unsigned kind);
void driver_ring_close(struct driver_ring *r);

/* Makes what was offered since the last time visible, and kicks unless the device asked not to. */
void driver_ring_publish(struct driver_ring *r);

static inline struct driver_place driver_place_after(const struct driver_ring *r,
                                                     struct driver_place p, uint32_t n)
{
    uint32_t to = p.at + n;

    if (to >= r->size) {
        to -= r->size;
        p.wrap = !p.wrap;
    }
    p.at = (uint16_t)to;
    return p;
}

static inline void driver_ring_copy(struct driver_ring *r, uint16_t head)
{
    for (uint16_t k = 0; k < r->chain; k++) {
        const struct vring_desc *from = &r->desc[head + k];
        struct vring_packed_desc *to = &r->slot[r->fill.at];
        uint16_t flags = (uint16_t)(from->flags | (r->fill.wrap ? DRIVER_AVAIL : DRIVER_USED));
        to->addr = from->addr;
        to->len = from->len;
        to->id = head;
        if (r->first) {
            __atomic_store_n(&to->flags, flags, __ATOMIC_RELAXED);
        } else {
            r->first = to;
            r->first_flags = flags;
        }
        r->fill = driver_place_after(r, r->fill, 1);
    }
}

/* The first descriptor of the chain of that avail index: they have one length. */
static inline uint16_t driver_ring_placed(const struct driver_ring *r, uint16_t idx)
{
    return (uint16_t)((uint32_t)idx * r->chain & (r->size - 1));
}

/* From one descriptor to the next, and from the last to the first (section 2.7.5.1). */
static inline uint16_t driver_ring_copy_in_order(struct driver_ring *r, uint16_t head)
{
    uint16_t first = driver_ring_placed(r, r->avail_idx), at = first;

    for (uint16_t k = 0; k < r->chain; k++) {
        struct vring_desc *to = &r->placed[at];
        at = (uint16_t)((at + 1) & (r->size - 1));
        *to = r->desc[head + k];
        to->next = at;
    }
    return first;
}

/* Makes a chain available; its entry is written only where the ring does not hold it already, so
 * that a ring that goes round in order stays in both CPUs' caches. */
static inline void driver_ring_offer(struct driver_ring *r, uint16_t head)
{
    uint16_t at = r->avail_idx & (r->size - 1);

    if (r->offered)
        r->offered[at].head = head;
    if (r->slot) {
        driver_ring_copy(r, head);
    } else {
        uint16_t first = r->offered ? driver_ring_copy_in_order(r, head) : head;
        if (r->avail[2 + at] != first)
            r->avail[2 + at] = first;
    }
    r->avail_idx++;
}

/* Published and not yet taken back: the device cannot have used more. */
static inline uint16_t driver_ring_in_flight(const struct driver_ring *r)
{
    return (uint16_t)(r->published - r->used_idx);
}

/* ---- in order ---- */

/* What the device calls a chain: where it begins in a split ring, its buffer id in a packed one. */
static inline uint32_t driver_ring_name(const struct driver_ring *r, uint16_t idx)
{
    return r->slot ? r->offered[idx & (r->size - 1)].head : driver_ring_placed(r, idx);
}

/* Of a chain that is not told of by itself the device has used everything. */
static inline void driver_ring_skip(struct driver_ring *r, uint16_t idx)
{
    struct driver_chain *c = &r->offered[idx & (r->size - 1)];

    c->len = 0;
    for (uint16_t k = 0; k < r->chain; k++) {
        const struct vring_desc *d = &r->desc[c->head + k];
        c->len += d->flags & VRING_DESC_F_WRITE ? d->len : 0;
    }
}

/* How many chains, of `most` that may be used, an element tells of: all up to the one it names. */
static inline uint16_t driver_ring_told(struct driver_ring *r, struct vring_used_elem elem,
                                        uint16_t most)
{
    uint16_t next = (uint16_t)(r->used_idx + r->seen), n = 0;

    while (n < most && driver_ring_name(r, (uint16_t)(next + n)) != elem.id)
        n++;
    if (unlikely(n == most)) {
        r->offered[next & (r->size - 1)].head = OUT_OF_ORDER;
        return 1;
    }
    for (uint16_t k = 0; k < n; k++)
        driver_ring_skip(r, (uint16_t)(next + k));
    r->offered[(uint16_t)(next + n) & (r->size - 1)].len = elem.len;
    return (uint16_t)(n + 1);
}

/* ---- used ---- */

/* Copies, read once: the device may go on writing there. */
static inline struct vring_used_elem driver_ring_elem_at(const struct driver_ring *r, uint16_t idx)
{
    const struct vring_used_elem *elem = &r->used_ring[idx & (r->size - 1)];

    return (struct vring_used_elem){.id = __atomic_load_n(&elem->id, __ATOMIC_RELAXED),
                                    .len = __atomic_load_n(&elem->len, __ATOMIC_RELAXED)};
}

static inline struct vring_used_elem driver_ring_slot_at(const struct driver_ring *r, uint16_t at)
{
    const struct vring_packed_desc *d = &r->slot[at];

    return (struct vring_used_elem){.id = __atomic_load_n(&d->id, __ATOMIC_RELAXED),
                                    .len = __atomic_load_n(&d->len, __ATOMIC_RELAXED)};
}

static inline uint16_t driver_ring_look_packed(struct driver_ring *r)
{
    while (r->seen < driver_ring_in_flight(r)) {
        uint16_t flags = __atomic_load_n(&r->slot[r->unknown.at].flags, __ATOMIC_ACQUIRE);
        uint16_t used = r->unknown.wrap ? DRIVER_AVAIL | DRIVER_USED : 0, told = 1;
        if ((flags & (DRIVER_AVAIL | DRIVER_USED)) != used)
            break;
        if (r->offered)
            told = driver_ring_told(r, driver_ring_slot_at(r, r->unknown.at),
                                    (uint16_t)(driver_ring_in_flight(r) - r->seen));
        r->unknown = driver_place_after(r, r->unknown, (uint32_t)told * r->chain);
        r->seen = (uint16_t)(r->seen + told);
    }
    return r->seen;
}

/* An index beyond what is in flight is the caller's to refuse. */
static inline uint16_t driver_ring_look_split(struct driver_ring *r)
{
    uint16_t pending = (uint16_t)(__atomic_load_n(&r->used[1], __ATOMIC_ACQUIRE) - r->used_idx);

    if (!r->offered || unlikely(pending > driver_ring_in_flight(r)))
        return pending;
    while (r->seen < pending) {
        struct vring_used_elem elem = driver_ring_elem_at(r, (uint16_t)(r->used_idx + r->seen));
        uint16_t most = (uint16_t)(pending - r->seen);
        r->seen = (uint16_t)(r->seen + driver_ring_told(r, elem, most));
    }
    return pending;
}

/* How many elements wait on the used ring. */
static inline uint16_t driver_ring_pending(struct driver_ring *r)
{
    return r->slot ? driver_ring_look_packed(r) : driver_ring_look_split(r);
}

/* The place of a chain that is used, or will be, by its used index. */
static inline struct driver_place driver_ring_place(const struct driver_ring *r, uint16_t idx)
{
    return driver_place_after(r, r->take, (uint32_t)(uint16_t)(idx - r->used_idx) * r->chain);
}

/* What is told of a chain that waits: its head, or OUT_OF_ORDER, and what was written to it. */
static inline struct vring_used_elem driver_ring_elem(const struct driver_ring *r, uint16_t idx)
{
    if (r->offered) {
        const struct driver_chain *c = &r->offered[idx & (r->size - 1)];
        return (struct vring_used_elem){.id = c->head, .len = c->len};
    }
    if (r->slot)
        return driver_ring_slot_at(r, driver_ring_place(r, idx).at);
    return driver_ring_elem_at(r, idx);
}

/* The next element was taken. */
static inline void driver_ring_next(struct driver_ring *r)
{
    if (r->slot)
        r->take = driver_place_after(r, r->take, r->chain);
    if (r->slot || r->offered)
        r->seen--;
    r->used_idx++;
}

static inline void driver_ring_wish(struct driver_ring *r, uint32_t wish)
{
    if (r->wish == wish)
        return;
    r->wish = wish;
    __atomic_store_n(r->driver_event, wish, __ATOMIC_RELAXED);
}

static inline uint16_t *driver_ring_used_event(struct driver_ring *r)
{
    return &r->avail[2 + r->size];
}

/* Asks for a call when the device's used index moves past `seen`. */
static inline void driver_ring_arm(struct driver_ring *r, uint16_t seen)
{
    if (r->slot) {
        struct driver_place p = driver_ring_place(r, seen);
        uint32_t desc = (uint32_t)VRING_PACKED_EVENT_FLAG_DESC << 16;
        driver_ring_wish(r, r->event_idx ? desc | (uint32_t)p.wrap << 15 | p.at : 0);
    } else if (r->event_idx)
        __atomic_store_n(driver_ring_used_event(r), seen, __ATOMIC_RELAXED);
    else
        __atomic_store_n(&r->avail[0], 0, __ATOMIC_RELAXED);
}

/* Asks for no calls.  With EVENT_IDX that means an event index that is far off, and it has to be
 * kept far. */
static inline void driver_ring_disarm(struct driver_ring *r)
{
    if (r->slot) {
        driver_ring_wish(r, (uint32_t)VRING_PACKED_EVENT_FLAG_DISABLE << 16);
    } else if (!r->event_idx) {
        if (!__atomic_load_n(&r->avail[0], __ATOMIC_RELAXED))
            __atomic_store_n(&r->avail[0], VRING_AVAIL_F_NO_INTERRUPT, __ATOMIC_RELAXED);
    } else if ((uint16_t)(*driver_ring_used_event(r) - r->used_idx) < 0x4000) {
        __atomic_store_n(driver_ring_used_event(r), (uint16_t)(r->used_idx + 0x8000),
                         __ATOMIC_RELAXED);
    }
}

#endif
