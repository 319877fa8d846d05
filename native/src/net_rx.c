/*
 * Receive: tap to guest.
 *
 * The length of the next frame is not known before it is read, and it must be read straight into
 * the guest's buffers.  So the queue keeps a window: buffers popped ahead, enough for the longest
 * frame where buffers can be merged (one buffer where they cannot), their iovecs in one row, and
 * at the row's end `spill`, memory of our own.  One readv per frame fills the row.
 *
 *   buffers popped:   [ A ][ B ][ C ][ D ]     row:  A B C D spill
 *   a frame in A, B:  A and B go to the used ring, C and D stay for the next one
 *
 * What a frame could not fit ends up in `spill`.  If the window can still grow, the frame is held
 * until the guest has made more buffers available and then finished from there; a guest that is
 * behind with its buffers loses nothing that the tap's own queue would not have lost.  If the
 * window cannot grow, the frame is dropped and its buffers returned with length 0: the guest
 * never sees a part of a frame.
 *
 * When the queue stops or is disabled, the window is un-popped, newest first.  To make that
 * possible a useless buffer (readable, or smaller than a header) keeps its place in the window
 * and is returned when its turn comes.
 *
 * The tap wakes the iothread by an edge-triggered watch, so a tap that is full while the guest has
 * no buffers costs nothing; the guest's kicks are wanted then and only then.
 */
#include "net.h"
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

enum {
    WINDOW_IOVS = UIO_MAXIOV - 1, /* and spill */
    WINDOW_BUFFERS = WINDOW_IOVS,
};

struct rx_buffer {
    uint32_t len; /* 0: of no use */
    uint16_t iovs;
    uint16_t head;
};

struct net_rx {
    struct watch watch;
    struct vhost_queue *q;
    bool watching;
    bool mergeable;
    bool full; /* the window cannot grow although the ring may hold more */
    uint32_t header_len;

    /* The window; both rows slide through arrays of twice their length. */
    uint32_t first_buffer, num_buffers;
    uint32_t first_iov, num_iovs;
    uint64_t room; /* bytes */

    /* A frame that waits for more buffers: its length with the header, 0 = none.  It fills the
     * first held_iovs of the window, and its rest lies in spill. */
    uint32_t held, held_iovs;

    struct rx_buffer buffer[2 * WINDOW_BUFFERS];
    struct iovec iov[2 * WINDOW_IOVS + 1];
    char spill[NET_HEADER_MAX + NET_FRAME_MAX];
};

static void on_tap_ready(struct watch *watch)
{
    struct net_rx *rx = container_of(watch, struct net_rx, watch);

    iothread_schedule(rx->q);
}

int net_rx_open(struct vhost_queue *q, int tap)
{
    struct net_rx *rx = malloc(sizeof(*rx));

    if (!rx)
        return -ENOMEM;
    memset(rx, 0, offsetof(struct net_rx, buffer));
    rx->watch = (struct watch){.ready = on_tap_ready, .fd = tap};
    rx->q = q;
    rx->mergeable = has_bit(q->features, VIRTIO_NET_F_MRG_RXBUF);
    rx->header_len = net_header_len(q->features);
    q->state = rx;
    return 0;
}

void net_rx_close(struct vhost_queue *q)
{
    free(q->state);
    q->state = NULL;
}

/* ---- the window ---- */

static void window_shift(struct net_rx *rx, uint32_t buffers)
{
    for (uint32_t i = 0; i < buffers; i++) {
        struct rx_buffer *b = &rx->buffer[rx->first_buffer + i];
        rx->first_iov += b->iovs;
        rx->num_iovs -= b->iovs;
        rx->room -= b->len;
    }
    rx->first_buffer += buffers;
    rx->num_buffers -= buffers;
    rx->full = false;
    if (rx->num_buffers == 0)
        rx->first_buffer = rx->first_iov = 0;
}

/* Returns the useless buffers that lead the window. */
static void window_trim(struct vhost_queue *q, struct net_rx *rx)
{
    uint32_t n = 0;

    while (n < rx->num_buffers && rx->buffer[rx->first_buffer + n].len == 0)
        ring_push(q, rx->buffer[rx->first_buffer + n++].head, 0);
    if (n)
        window_shift(rx, n);
}

