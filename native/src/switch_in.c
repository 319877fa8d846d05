/*
 * Frames into the switch, from a card's transmit queue or from a tap.
 *
 * A batch goes through three loops: its chains are popped and their first bytes asked for; each
 * frame is looked at, its source learned; each goes where it is to go.  The chains come back after
 * that, all at once, and the iothread publishes each ring that was touched once a pass.
 */
#include "switch.h"
#include <endian.h>
#include <errno.h>
#include <unistd.h>

/* ---- looking at a frame ---- */

/* Copies the first `want` bytes of pieces. */
static void gather(const struct iovec *iov, void *to, uint32_t want)
{
    char *at = to;

    for (; want; iov++) {
        uint32_t part = iov->iov_len < want ? (uint32_t)iov->iov_len : want;
        memcpy(at, iov->iov_base, part);
        at += part;
        want -= part;
    }
}

/* Leaves out the first `n` bytes. */
static void frame_skip(struct frame *f, uint32_t n)
{
    while (f->iovs && n >= f->iov->iov_len) {
        n -= (uint32_t)f->iov->iov_len;
        f->iov++;
        f->iovs--;
    }
    f->skip = n;
}

/* Checks what a driver of these features says of its frame (virtio 1.3, section 5.1.6.2). */
static bool check_vnet(struct frame *f, uint64_t features, bool tap)
{
    struct virtio_net_hdr *h = &f->vnet;

    if (has_bit(features, VIRTIO_F_VERSION_1)) {
        h->hdr_len = le16toh(h->hdr_len);
        h->gso_size = le16toh(h->gso_size);
        h->csum_start = le16toh(h->csum_start);
        h->csum_offset = le16toh(h->csum_offset);
    }
    /* DATA_VALID is for receivers to hear, and a tap's to say. */
    h->flags &= tap ? VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID
                    : VIRTIO_NET_HDR_F_NEEDS_CSUM;
    if (likely(!(h->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM))) {
        if (h->gso_type != VIRTIO_NET_HDR_GSO_NONE)
            return false;
        *h = (struct virtio_net_hdr){.flags = h->flags};
        return true;
    }
    /* Behind one tag more it must still be a number of 16 bits. */
    if (!has_bit(features, VIRTIO_NET_F_CSUM) || h->csum_start < ETH_HEADER ||
        h->csum_start > UINT16_MAX - VLAN_TAG ||
        (uint32_t)h->csum_start + h->csum_offset + 2 > f->len)
        return false;
    if (h->gso_type & VIRTIO_NET_HDR_GSO_ECN && !has_bit(features, VIRTIO_NET_F_HOST_ECN))
        return false;
    switch (h->gso_type & ~VIRTIO_NET_HDR_GSO_ECN) {
    case VIRTIO_NET_HDR_GSO_NONE:
        h->gso_size = 0;
        return h->gso_type == VIRTIO_NET_HDR_GSO_NONE;
    case VIRTIO_NET_HDR_GSO_TCPV4:
        if (!has_bit(features, VIRTIO_NET_F_HOST_TSO4))
            return false;
        break;
    case VIRTIO_NET_HDR_GSO_TCPV6:
        if (!has_bit(features, VIRTIO_NET_F_HOST_TSO6))
            return false;
        break;
    default:
        return false;
    }
    return h->gso_size > 0 && h->hdr_len <= f->len;
}

