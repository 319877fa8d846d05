/*
 * Places in a packed ring, what the flags of a descriptor there say, and what is done for every
 * chain (virtio 1.3, section 2.8): by ring_packed.c, which tells how such rings work, and, with
 * what it adds, by inflight_packed.c.
 */
#ifndef VHOST_PACKED_H
#define VHOST_PACKED_H

#include "chain.h"

enum {
    AVAIL = VRING_PACKED_DESC_F_AVAIL,
    USED = VRING_PACKED_DESC_F_USED,
    WRAP_BIT = 15, /* of indexes that have their counter with them */
    WRAP = 1 << WRAP_BIT,
};

/* Several fields of a structure that are written at once. */
typedef uint64_t __attribute__((may_alias)) word;

/* What is available in the round after this one. */
static inline uint16_t flip(uint16_t bits)
{
    return bits ^ (AVAIL | USED);
}

static inline void move(const struct ring *r, uint16_t *idx, uint16_t *bits, uint32_t n)
{
    uint32_t to = *idx + n;

    if (to >= r->size) {
        to -= r->size;
        *bits = flip(*bits);
    }
    *idx = (uint16_t)to;
}

static inline bool is_available(const struct vring_packed_desc *d, uint16_t bits)
{
    /* Acquire: the driver wrote the chain's first flags after all the rest of it. */
    return (load16(&d->flags, __ATOMIC_ACQUIRE) & (AVAIL | USED)) == bits;
}

static inline uint16_t avail_place(const struct ring *r)
{
    return r->next_avail | (r->avail_bits == AVAIL ? WRAP : 0);
}

static inline uint16_t used_place(const struct ring *r)
{
    return r->used_idx | (r->used_bits ? WRAP : 0);
}

/* The flags of what is available where the used bits are these. */
static inline uint16_t avail_bits_of(uint16_t used_bits)
{
    return used_bits ? AVAIL : USED;
}

/* ---- chains ---- */

/* Of an indirect table's entries only address, length and WRITE count (section 2.8.7). */
static inline enum vhost_fault packed_walk_table(struct vhost_queue *q, struct gathered *g,
                                                 uint64_t addr, uint32_t len, enum walk walk)
{
    uint32_t entries = len / sizeof(struct vring_packed_desc);

    if (!q->ring.indirect || len == 0 || len % sizeof(struct vring_packed_desc))
        return VHOST_FAULT_INDIRECT;
    if (unlikely(entries > q->chain_max))
        return VHOST_FAULT_CHAIN_LENGTH;
    const struct vring_packed_desc *table = chain_table(q, addr, len, walk);
    if (unlikely(!table))
        return VHOST_FAULT_ADDRESS;
    for (uint32_t i = 0; i < entries; i++) {
        struct desc d = desc_read(&table[i]);
        if (unlikely(d.high & VRING_DESC_F_INDIRECT))
            return VHOST_FAULT_INDIRECT;
        enum vhost_fault fault = chain_add(q, g, d.addr, d.len, d.high & VRING_DESC_F_WRITE, walk);
        if (unlikely(fault))
            return fault;
    }
    return VHOST_FAULT_NONE;
}

/* Where a chain's descriptors are noted while they are read: in entries of a list. */
struct notes {
    struct vhost_user_inflight_desc *desc;
    const uint16_t *next;
    uint16_t entry, last; /* the next one, and the one before it */
};

/* A descriptor has the same fields there in another order. */
static inline void note(struct notes *notes, struct desc d)
{
    struct vhost_user_inflight_desc *to = &notes->desc[notes->entry];
    uint64_t rest = d.len | (uint64_t)d.low << 32 | (uint64_t)d.high << 48;

    /* Its `next` is that of the list, which it must not leave for a moment. */
    *(word *)&to->id = rest << 32 | rest >> 32;
    to->addr = d.addr;
    notes->last = notes->entry;
    notes->entry = notes->next[notes->entry];
}

/* Of the two walks each has all in one function, which the compiler would divide to share parts. */
#define compiled_apart static inline __attribute__((always_inline))

/* Walks the chain at next_avail into q->iov; *len descriptors of the ring.  They are read once, so
 * that what is noted is what is served. */
compiled_apart enum vhost_fault packed_walk(struct vhost_queue *q, struct chain *c, uint16_t *len,
                                            enum walk walk, struct notes *notes)
{
    const struct ring *r = &q->ring;
    /* Nothing is the driver's to make available once more before it is shown. */
    uint32_t i = r->next_avail, seen = 0, room = r->size - r->taken;
    struct gathered g = {0};
    enum vhost_fault fault;
    uint16_t id, flags;

    do {
        if (unlikely(seen++ == room))
            return VHOST_FAULT_CHAIN_LENGTH;
        struct desc d = desc_read(&r->offered[i]);
        id = d.low;
        flags = d.high;
        if (notes)
            note(notes, d);
        if (flags & VRING_DESC_F_INDIRECT) {
            /* Section 2.8.19: not in a list. */
            if (unlikely(seen > 1 || (flags & VRING_DESC_F_NEXT)))
                return VHOST_FAULT_INDIRECT;
            fault = packed_walk_table(q, &g, d.addr, d.len, walk);
        } else {
            fault = chain_add(q, &g, d.addr, d.len, flags & VRING_DESC_F_WRITE, walk);
        }
        if (unlikely(fault))
            return fault;
        if (++i == r->size)
            i = 0;
    } while (flags & VRING_DESC_F_NEXT);
    if (unlikely(id >= r->size))
        return VHOST_FAULT_HEAD_RANGE;
    if (unlikely(q->lengths[id]))
        return VHOST_FAULT_HEAD_BUSY;
    *len = (uint16_t)seen;
    c->head = id;
    return chain_end(q, &g, seen, c);
}

/* notes: or NULL. */
compiled_apart bool packed_take(struct vhost_queue *q, struct chain *chain, enum walk walk,
                                struct notes *notes)
{
    struct ring *r = &q->ring;
    uint16_t len;

    if (!is_available(&r->offered[r->next_avail], r->avail_bits))
        return false;
    enum vhost_fault fault = packed_walk(q, chain, &len, walk, notes);
    if (unlikely(fault)) {
        chain_fail(q, fault, walk);
        return false;
    }
    q->lengths[chain->head] = len;
    r->taken += len;
    q->in_flight++;
    move(r, &r->next_avail, &r->avail_bits, len);
    return true;
}

/* The chain is no longer in flight; how many descriptors it had. */
static inline uint16_t packed_idle(struct vhost_queue *q, uint16_t id)
{
    uint16_t len = q->lengths[id];

    q->lengths[id] = 0;
    q->in_flight--;
    return len;
}

static inline void packed_push(struct vhost_queue *q, uint16_t id, uint32_t len)
{
    struct ring *r = &q->ring;

    r->unshown[r->num_unshown++] = (struct used){len, id, packed_idle(q, id)};
    if (!q->dirty)
        iothread_mark_dirty(q);
}

/* What is told of this chain tells of those before it, too, and stands where the first of them was.
 */
static inline void packed_join(struct vhost_queue *q, uint16_t id, uint32_t len)
{
    struct ring *r = &q->ring;
    struct used *before = &r->unshown[r->num_unshown - 1];
    uint16_t taken = (uint16_t)(before->taken + packed_idle(q, id));

    before->taken = 0;
    r->unshown[r->num_unshown++] = (struct used){len, id, taken};
}

#endif