/* Makes room behind both rows for one more buffer of `iovs` pieces. */
static bool window_reserve(struct net_rx *rx, uint32_t iovs)
{
    if (rx->num_buffers == WINDOW_BUFFERS || rx->num_iovs + iovs > WINDOW_IOVS)
        return false;
    if (rx->first_buffer + rx->num_buffers == ARRAY_SIZE(rx->buffer)) {
        memmove(rx->buffer, rx->buffer + rx->first_buffer, rx->num_buffers * sizeof(*rx->buffer));
        rx->first_buffer = 0;
    }
    if (rx->first_iov + rx->num_iovs + iovs > 2 * WINDOW_IOVS) {
        memmove(rx->iov, rx->iov + rx->first_iov, rx->num_iovs * sizeof(*rx->iov));
        rx->first_iov = 0;
    }
    return true;
}

/* How many bytes the window is to hold before the next frame is read. */
static bool window_wants_more(const struct net_rx *rx)
{
    if (rx->full)
        return false;
    return rx->mergeable ? rx->room < rx->header_len + (uint64_t)NET_FRAME_MAX : rx->room == 0;
}

/* Pops buffers until the window holds any frame or the ring is empty.  False: the ring broke. */
static bool window_fill(struct vhost_queue *q, struct net_rx *rx)
{
    struct chain c;

    if (!window_wants_more(rx))
        return true;
    for (uint32_t pending = ring_pending(q); pending && window_wants_more(rx); pending--) {
        if (!ring_pop(q, &c))
            break;
        /* virtio 1.3, section 5.1.6.3: writable, and room for the header at least; a buffer that
         * cannot be merged must have room for a frame as well. */
        bool useless = c.readable || c.writable > WINDOW_IOVS ||
                       c.writable_len < rx->header_len + (rx->mergeable ? 0u : 1u);
        uint32_t iovs = useless ? 0 : c.writable;
        if (!window_reserve(rx, iovs)) {
            ring_unpop(q, c.head);
            rx->full = true;
            break;
        }
        rx->buffer[rx->first_buffer + rx->num_buffers++] = (struct rx_buffer){
            .len = useless ? 0 : (uint32_t)c.writable_len, .iovs = (uint16_t)iovs, .head = c.head};
        memcpy(rx->iov + rx->first_iov + rx->num_iovs, c.iov, iovs * sizeof(*rx->iov));
        rx->num_iovs += iovs;
        if (useless) {
            count(q, VHOST_COUNTER_DROPS_SHORT, 1);
            window_trim(q, rx);
        } else {
            rx->room += c.writable_len;
        }
    }
    /* With the whole ring in the window no more can come. */
    if (rx->num_buffers == q->ring.size)
        rx->full = true;
    return !q->broken;
}

/* ---- frames ---- */

/* The window cannot hold the frame that was read. */
static void drop_frame(struct vhost_queue *q, struct net_rx *rx)
{
    if (unlikely(q->log))
        log_written(q, &rx->iov[rx->first_iov], rx->num_iovs, rx->room);
    count(q, VHOST_COUNTER_DROPS_NOBUF, 1);
    for (uint32_t i = 0; i < rx->num_buffers; i++)
        ring_push(q, rx->buffer[rx->first_buffer + i].head, 0);
    window_shift(rx, rx->num_buffers);
    rx->held = 0;
}

/* The header was written by the tap, but for num_buffers (virtio 1.3, section 5.1.6.4). */
static void put_num_buffers(struct vhost_queue *q, struct net_rx *rx, uint16_t n)
{
    size_t at = offsetof(struct virtio_net_hdr, num_buffers);
    const struct iovec *iov = &rx->iov[rx->first_iov];
    uint16_t value = has_bit(q->features, VIRTIO_F_VERSION_1) ? htole16(n) : n;
    const char *bytes = (const char *)&value;

    for (size_t i = 0; i < sizeof(value); i++, at++) {
        while (at >= iov->iov_len)
            at -= (iov++)->iov_len;
        ((char *)iov->iov_base)[at] = bytes[i];
    }
}

/* A frame of `len` bytes with its header lies whole at the window's start: to the guest with it. */
static void deliver_frame(struct vhost_queue *q, struct net_rx *rx, uint32_t len)
{
    const struct rx_buffer *b = &rx->buffer[rx->first_buffer];
    uint32_t n = 0, useful = 0;

    for (uint32_t left = len; left; n++) {
        left -= b[n].len < left ? b[n].len : left;
        useful += b[n].len != 0;
    }
    if (rx->header_len == sizeof(struct virtio_net_hdr))
        put_num_buffers(q, rx, (uint16_t)useful);
    if (unlikely(q->log))
        log_written(q, &rx->iov[rx->first_iov], rx->num_iovs, len);
    count(q, VHOST_COUNTER_PACKETS, 1);
    count(q, VHOST_COUNTER_BYTES_READ, len - rx->header_len);

    /* The buffers of one frame follow each other in the used ring: the useless go before. */
    for (uint32_t i = 0; i < n && useful != n; i++) {
        if (b[i].len == 0)
            ring_push(q, b[i].head, 0);
    }
    for (uint32_t i = 0; i < n; i++) {
        if (b[i].len == 0)
            continue;
        uint32_t part = b[i].len < len ? b[i].len : len;
        ring_push(q, b[i].head, part);
        len -= part;
    }
    rx->held = 0;
    window_shift(rx, n);
    window_trim(q, rx);
}