/* Reads the headers of `f`, whose pieces hold `total` bytes.  Returns a counter of a drop, or 0. */
static unsigned read_headers(struct switch_port *from, struct frame *f, uint64_t features,
                             uint32_t header_len, uint64_t total)
{
    uint8_t head[NET_HEADER_MAX + HEAD_MAX];
    const uint8_t *eth = head + header_len;

    if (unlikely(total < header_len + ETH_HEADER))
        return VHOST_SWITCH_DROP_SHORT;
    if (unlikely(total > header_len + (uint64_t)NET_FRAME_MAX))
        return VHOST_SWITCH_DROP_LONG;
    f->len = (uint32_t)total - header_len;
    uint32_t want = header_len + (f->len < HEAD_MAX ? ETH_HEADER : HEAD_MAX);
    if (likely(want == sizeof(head) && f->iov->iov_len >= sizeof(head)))
        memcpy(head, f->iov->iov_base, sizeof(head));
    else
        gather(f->iov, head, want);
    f->vnet.num_buffers = 0;
    memcpy(&f->vnet, head, offsetof(struct virtio_net_hdr, num_buffers));
    memcpy(f->mac, eth, sizeof(f->mac));
    memcpy(f->type, eth + 12, 2);
    f->stripped = ETH_HEADER;
    f->vlan = from->set.vlan;
    f->priority = 0;
    if (unlikely((eth[12] << 8 | eth[13]) == ETHERTYPE_VLAN)) {
        if (want < header_len + HEAD_MAX)
            return VHOST_SWITCH_DROP_SHORT;
        uint16_t tag = (uint16_t)(eth[14] << 8 | eth[15]), vlan = tag & VLAN_ID;
        /* A tag of VLAN 0 tells the priority alone (IEEE 802.1Q, section 9.6). */
        if (vlan && !port_tags(from, vlan))
            return VHOST_SWITCH_DROP_VLAN;
        f->vlan = vlan ? vlan : f->vlan;
        f->priority = tag & (uint16_t)~VLAN_ID;
        memcpy(f->type, eth + 16, 2);
        f->stripped = HEAD_MAX;
    }
    if (unlikely(f->vlan == 0))
        return VHOST_SWITCH_DROP_VLAN;
    if (unlikely(!check_vnet(f, features, from->tap.fd >= 0)))
        return VHOST_SWITCH_DROP_BAD_HEADER;
    if (unlikely(f->vnet.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM && f->vnet.csum_start < f->stripped))
        return VHOST_SWITCH_DROP_BAD_HEADER;
    frame_skip(f, header_len + f->stripped);
    return 0;
}

/* ---- limits ---- */

/* Takes `cost` out of a bucket that fills at `rate` a second, up to `burst`. */
static bool bucket_take(struct token_bucket *b, uint64_t rate, uint64_t burst, uint64_t cost,
                        uint64_t now_ns)
{
    enum { SECOND = 1000000000 };
    uint64_t passed = now_ns - b->filled_ns;

    if (burst < cost)
        burst = cost; /* else it would never pass */
    uint64_t more = passed >= SECOND ? burst : (uint64_t)((__uint128_t)rate * passed / SECOND);
    if (b->level + more >= burst) {
        b->level = burst;
        b->filled_ns = now_ns;
    } else {
        b->level += more;
        b->filled_ns += more * SECOND / rate; /* what is no whole one yet stays */
    }
    if (b->level < cost)
        return false;
    b->level -= cost;
    return true;
}

/* ---- where a frame goes ---- */

/* Group addresses that no bridge forwards (IEEE 802.1Q, table 8-1). */
static bool is_for_bridges(const uint8_t mac[6])
{
    static const uint8_t prefix[5] = {0x01, 0x80, 0xc2, 0x00, 0x00};

    return memcmp(mac, prefix, sizeof(prefix)) == 0 && mac[5] < 16;
}

static bool may_pass(const struct switch_port *from, const struct switch_port *to)
{
    if (port_is(from, VHOST_SWITCH_PRIVATE) && !port_is(to, VHOST_SWITCH_UPLINK))
        return false;
    return !port_is(to, VHOST_SWITCH_PRIVATE) || port_is(from, VHOST_SWITCH_UPLINK);
}

/* To the mirrors, as it came. */
static cold_path void mirror(struct vhost_switch *sw, const struct frame *f)
{
    for (uint32_t i = 0; i < sw->num_plugged; i++) {
        struct switch_port *to = sw->port[sw->plugged[i]];
        if (port_is(to, VHOST_SWITCH_MIRROR))
            switch_put(to, f);
    }
}

static void put(struct switch_port *from, struct switch_port *to, const struct frame *f)
{
    if (unlikely(from->sw->num_mirrors && port_is(to, VHOST_SWITCH_MIRRORED) &&
                 !port_is(from, VHOST_SWITCH_MIRRORED)))
        mirror(from->sw, f);
    switch_put(to, f);
}

