/* Frames out of a port: into the receive buffers of a card, or to a tap. */
#include "switch.h"
#include <endian.h>
#include <errno.h>
#include <unistd.h>

/* A receive buffer that a frame has begun to fill. */
struct filled {
    uint16_t head;
    uint32_t len;
};

enum { PREFIX_MAX = NET_HEADER_MAX + HEAD_MAX };

/* The bytes that a frame has in this port instead of those that were stripped. */
static uint32_t put_head(const struct switch_port *to, const struct frame *f, uint8_t *at)
{
    memcpy(at, f->mac, sizeof(f->mac));
    if (likely(to->set.vlan == f->vlan)) {
        memcpy(at + 12, f->type, 2);
        return ETH_HEADER;
    }
    uint16_t tag = f->priority | f->vlan;
    at[12] = ETHERTYPE_VLAN >> 8;
    at[13] = ETHERTYPE_VLAN & 0xff;
    at[14] = (uint8_t)(tag >> 8);
    at[15] = (uint8_t)tag;
    memcpy(at + 16, f->type, 2);
    return HEAD_MAX;
}

/* The virtio-net header for a driver of these features (virtio 1.3, section 5.1.6.4). */
static void put_vnet(uint64_t features, const struct frame *f, uint32_t head_len, uint8_t *at,
                     uint32_t header_len)
{
    struct virtio_net_hdr h = f->vnet;

    if (!has_bit(features, VIRTIO_NET_F_GUEST_CSUM))
        h.flags = 0;
    if (h.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) {
        /* A tag more or less: all that counts from the frame's start moves. */
        uint16_t moved = (uint16_t)(head_len - f->stripped);
        h.csum_start = (uint16_t)(h.csum_start + moved);
        h.hdr_len = h.gso_type ? (uint16_t)(h.hdr_len + moved) : 0;
    }
    h.num_buffers = 1;
    if (has_bit(features, VIRTIO_F_VERSION_1)) {
        h.hdr_len = htole16(h.hdr_len);
        h.gso_size = htole16(h.gso_size);
        h.csum_start = htole16(h.csum_start);
        h.csum_offset = htole16(h.csum_offset);
        h.num_buffers = htole16(h.num_buffers);
    }
    memcpy(at, &h, header_len);
}

/* ---- a card ---- */

/* What is still to be copied: first the prefix, then the rest of the frame. */
struct source {
    const char *at;
    size_t left; /* here */
    const struct iovec *next;
    uint32_t skip; /* bytes of the next piece */
};

static void copy_from(struct source *s, char *to, uint32_t len)
{
    for (;;) {
        uint32_t part = s->left < len ? (uint32_t)s->left : len;
        memcpy(to, s->at, part);
        s->at += part;
        s->left -= part;
        len -= part;
        if (len == 0)
            return;
        to += part;
        s->at = (const char *)s->next->iov_base + s->skip;
        s->left = s->next->iov_len - s->skip;
        s->skip = 0;
        s->next++;
    }
}

/* Fills the buffers of a chain with up to `len` bytes; returns how many. */
static uint32_t fill_chain(struct vhost_queue *q, const struct chain *c, struct source *s,
                           uint32_t len)
{
    const struct iovec *iov = c->iov;
    uint32_t filled = 0;

    if (len > c->writable_len)
        len = (uint32_t)c->writable_len;
    for (; filled < len; iov++) {
        uint32_t part = iov->iov_len < len - filled ? (uint32_t)iov->iov_len : len - filled;
        copy_from(s, iov->iov_base, part);
        filled += part;
    }
    if (unlikely(q->log))
        log_written(q, c->iov, c->writable, len);
    return len;
}

static bool pop_buffer(struct vhost_queue *q, struct switch_queue *state, struct chain *c)
{
    if (state->credit == 0)
        state->credit = ring_pending(q);
    if (state->credit == 0 || !ring_pop(q, c)) {
        state->credit = 0;
        return false;
    }
    state->credit--;
    return true;
}

/* The places of num_buffers in the first buffer, which may be in pieces. */
static void find_num_buffers(const struct chain *c, char *place[2])
{
    const struct iovec *iov = c->iov;
    size_t at = offsetof(struct virtio_net_hdr, num_buffers);

    for (int i = 0; i < 2; i++, at++) {
        while (at >= iov->iov_len)
            at -= (iov++)->iov_len;
        place[i] = (char *)iov->iov_base + at;
    }
}

/* Buffers of a frame that is not to be: they stay available, or, where that cannot be told any more
 * since others were used behind them, come back empty. */
static void give_back(struct vhost_queue *q, const struct filled *filled, uint32_t n, bool in_place)
{
    if (in_place) {
        struct switch_queue *state = q->state;
        state->credit += n;
        while (n)
            ring_unpop(q, filled[--n].head);
        return;
    }
    for (uint32_t i = 0; i < n; i++)
        ring_push(q, filled[i].head, 0);
}