/* The window has grown enough: the rest of the held frame goes where it would have gone. */
static void finish_held(struct vhost_queue *q, struct net_rx *rx)
{
    const struct iovec *iov = &rx->iov[rx->first_iov];
    uint32_t left = rx->held;

    for (uint32_t i = 0; i < rx->held_iovs; i++)
        left -= (uint32_t)iov[i].iov_len;
    iov += rx->held_iovs;
    for (const char *from = rx->spill; left; iov++) {
        uint32_t part = iov->iov_len < left ? (uint32_t)iov->iov_len : left;
        memcpy(iov->iov_base, from, part);
        from += part;
        left -= part;
    }
    deliver_frame(q, rx, rx->held);
}

/* Reads one frame into the window.  False: there is none. */
static bool read_frame(struct vhost_queue *q, struct net_rx *rx)
{
    struct iovec *iov = &rx->iov[rx->first_iov];

    iov[rx->num_iovs] = (struct iovec){.iov_base = rx->spill, .iov_len = sizeof(rx->spill)};
    ssize_t len = readv(rx->watch.fd, iov, (int)rx->num_iovs + 1);
    if (unlikely(len < 0)) {
        /* The buffers were translated: their memory can only have gone with the file behind it. */
        if (errno == EFAULT)
            queue_break(q, VHOST_FAULT_MEMORY);
        return false;
    }
    if (unlikely(len < (ssize_t)rx->header_len))
        return false; /* no tap does that */
    if (likely((uint64_t)len <= rx->room)) {
        deliver_frame(q, rx, (uint32_t)len);
    } else if (!rx->mergeable || (uint64_t)len == rx->room + sizeof(rx->spill)) {
        drop_frame(q, rx); /* with spill full too, the frame may have been longer still */
    } else {
        rx->held = (uint32_t)len;
        rx->held_iovs = rx->num_iovs;
    }
    return true;
}

/* ---- the queue ---- */

static void watch_tap(struct vhost_queue *q, struct net_rx *rx, bool on)
{
    if (rx->watching == on)
        return;
    rx->watching = on;
    iothread_watch(q->thread, &rx->watch, on ? EPOLLIN | EPOLLET : 0);
}

bool net_rx_service(struct vhost_queue *q)
{
    struct net_rx *rx = q->state;
    bool progress = false;

    if (!queue_may_pop(q))
        return false;
    /* A tap queue that is detached while its ring is disabled must be watched anew after it. */
    watch_tap(q, rx, q->enabled);
    q->no_kicks = true;
    if (!q->enabled)
        return false;
    for (int i = 0; i < NET_BATCH; i++) {
        if (!window_fill(q, rx))
            return true;
        if (rx->num_buffers == 0 || (rx->held > rx->room && !rx->full)) {
            q->no_kicks = false;
            break;
        }
        if (rx->held > rx->room) {
            drop_frame(q, rx);
        } else if (rx->held) {
            finish_held(q, rx);
        } else if (!read_frame(q, rx)) {
            break;
        }
        progress = true;
    }
    if (progress)
        count(q, VHOST_COUNTER_BATCHES, 1);
    return progress;
}

void net_rx_quiesce(struct vhost_queue *q)
{
    struct net_rx *rx = q->state;

    if (rx->held) {
        /* A part of it lies in buffers that the guest still has available. */
        if (unlikely(q->log))
            log_written(q, &rx->iov[rx->first_iov], rx->held_iovs, rx->held);
        count(q, VHOST_COUNTER_DROPS_NOBUF, 1);
    }
    rx->held = 0;
    while (rx->num_buffers)
        ring_unpop(q, rx->buffer[rx->first_buffer + --rx->num_buffers].head);
    rx->first_buffer = rx->first_iov = rx->num_iovs = 0;
    rx->room = 0;
    rx->full = false;
}

void net_rx_detach(struct vhost_queue *q)
{
    watch_tap(q, q->state, false);
}