static void flood(struct switch_port *from, const struct frame *f, uint64_t now_ns)
{
    struct vhost_switch *sw = from->sw;

    if (from->set.storm &&
        !bucket_take(&from->storm, from->set.storm, from->set.storm, 1, now_ns)) {
        port_count(from, VHOST_SWITCH_DROP_STORM, 1);
        return;
    }
    port_count(from, VHOST_SWITCH_FLOODED, 1);
    for (uint32_t i = 0; i < sw->num_plugged; i++) {
        struct switch_port *to = sw->port[sw->plugged[i]];
        if (to != from && port_is_in(to, f->vlan) && may_pass(from, to) &&
            !port_is(to, VHOST_SWITCH_MIRROR))
            put(from, to, f);
    }
}

/* What was found for the frames of a batch last: the next one is mostly of the same two stations.
 */
struct found {
    station_key source; /* may send here, and is known; 0: none */
    station_key target; /* is behind `to`; 0: none */
    struct switch_port *to;
};

/* Whether the source of a frame may send here; learns it.  Returns a counter of a drop, or 0. */
static unsigned admit(struct switch_port *from, const struct frame *f, station_key key,
                      struct found *found)
{
    struct vhost_switch *sw = from->sw;
    const uint8_t *source = f->mac + 6;

    if (is_group(source) || !(key & UINT64_C(0xffffffffffff)))
        return VHOST_SWITCH_DROP_BAD_SOURCE;
    if (port_is(from, VHOST_SWITCH_BOUND) && memcmp(source, from->set.mac, 6))
        return VHOST_SWITCH_DROP_SPOOFED;
    switch (stations_learn(&sw->stations, key, from->id, from->set.stations, sw->now_s)) {
    case STATION_BOUND:
        return VHOST_SWITCH_DROP_SPOOFED;
    case STATION_FULL:
        port_count(from, VHOST_SWITCH_UNLEARNED, 1);
        break;
    case STATION_LEARNED:
        found->source = key;
        break;
    }
    return 0;
}

/* Finds where a frame goes.  Returns a counter of a drop, or 0. */
static unsigned route(struct switch_port *from, struct frame *f, station_key key,
                      struct found *found)
{
    struct vhost_switch *sw = from->sw;

    f->to = NULL;
    if (is_group(f->mac))
        return is_for_bridges(f->mac) ? VHOST_SWITCH_DROP_FILTERED : 0;
    int number = stations_find(&sw->stations, key, sw->now_s);
    if (number == STATION_NONE)
        return 0;
    struct switch_port *to = sw->port[number];
    if (to == from || !may_pass(from, to) || !port_is_in(to, f->vlan))
        return VHOST_SWITCH_DROP_FILTERED;
    f->to = found->to = to;
    found->target = key;
    return 0;
}

static inline unsigned judge(struct switch_port *from, struct frame *f, struct found *found,
                             uint64_t now_ns)
{
    station_key source = source_of(f), target = target_of(f);
    unsigned drop;

    if (unlikely(from->set.rate) &&
        !bucket_take(&from->rate, from->set.rate, from->set.burst, f->len, now_ns))
        return VHOST_SWITCH_DROP_RATE;
    if (unlikely(source != found->source) && (drop = admit(from, f, source, found)))
        return drop;
    if (unlikely(target != found->target))
        return route(from, f, target, found);
    f->to = found->to;
    return 0;
}

/* One after another, with copies for the mirrors. */
static cold_path void send_mirrored(struct switch_port *from, const struct frame *frame, uint32_t n,
                                    uint64_t now_ns)
{
    for (uint32_t i = 0; i < n; i++) {
        if (port_is(from, VHOST_SWITCH_MIRRORED))
            mirror(from->sw, &frame[i]);
        if (frame[i].to)
            put(from, frame[i].to, &frame[i]);
        else
            flood(from, &frame[i], now_ns);
    }
}

