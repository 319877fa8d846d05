/*
 * The packed half of the driver in driver_ring.h.
 *
 * Tests go on to write chains as a split ring has them, into a table that the device never sees;
 * what is offered is copied into the ring from there, with the head as the buffer id.  Entries of
 * indirect tables, which lie one after another, get their flags where a packed ring has them.
 *
 * With in_order, which is the test's to set, a used descriptor tells of all chains up to the one
 * that it names (virtio 1.3, section 2.8.9).
 */
#ifndef PACKED_DRIVER_H
#define PACKED_DRIVER_H

#include "harness.h"
#include <libvhost.h>

enum {
    PACKED_MAX = 1024,
    AVAIL = VRING_PACKED_DESC_F_AVAIL,
    USED = VRING_PACKED_DESC_F_USED,
    WRAP = 1 << 15, /* of indexes, beside their place */
};

/* A place in the ring, and the wrap counter of whoever is there. */
struct place {
    uint16_t idx;
    bool wrap;
};

struct packed_half {
    struct vring_packed_desc *slot;
    struct vring_packed_desc_event *driver_event, *device_event;
    uint16_t size;
    struct place fill, take;
    struct vring_packed_desc *first; /* of what was offered; its flags are written last */
    uint16_t first_flags;
    uint16_t length[PACKED_MAX]; /* of the chains in flight, by id */
    bool in_order;
    uint16_t offered[PACKED_MAX]; /* in order: ids, from the oldest in flight on... */
    uint16_t oldest, newest;      /* ...to the newest, counted on; size is a power of 2 */
    uint16_t told;                /* chains that are used and not taken, before `take` */
};

static inline struct place place_of(uint16_t index)
{
    return (struct place){.idx = index & (WRAP - 1), .wrap = index & WRAP};
}

static inline uint16_t index_of(struct place at)
{
    return (uint16_t)(at.idx | (at.wrap ? WRAP : 0));
}

static inline struct place place_after(struct place at, uint16_t n, uint16_t size)
{
    at.idx = (uint16_t)(at.idx + n);
    if (at.idx >= size) {
        at.idx = (uint16_t)(at.idx - size);
        at.wrap = !at.wrap;
    }
    return at;
}

/* From one place to a later one, less than two rounds away. */
static inline uint32_t packed_distance(const struct packed_half *p, struct place from,
                                       struct place to)
{
    uint32_t round = from.wrap == to.wrap ? 0 : p->size;

    return (to.idx + round + 2u * p->size - from.idx) % (2u * p->size);
}

static inline uint16_t available_bits(struct place at)
{
    return at.wrap ? AVAIL : USED;
}

/* An idle ring at this index: all was used, in this round or in the one before. */
static inline void packed_begin(struct packed_half *p, uint16_t index)
{
    p->fill = p->take = place_of(index);
    for (uint16_t i = 0; i < p->size; i++)
        p->slot[i].flags = (i < p->fill.idx) == p->fill.wrap ? AVAIL | USED : 0;
}

static inline bool packed_is_used(const struct packed_half *p, struct place at)
{
    uint16_t flags = __atomic_load_n(&p->slot[at.idx].flags, __ATOMIC_ACQUIRE);

    return (flags & (AVAIL | USED)) == (at.wrap ? AVAIL | USED : 0);
}

/* The next descriptor, whatever it says. */
static inline void packed_put(struct packed_half *p, uint64_t addr, uint32_t len, uint16_t id,
                              uint16_t flags)
{
    struct vring_packed_desc *d = &p->slot[p->fill.idx];

    flags |= available_bits(p->fill);
    d->addr = addr;
    d->len = len;
    d->id = id;
    if (p->first) {
        d->flags = flags;
    } else {
        p->first = d;
        p->first_flags = flags;
    }
    p->fill = place_after(p->fill, 1, p->size);
}

/* `table`: at the host address of the indirect table, if the chain has one. */
static inline void packed_offer(struct packed_half *p, const struct vring_desc *desc, uint16_t head,
                                struct vring_desc *table)
{
    uint16_t n = 0;

    CHECK(head < PACKED_MAX);
    for (uint16_t i = head;; i = desc[i].next) {
        packed_put(p, desc[i].addr, desc[i].len, head, desc[i].flags);
        n++;
        for (uint32_t k = 0; table && k < desc[i].len / sizeof(*table); k++)
            table[k].next = table[k].flags;
        if (!(desc[i].flags & VRING_DESC_F_NEXT))
            break;
    }
    p->length[head] = n;
    p->offered[p->newest++ & (p->size - 1)] = head;
}

static inline void packed_publish(struct packed_half *p)
{
    if (p->first)
        __atomic_store_n(&p->first->flags, p->first_flags, __ATOMIC_RELEASE);
    p->first = NULL;
}

/* How many chains a used descriptor tells of, which has this id; `told` are told of already.  Adds
 * the descriptors that they had. */
static inline uint16_t packed_tells(const struct packed_half *p, uint16_t told, uint16_t id,
                                    uint16_t *descs)
{
    uint16_t n = 0, oldest = (uint16_t)(p->oldest + told), next;

    CHECK(id < p->size && p->length[id]);
    if (!p->in_order) {
        *descs = (uint16_t)(*descs + p->length[id]);
        return 1;
    }
    do {
        CHECK((uint16_t)(oldest + n) != p->newest);
        next = p->offered[(uint16_t)(oldest + n++) & (p->size - 1)];
        *descs = (uint16_t)(*descs + p->length[next]);
    } while (next != id);
    return n;
}

/* How many chains wait to be taken. */
static inline uint16_t packed_used(const struct packed_half *p)
{
    struct place at = p->take;
    uint16_t n = p->told;

    while (n < p->size && packed_is_used(p, at)) {
        uint16_t descs = 0;
        n = (uint16_t)(n + packed_tells(p, n, p->slot[at.idx].id, &descs));
        at = place_after(at, descs, p->size);
    }
    return n;
}

/* In order the first of a batch has the length of the last. */
static inline struct vring_used_elem packed_take(struct packed_half *p)
{
    struct vring_used_elem e = {0};

    if (!p->told) {
        const struct vring_packed_desc *d = &p->slot[p->take.idx];
        uint16_t descs = 0;
        e = (struct vring_used_elem){.id = d->id, .len = d->len};
        CHECK_EQ(!(d->flags & VRING_DESC_F_WRITE), !e.len);
        p->told = packed_tells(p, 0, (uint16_t)e.id, &descs);
        p->take = place_after(p->take, descs, p->size);
    }
    if (p->in_order)
        e.id = p->offered[p->oldest & (p->size - 1)];
    p->told--;
    p->oldest++;
    p->length[e.id] = 0;
    return e;
}

#endif