/* Copies `len` bytes from `s` into buffers of the queue.  Returns a counter of a drop, or 0. */
static unsigned fill_buffers(struct vhost_queue *q, struct source *s, uint32_t len)
{
    struct switch_queue *state = q->state;
    struct filled filled[UIO_MAXIOV];
    char *num_buffers[2] = {0};
    uint32_t n = 0;
    bool in_place = true;
    struct chain c;

    while (len) {
        if (n == ARRAY_SIZE(filled) || !pop_buffer(q, state, &c)) {
            give_back(q, filled, n, in_place);
            return n == ARRAY_SIZE(filled) ? VHOST_SWITCH_DROP_NO_ROOM
                                           : VHOST_SWITCH_DROP_NO_BUFFER;
        }
        /* virtio 1.3, section 5.1.6.3: writable, and room for the header at least. */
        if (unlikely(c.readable || c.writable_len < state->header_len)) {
            count(q, VHOST_COUNTER_DROPS_SHORT, 1);
            ring_push(q, c.head, 0);
            in_place &= n == 0;
            continue;
        }
        if (unlikely(!state->mergeable && c.writable_len < len)) {
            filled[n++].head = c.head;
            give_back(q, filled, n, in_place);
            return VHOST_SWITCH_DROP_NO_ROOM;
        }
        if (n == 0 && c.writable_len < len)
            find_num_buffers(&c, num_buffers);
        uint32_t part = fill_chain(q, &c, s, len);
        filled[n++] = (struct filled){.head = c.head, .len = part};
        len -= part;
    }
    if (n > 1) {
        uint16_t value =
            has_bit(q->features, VIRTIO_F_VERSION_1) ? htole16((uint16_t)n) : (uint16_t)n;
        for (int i = 0; i < 2; i++)
            *num_buffers[i] = ((const char *)&value)[i];
    }
    for (uint32_t i = 0; i < n; i++)
        ring_push(q, filled[i].head, filled[i].len);
    return 0;
}

/* The queue that a frame goes to: of the pair that the sender used, if the driver uses that one. */
static struct vhost_queue *queue_for(const struct switch_port *to, const struct frame *f)
{
    struct vhost_queue *q = to->rx[to->num_pairs == 1 ? 0 : f->pair % to->num_pairs];

    if (likely(q && q->enabled && queue_may_pop(q)))
        return q;
    q = to->rx[0];
    return q && q->enabled && queue_may_pop(q) ? q : NULL;
}

static void put_card(struct switch_port *to, struct vhost_queue *q, const struct frame *f)
{
    const struct switch_queue *state = q->state;
    uint8_t prefix[PREFIX_MAX];
    uint32_t head_len = put_head(to, f, prefix + state->header_len);
    uint32_t len = head_len + f->len - f->stripped;

    put_vnet(q->features, f, head_len, prefix, state->header_len);
    struct source s = {
        .at = (const char *)prefix,
        .left = state->header_len + head_len,
        .next = f->iov,
        .skip = f->skip,
    };
    unsigned drop = fill_buffers(q, &s, state->header_len + len);
    if (unlikely(drop)) {
        port_count(to, drop, 1);
        count(q, VHOST_COUNTER_DROPS_NOBUF, 1);
        return;
    }
    port_count(to, VHOST_SWITCH_OUT_FRAMES, 1);
    port_count(to, VHOST_SWITCH_OUT_BYTES, len);
    count(q, VHOST_COUNTER_PACKETS, 1);
    count(q, VHOST_COUNTER_BYTES_READ, len);
}

/* ---- a tap ---- */

static void put_tap(struct switch_port *to, const struct frame *f)
{
    uint8_t prefix[PREFIX_MAX];
    struct iovec iov[1 + FRAME_PIECES] = {{.iov_base = prefix}};
    uint32_t head_len = put_head(to, f, prefix + NET_HEADER_MAX);
    uint64_t len = head_len + f->len - f->stripped;

    put_vnet(SWITCH_TAP_FEATURES, f, head_len, prefix, NET_HEADER_MAX);
    iov[0].iov_len = NET_HEADER_MAX + head_len;
    memcpy(iov + 1, f->iov, f->iovs * sizeof(*iov));
    if (f->iovs) {
        iov[1].iov_base = (char *)iov[1].iov_base + f->skip;
        iov[1].iov_len -= f->skip;
    }
    /* A tap that cannot take it now is a network card with a full queue, see net_tx.c. */
    if (writev(to->tap.fd, iov, (int)(1 + f->iovs)) < 0) {
        port_count(to, VHOST_SWITCH_DROP_NO_BUFFER, 1);
        return;
    }
    port_count(to, VHOST_SWITCH_OUT_FRAMES, 1);
    port_count(to, VHOST_SWITCH_OUT_BYTES, len);
}

/* ---- any port ---- */

