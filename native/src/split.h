/*
 * What is done for every chain of a split ring (virtio 1.3, section 2.7), by ring_split.c and, with
 * what it adds, by inflight_split.c.
 */
#ifndef VHOST_SPLIT_H
#define VHOST_SPLIT_H

#include "chain.h"

/* Walks the chain from `head` into q->iov (virtio 1.3, sections 2.7.5.3 and 2.7.17). */
static inline enum vhost_fault split_walk(struct vhost_queue *q, uint16_t head, struct chain *c,
                                          enum walk walk)
{
    const struct vring_desc *table = q->ring.desc;
    uint32_t table_len = q->ring.size, limit = q->ring.size;
    uint32_t i = head, seen = 0;
    struct gathered g = {0};
    bool nested = false;

    for (;;) {
        struct desc d = desc_read(&table[i]);
        uint16_t flags = d.low, next = d.high;

        if (flags & VRING_DESC_F_INDIRECT) {
            if (!q->ring.indirect || nested || (flags & VRING_DESC_F_NEXT) || d.len == 0 ||
                d.len % sizeof(struct vring_desc))
                return VHOST_FAULT_INDIRECT;
            table = chain_table(q, d.addr, d.len, walk);
            if (!table)
                return VHOST_FAULT_ADDRESS;
            table_len = d.len / sizeof(struct vring_desc);
            limit = q->chain_max;
            nested = true;
            i = 0;
            continue;
        }
        if (unlikely(++seen > limit))
            return VHOST_FAULT_CHAIN_LENGTH;
        enum vhost_fault fault = chain_add(q, &g, d.addr, d.len, flags & VRING_DESC_F_WRITE, walk);
        if (unlikely(fault))
            return fault;
        if (!(flags & VRING_DESC_F_NEXT))
            break;
        if (unlikely(next >= table_len))
            return VHOST_FAULT_NEXT_RANGE;
        i = next;
    }
    c->head = head;
    return chain_end(q, &g, seen, c);
}

static inline bool split_take(struct vhost_queue *q, struct chain *chain, enum walk walk)
{
    struct ring *r = &q->ring;
    uint16_t size = r->size;
    uint16_t head = load16(&r->heads[r->next_avail & (size - 1u)], __ATOMIC_RELAXED);
    enum vhost_fault fault;

    if (unlikely(head >= size)) {
        fault = VHOST_FAULT_HEAD_RANGE;
    } else if (unlikely(has_bit(q->busy[head / 64], head % 64))) {
        fault = VHOST_FAULT_HEAD_BUSY;
    } else {
        fault = split_walk(q, head, chain, walk);
    }
    if (unlikely(fault)) {
        chain_fail(q, fault, walk);
        return false;
    }
    q->busy[head / 64] |= UINT64_C(1) << (head % 64);
    q->in_flight++;
    r->next_avail++;
    return true;
}

static inline void split_idle(struct vhost_queue *q, uint16_t head)
{
    q->busy[head / 64] &= ~(UINT64_C(1) << (head % 64));
}

static inline void split_push(struct vhost_queue *q, uint16_t head, uint32_t len)
{
    struct ring *r = &q->ring;
    struct vring_used_elem *e = &r->used_ring[r->used_idx & (r->size - 1u)];

    e->id = head;
    e->len = len;
    r->used_idx++;
    q->in_flight--;
    split_idle(q, head);
    if (!q->dirty)
        iothread_mark_dirty(q);
}

#endif
