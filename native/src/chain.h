/*
 * What the ring layouts share: a chain's buffers are checked, translated and gathered one by one,
 * out of the ring or out of an indirect table; and the driver is called.
 *
 * All that lies in guest memory may change at any time.  So each field is read once, with an
 * explicit load, into a local; the local is checked and used, and the field never looked at
 * again.  A fault of the guest breaks its ring (queue_break) and nothing else.
 */
#ifndef VHOST_CHAIN_H
#define VHOST_CHAIN_H

#include "internal.h"
#include <sys/eventfd.h>

static inline uint16_t load16(const uint16_t *p, int order)
{
    return __atomic_load_n(p, order);
}

/* A descriptor of either layout: an address, a length, and 32 bits that differ. */
struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t low, high; /* split: flags and next; packed: id and flags */
};

/* One read of a descriptor, which the guest may be rewriting, and which may lie unaligned. */
static inline struct desc desc_read(const void *d)
{
    struct raw {
        uint64_t addr, rest;
    } __attribute__((packed, may_alias));
    const volatile struct raw *raw = d;
    uint64_t rest = raw->rest;

    return (struct desc){
        .addr = raw->addr,
        .len = (uint32_t)rest,
        .low = (uint16_t)(rest >> 32),
        .high = (uint16_t)(rest >> 48),
    };
}

/* The first buffers of a chain, which are in q->iov. */
struct gathered {
    uint64_t len, readable_len;
    uint32_t iovs, readable;
    bool writable; /* from now on; what was readable is counted */
};

/* Adds a buffer that does not lie in one region: over adjacent ones it becomes several iovecs.
 * Returns how many there are now, or a fault as a negative number.  Kept out of the walk, which
 * then has its counts in registers. */
int chain_add_split(struct vhost_queue *q, uint64_t addr, uint32_t len, uint32_t iovs);

/* Translates a buffer whole.  Returns as chain_add_split does. */
static inline int chain_translate(struct vhost_queue *q, uint64_t addr, uint32_t len, uint32_t iovs)
{
    struct vhost_region *r = memory_find(q->memory, addr, &q->memory_hint);

    if (unlikely(!r || iovs == q->iov_max || len > r->size - (addr - r->guest_addr)))
        return chain_add_split(q, addr, len, iovs);
    q->iov[iovs].iov_base = r->host + (addr - r->guest_addr);
    q->iov[iovs].iov_len = len;
    return (int)iovs + 1;
}

/* What a walk looks for buffers in.  It is known where a walk is compiled: the one in a view has to
 * tell what a buffer is for, and that costs the other one registers. */
enum walk { WALK_MEMORY, WALK_VIEW };

/* Adds the buffer that a descriptor names (virtio 1.3, sections 2.7.4.2 and 2.8.8). */
static inline enum vhost_fault chain_add(struct vhost_queue *q, struct gathered *g, uint64_t addr,
                                         uint32_t len, bool writable, enum walk walk)
{
    if (unlikely(len == 0))
        return VHOST_FAULT_LENGTH;
    if (writable != g->writable) {
        if (unlikely(!writable))
            return VHOST_FAULT_ORDER;
        g->readable = g->iovs;
        g->readable_len = g->len;
        g->writable = true;
    }
    g->len += len;
    int now = walk == WALK_VIEW ? view_add(q, addr, len, g->iovs, writable)
                                : chain_translate(q, addr, len, g->iovs);
    if (unlikely(now < 0))
        return (enum vhost_fault) - now;
    g->iovs = (uint32_t)now;
    return VHOST_FAULT_NONE;
}

/* So many buffers were added, and that is all. */
static inline enum vhost_fault chain_end(struct vhost_queue *q, const struct gathered *g,
                                         uint32_t buffers, struct chain *c)
{
    /* The used length has 32 bits (section 2.7.5.2 forbids longer chains). */
    if (unlikely(g->len > UINT32_MAX))
        return VHOST_FAULT_LENGTH;
    c->iov = q->iov;
    c->readable = g->writable ? g->readable : g->iovs;
    c->writable = g->iovs - c->readable;
    c->readable_len = g->writable ? g->readable_len : g->len;
    c->writable_len = g->len - c->readable_len;
    c->splits = g->iovs - buffers;
    return VHOST_FAULT_NONE;
}

/* The copy of an indirect table that straddles regions, in q->table; NULL: not in memory. */
const void *chain_copy_table(struct vhost_queue *q, uint64_t addr, uint32_t len);

/* The host address of an indirect table, or NULL. */
static inline const void *chain_table(struct vhost_queue *q, uint64_t addr, uint32_t len,
                                      enum walk walk)
{
    if (walk == WALK_VIEW)
        return view_table(q, addr, len);
    const struct vhost_region *whole = memory_find(q->memory, addr, &q->memory_hint);

    if (likely(whole && len <= whole->size - (addr - whole->guest_addr)))
        return whole->host + (addr - whole->guest_addr);
    return chain_copy_table(q, addr, len);
}

/* The walk cannot go on. */
static inline void chain_fail(struct vhost_queue *q, enum vhost_fault fault, enum walk walk)
{
    if (walk == WALK_VIEW && q->lacks)
        queue_wait_for_view(q);
    else
        queue_break(q, fault);
}

/* An eventfd whose counter is full would block us: its owner does not look, so skip the call. */
bool call_would_block(const struct vhost_queue *q);

/* Calls the driver, which wants it or not. */
static inline void ring_call(struct vhost_queue *q, bool wanted)
{
    if (!wanted) {
        count(q, VHOST_COUNTER_CALLS_SUPPRESSED, 1);
        return;
    }
    if (unlikely(q->call_blocks) && call_would_block(q))
        return;
    eventfd_write(q->call_fd, 1);
    count(q, VHOST_COUNTER_CALLS, 1);
}

/* What tells the driver of chains was written to its ring: logged at `base`, where there is a log
 * for the ring.  See log.c for the order. */
static inline void ring_log(struct vhost_queue *q, uint64_t base, uint64_t offset, uint64_t len)
{
    if (q->log_used == UINT64_MAX)
        return;
    if (q->memory->behind)
        view_log(q, base + offset, len);
    else
        log_mark(q, base + offset, len);
}

#endif