/* Has frames, whose headers were read, go where they go, in their order. */
static void carry(struct switch_port *from, struct frame *frame, uint32_t n, uint64_t now_ns)
{
    uint64_t bytes = 0;
    uint32_t routed = 0, run;
    struct found found = {0};

    from->sw->now_s = (uint32_t)(now_ns / 1000000000u);
    for (uint32_t i = 0; i < n; i++) {
        struct frame *f = &frame[i];
        bytes += f->len;
        unsigned drop = judge(from, f, &found, now_ns);
        if (unlikely(drop)) {
            port_count(from, drop, 1);
            continue;
        }
        if (routed != i)
            frame[routed] = *f;
        routed++;
    }
    port_count(from, VHOST_SWITCH_IN_BYTES, bytes);
    if (unlikely(from->sw->num_mirrors)) {
        send_mirrored(from, frame, routed, now_ns);
        return;
    }
    for (uint32_t i = 0; i < routed; i += run) {
        struct switch_port *to = frame[i].to;
        for (run = 1; i + run < routed && to && frame[i + run].to == to; run++)
            ;
        if (likely(to))
            switch_put_many(to, &frame[i], run);
        else
            flood(from, &frame[i], now_ns);
    }
}

/* ---- cards ---- */

/* A batch of popped chains, those of frames[0..frames) among them. */
struct batch {
    uint32_t chains, frames, pieces;
    uint64_t bytes;
    uint16_t head[NET_BATCH];
    uint64_t total[NET_BATCH]; /* bytes of a frame with its header */
};

/* Has the frames of the batch go where they go, and gives its chains back. */
static void batch_end(struct vhost_queue *q, struct batch *b)
{
    struct switch_port *from = port_of(q);
    const struct switch_queue *state = q->state;
    struct frame *frame = from->sw->frame;
    uint32_t n = 0;

    for (uint32_t i = 0; i < b->frames; i++) {
        if (n != i)
            frame[n] = frame[i];
        unsigned drop = read_headers(from, &frame[n], q->features, state->header_len, b->total[i]);
        if (likely(!drop))
            b->bytes += frame[n++].len;
        else
            port_count(from, drop, 1);
    }
    carry(from, frame, n, iothread_now(q->thread));
    for (uint32_t i = 0; i < b->chains; i++)
        ring_push(q, b->head[i], 0);
    port_count(from, VHOST_SWITCH_IN_FRAMES, b->chains);
    count(q, VHOST_COUNTER_PACKETS, n);
    count(q, VHOST_COUNTER_BYTES_WRITTEN, b->bytes);
    *b = (struct batch){0};
}

/* A frame in one piece of our own, of as many bytes as are kept of it. */
static struct iovec flatten(struct vhost_switch *sw, const struct chain *c)
{
    struct iovec flat = {.iov_base = sw->flat};

    for (uint32_t i = 0; i < c->readable && flat.iov_len < FLAT_MAX; i++) {
        size_t room = FLAT_MAX - flat.iov_len;
        size_t part = c->iov[i].iov_len < room ? c->iov[i].iov_len : room;
        memcpy(sw->flat + flat.iov_len, c->iov[i].iov_base, part);
        flat.iov_len += part;
    }
    return flat;
}

static void batch_add(struct vhost_queue *q, struct batch *b, const struct chain *c)
{
    struct vhost_switch *sw = port_of(q)->sw;
    bool whole = c->readable <= FRAME_PIECES;
    uint32_t pieces = whole ? c->readable : 1;

    /* The chain's own pieces are in the queue's scratch until the next is popped. */
    if (unlikely(b->pieces + pieces > ROW_PIECES))
        batch_end(q, b);
    struct frame *f = &sw->frame[b->frames];
    struct iovec *row = &sw->row[b->pieces];
    if (likely(whole)) {
        for (uint32_t i = 0; i < pieces; i++)
            row[i] = c->iov[i];
        __builtin_prefetch(row[0].iov_base);
        /* The rest of a short frame, or the frame behind a header of its own. */
        __builtin_prefetch(pieces > 1 ? row[1].iov_base : (char *)row[0].iov_base + 64);
    } else {
        row[0] = flatten(sw, c);
    }
    f->iov = row;
    f->iovs = pieces;
    f->pair = (uint16_t)(q->index / 2);
    b->total[b->frames++] = c->readable_len;
    b->head[b->chains++] = c->head;
    b->pieces += pieces;
    if (unlikely(!whole))
        batch_end(q, b); /* `flat` holds one */
}

