/*
 * VIRTIO_F_IN_ORDER (virtio 1.3, sections 2.7.9 and 2.8.9): chains are used in the order in which
 * they were made available, whatever the order in which the device completes them.
 *
 * So what completes early is held back, still in flight for everybody else: a drain waits for it,
 * and if we are killed it is done once more.
 *
 * One used descriptor may tell of a whole batch: it has the id of the last chain, and stands where
 * the first would be.  It cannot tell the others' lengths, so only chains are told of in that way
 * into which the device could write nothing.  Split rings do without: an element is 8 bytes beside
 * the last one, and there are drivers that read each (DPDK's, of its own accord).
 */
#include "internal.h"
#include <errno.h>
#include <stdlib.h>

/* A chain in flight. */
struct ordered {
    uint16_t head;
    bool done, writable;
    uint32_t len; /* if done */
};

struct order {
    struct ring_layout inner; /* what stands behind this */
    bool open;                /* the chain given back last may be told of by the next one */
    uint32_t mask;
    uint32_t first, end;    /* chains in flight, counted on */
    uint32_t *at;           /* where they are, by their heads */
    struct ordered chain[]; /* by their count, modulo */
};

static bool order_pop(struct vhost_queue *q, struct chain *chain)
{
    struct order *o = q->order;

    if (!o->inner.pop(q, chain))
        return false;
    o->at[chain->head] = o->end;
    o->chain[o->end++ & o->mask] =
        (struct ordered){.head = chain->head, .writable = chain->writable_len};
    return true;
}

static void order_unpop(struct vhost_queue *q, uint16_t head)
{
    q->order->end--;
    q->order->inner.unpop(q, head);
}

static void give_back(struct vhost_queue *q, const struct ordered *c)
{
    struct order *o = q->order;

    if (o->open && o->inner.join)
        o->inner.join(q, c->head, c->len);
    else
        o->inner.push(q, c->head, c->len);
    o->open = !c->writable;
}

static void order_push(struct vhost_queue *q, uint16_t head, uint32_t len)
{
    struct order *o = q->order;
    struct ordered *c = &o->chain[o->at[head] & o->mask];

    c->done = true;
    c->len = len;
    for (; o->first != o->end && o->chain[o->first & o->mask].done; o->first++)
        give_back(q, &o->chain[o->first & o->mask]);
}

static void order_show(struct vhost_queue *q)
{
    q->order->open = false;
    q->order->inner.show(q);
}

static void order_publish(struct vhost_queue *q)
{
    q->order->open = false;
    q->order->inner.publish(q);
}

int order_open(struct vhost_queue *q)
{
    uint32_t room = 1;

    while (room < q->ring.size)
        room *= 2;
    struct order *o = calloc(1, sizeof(*o) + room * sizeof(o->chain[0]));
    if (!o)
        return -ENOMEM;
    q->order = o; /* and so order_close will free it */
    o->mask = room - 1;
    o->at = calloc(q->ring.size, sizeof(*o->at));
    if (!o->at)
        return -ENOMEM;
    o->inner = q->ring.layout;
    q->ring.layout.pop = order_pop;
    q->ring.layout.unpop = order_unpop;
    q->ring.layout.push = order_push;
    q->ring.layout.show = order_show;
    q->ring.layout.publish = order_publish;
    return 0;
}

void order_close(struct vhost_queue *q)
{
    if (q->order)
        free(q->order->at);
    free(q->order);
}
