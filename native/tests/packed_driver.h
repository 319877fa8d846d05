/*
 * The packed half of the driver in driver_ring.h.
 *
 * Tests go on to write chains as a split ring has them, into a table that the device never sees;
 * what is offered is copied into the ring from there, with the head as the buffer id.  Entries of
 * indirect tables, which lie one after another, get their flags where a packed ring has them.
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
}

static inline void packed_publish(struct packed_half *p)
{
    if (p->first)
        __atomic_store_n(&p->first->flags, p->first_flags, __ATOMIC_RELEASE);
    p->first = NULL;
}

/* How many chains wait to be taken. */
static inline uint16_t packed_used(const struct packed_half *p)
{
    struct place at = p->take;
    uint16_t n = 0;

    for (; n < p->size && packed_is_used(p, at); n++) {
        uint16_t id = p->slot[at.idx].id;
        CHECK(id < p->size && p->length[id]);
        at = place_after(at, p->length[id], p->size);
    }
    return n;
}

static inline struct vring_used_elem packed_take(struct packed_half *p)
{
    const struct vring_packed_desc *d = &p->slot[p->take.idx];
    struct vring_used_elem e = {.id = d->id, .len = d->len};

    CHECK_EQ(!(d->flags & VRING_DESC_F_WRITE), !e.len);
    CHECK(e.id < p->size && p->length[e.id]);
    p->take = place_after(p->take, p->length[e.id], p->size);
    p->length[e.id] = 0;
    return e;
}

#endif