bool switch_tx_service(struct vhost_queue *q)
{
    struct switch_port *from = port_of(q);
    struct batch b = {0};
    struct chain c;

    if (!queue_may_pop(q))
        return false;
    uint32_t n = ring_pending(q);
    if (n == 0)
        return false;
    count(q, VHOST_COUNTER_BATCHES, 1);
    if (n > NET_BATCH)
        n = NET_BATCH;
    bool deaf = !q->enabled || !from->plugged || port_is(from, VHOST_SWITCH_DOWN) ||
                port_is(from, VHOST_SWITCH_MIRROR);
    while (n-- && !q->broken && ring_pop(q, &c)) {
        if (unlikely(deaf)) {
            /* A disabled ring is served, but what it sends goes nowhere (vhost-user, "Ring
             * states"). */
            port_count(from, VHOST_SWITCH_DROP_DOWN, 1);
            count(q, VHOST_COUNTER_DROPS_DISABLED, 1);
            b.head[b.chains++] = c.head;
        } else if (unlikely(c.writable)) {
            /* virtio 1.3, section 5.1.6.2: all of it readable. */
            port_count(from, VHOST_SWITCH_DROP_BAD_HEADER, 1);
            count(q, VHOST_COUNTER_DROPS_SHORT, 1);
            b.head[b.chains++] = c.head;
        } else {
            batch_add(q, &b, &c);
        }
    }
    if (b.chains)
        batch_end(q, &b);
    return true;
}

/* ---- a tap ---- */

void switch_tap_ready(struct watch *watch)
{
    struct switch_port *from = container_of(watch, struct switch_port, tap);
    struct vhost_switch *sw = from->sw;
    struct iovec flat = {.iov_base = sw->flat};

    /* What is left is told of again: the watch is level-triggered. */
    for (int i = 0; i < NET_BATCH; i++) {
        ssize_t len = read(from->tap.fd, sw->flat, sizeof(sw->flat));
        if (len <= 0) {
            /* One that was deleted under us would be told of for ever. */
            if (len < 0 && errno != EAGAIN && errno != EINTR)
                iothread_watch(sw->thread, watch, 0);
            return;
        }
        flat.iov_len = (size_t)len;
        struct frame *f = &sw->frame[0];
        *f = (struct frame){.iov = &flat, .iovs = 1};
        unsigned drop = VHOST_SWITCH_DROP_DOWN;
        port_count(from, VHOST_SWITCH_IN_FRAMES, 1);
        if (!port_is(from, VHOST_SWITCH_DOWN) && !port_is(from, VHOST_SWITCH_MIRROR))
            drop = read_headers(from, f, SWITCH_TAP_FEATURES, NET_HEADER_MAX, (uint64_t)len);
        if (likely(!drop))
            carry(from, f, 1, iothread_now(sw->thread));
        else
            port_count(from, drop, 1);
    }
}

/* ---- in a guest's name ---- */

void switch_announce(struct switch_port *from, const uint8_t mac[6])
{
    /* A request for the address of the station itself (RFC 903). */
    uint8_t request[46] = {0, 1, 8, 0, 6, 4, 0, 3};
    struct iovec rest = {.iov_base = request, .iov_len = sizeof(request)};
    struct frame f = {
        .len = ETH_HEADER + sizeof(request),
        .vlan = from->set.vlan,
        .stripped = ETH_HEADER,
        .mac = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
        .type = {0x80, 0x35},
        .iov = &rest,
        .iovs = 1,
    };

    memcpy(f.mac + 6, mac, 6);
    memcpy(request + 8, mac, 6);
    memcpy(request + 18, mac, 6);
    if (f.vlan)
        carry(from, &f, 1, iothread_now(from->sw->thread));
}