/* Whether a driver of these features may be given the frame as it is (virtio 1.3, 5.1.6.4). */
static bool can_take(uint64_t features, const struct virtio_net_hdr *h)
{
    if (!(h->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM))
        return true;
    if (!has_bit(features, VIRTIO_NET_F_GUEST_CSUM))
        return false;
    if (h->gso_type & VIRTIO_NET_HDR_GSO_ECN && !has_bit(features, VIRTIO_NET_F_GUEST_ECN))
        return false;
    switch (h->gso_type & ~VIRTIO_NET_HDR_GSO_ECN) {
    case VIRTIO_NET_HDR_GSO_NONE:
        return true;
    case VIRTIO_NET_HDR_GSO_TCPV4:
        return has_bit(features, VIRTIO_NET_F_GUEST_TSO4);
    default:
        return has_bit(features, VIRTIO_NET_F_GUEST_TSO6);
    }
}

static inline bool is_open(const struct switch_port *to)
{
    return !port_is(to, VHOST_SWITCH_DOWN);
}

/* Its memory may have gone while we wrote: the pass looks at queues that it serves. */
static void look_for_faults(struct vhost_queue *q)
{
    if (unlikely(q->faults_seen != atomic_load_explicit(&memory_faults, memory_order_relaxed)))
        iothread_schedule(q);
}

void switch_put(struct switch_port *to, const struct frame *f)
{
    if (to->tap.fd >= 0 && is_open(to)) {
        put_tap(to, f);
        return;
    }
    struct vhost_queue *q = is_open(to) ? queue_for(to, f) : NULL;
    if (unlikely(!q)) {
        port_count(to, VHOST_SWITCH_DROP_NO_DRIVER, 1);
        return;
    }
    if (likely(can_take(q->features, &f->vnet)))
        put_card(to, q, f);
    else
        switch_finish(to, q, f);
    look_for_faults(q);
}

void switch_put_finished(struct switch_port *to, struct vhost_queue *q, const struct frame *f)
{
    port_count(to, VHOST_SWITCH_FINISHED, 1);
    put_card(to, q, f);
}

/* Puts the first of the frames that fit into one buffer in one piece each, as nearly all do;
 * returns how many.  Their buffers are on their way from the other core while the next is popped.
 */
static uint32_t put_simple(struct switch_port *to, struct vhost_queue *q, const struct frame *frame,
                           uint32_t n)
{
    struct switch_queue *state = q->state;
    const uint32_t header_len = state->header_len;
    char *buffer[NET_BATCH];
    uint16_t head[NET_BATCH];
    uint64_t bytes = 0;
    uint32_t k = 0;
    struct chain c;

    for (; k < n && can_take(q->features, &frame[k].vnet); k++) {
        uint32_t most = header_len + HEAD_MAX + frame[k].len - frame[k].stripped;
        if (!pop_buffer(q, state, &c))
            break;
        if (unlikely(c.readable || c.writable != 1 || c.writable_len < most)) {
            ring_unpop(q, c.head);
            state->credit++;
            break;
        }
        head[k] = c.head;
        buffer[k] = c.iov->iov_base;
        __builtin_prefetch(buffer[k], 1);
        __builtin_prefetch(buffer[k] + 64, 1);
    }
    for (uint32_t i = 0; i < k; i++) {
        const struct frame *f = &frame[i];
        uint8_t *at = (uint8_t *)buffer[i];
        uint32_t head_len = put_head(to, f, at + header_len), skip = f->skip;
        put_vnet(q->features, f, head_len, at, header_len);
        at += header_len + head_len;
        for (uint32_t piece = 0; piece < f->iovs; piece++, skip = 0) {
            size_t part = f->iov[piece].iov_len - skip;
            memcpy(at, (const char *)f->iov[piece].iov_base + skip, part);
            at += part;
        }
        uint32_t len = head_len + f->len - f->stripped;
        bytes += len;
        if (unlikely(q->log)) {
            struct iovec written = {.iov_base = buffer[i], .iov_len = header_len + len};
            log_written(q, &written, 1, written.iov_len);
        }
        ring_push(q, head[i], header_len + len);
    }
    port_count(to, VHOST_SWITCH_OUT_FRAMES, k);
    port_count(to, VHOST_SWITCH_OUT_BYTES, bytes);
    count(q, VHOST_COUNTER_PACKETS, k);
    count(q, VHOST_COUNTER_BYTES_READ, bytes);
    return k;
}

void switch_put_many(struct switch_port *to, const struct frame *frame, uint32_t n)
{
    struct vhost_queue *q;

    while (n) {
        uint32_t done = 0;
        if (likely(to->tap.fd < 0 && is_open(to) && (q = queue_for(to, frame)))) {
            done = put_simple(to, q, frame, n);
            look_for_faults(q);
        }
        if (done < n)
            switch_put(to, &frame[done++]);
        frame += done;
        n -= done;
    }
}
