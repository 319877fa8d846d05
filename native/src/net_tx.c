/*
 * Transmit: guest to tap.
 *
 * One chain is one frame behind its virtio-net header, in whatever pieces the driver likes.  It
 * goes to the tap by writev straight from guest memory, and its head back to the guest at once:
 * the kernel has taken its copy.
 *
 * A tap that cannot take a frame now (EAGAIN: someone set a small send buffer; ENOBUFS) is
 * treated like a network card with a full queue: the frame is dropped and counted.  Waiting
 * instead would make the slowest receiver behind the tap hold up all that the guest sends.
 */
#include "net.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct net_tx {
    int tap;
    uint32_t header_len;
    char flat[NET_HEADER_MAX + NET_FRAME_MAX]; /* frames in more pieces than writev takes */
};

int net_tx_open(struct vhost_queue *q, int tap)
{
    struct net_tx *tx = malloc(sizeof(*tx));

    if (!tx)
        return -ENOMEM;
    tx->tap = tap;
    tx->header_len = net_header_len(q->features);
    q->state = tx;
    return 0;
}

void net_tx_close(struct vhost_queue *q)
{
    free(q->state);
    q->state = NULL;
}

static ssize_t write_frame(struct net_tx *tx, const struct chain *c)
{
    if (likely(c->readable <= UIO_MAXIOV))
        return writev(tx->tap, c->iov, (int)c->readable);

    struct iovec flat = {.iov_base = tx->flat};
    for (uint32_t i = 0; i < c->readable; i++) {
        memcpy(tx->flat + flat.iov_len, c->iov[i].iov_base, c->iov[i].iov_len);
        flat.iov_len += c->iov[i].iov_len;
    }
    return writev(tx->tap, &flat, 1);
}

static void send_chain(struct vhost_queue *q, const struct chain *c)
{
    struct net_tx *tx = q->state;

    /* A disabled ring is served, but what it sends goes nowhere (vhost-user, "Ring states"). */
    if (unlikely(!q->enabled)) {
        count(q, VHOST_COUNTER_DROPS_DISABLED, 1);
        return;
    }
    /* virtio 1.3, section 5.1.6.2: the header, then the frame, all of it readable. */
    if (unlikely(c->writable || c->readable_len <= tx->header_len)) {
        count(q, VHOST_COUNTER_DROPS_SHORT, 1);
        return;
    }
    if (unlikely(c->readable_len > tx->header_len + (uint64_t)NET_FRAME_MAX)) {
        count(q, VHOST_COUNTER_DROPS_REFUSED, 1);
        return;
    }
    if (likely(write_frame(tx, c) >= 0)) {
        count(q, VHOST_COUNTER_PACKETS, 1);
        count(q, VHOST_COUNTER_BYTES_WRITTEN, c->readable_len - tx->header_len);
        return;
    }
    count(q, VHOST_COUNTER_DROPS_REFUSED, 1);
    /* The chain was translated, so its memory can only have gone with the file behind it. */
    if (errno == EFAULT)
        queue_break(q, VHOST_FAULT_MEMORY);
}

bool net_tx_service(struct vhost_queue *q)
{
    struct chain chain;

    if (!queue_may_pop(q))
        return false;
    uint32_t n = ring_pending(q);
    if (n == 0)
        return false;
    count(q, VHOST_COUNTER_BATCHES, 1);
    if (n > NET_BATCH)
        n = NET_BATCH;
    while (n-- && !q->broken && ring_pop(q, &chain)) {
        send_chain(q, &chain);
        ring_push(q, chain.head, 0);
    }
    return true;
}
