/* Frames of the packet generator, out and in; see net_driver.c for the theory. */
#include "net_driver.h"
#include <string.h>

enum { AHEAD = 8 }; /* frames to prefetch */

struct stamp {
    uint32_t tag;
    uint32_t sequence;
    uint64_t sent_ns;
};

_Static_assert(sizeof(struct stamp) == VHOST_PACKET_STAMP, "stamps are declared in the header");

/* ---- stamps and patterns ---- */

/* splitmix64's finisher. */
static inline uint64_t mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint64_t frames_key(uint64_t seed, uint64_t time)
{
    return mix(seed ^ mix(time));
}

static inline uint32_t tag_of(uint64_t key, uint32_t sequence)
{
    return (uint32_t)(((key ^ sequence) * 0x9e3779b97f4a7c15u) >> 32);
}

static inline uint64_t pattern_seed(uint64_t key, const struct stamp *s)
{
    return mix(key ^ s->sequence) ^ mix(s->sent_ns);
}

/* Each word has a value of its own, so that none can stand in another's place. */
static inline uint64_t pattern_word(uint64_t seed, size_t at)
{
    return seed + at * 0x9e3779b97f4a7c15u;
}

static void pattern_write(char *to, size_t size, uint64_t seed)
{
    size_t at = 0;
    uint64_t word;

    for (; at + sizeof(word) <= size; at += sizeof(word)) {
        word = pattern_word(seed, at);
        memcpy(to + at, &word, sizeof(word));
    }
    word = pattern_word(seed, at);
    memcpy(to + at, &word, size - at);
}

static bool pattern_matches(const char *from, size_t size, uint64_t seed)
{
    size_t at = 0;
    uint64_t word, wrong = 0;

    for (; at + sizeof(word) <= size; at += sizeof(word)) {
        memcpy(&word, from + at, sizeof(word));
        wrong |= word ^ pattern_word(seed, at);
    }
    word = pattern_word(seed, at);
    return !wrong && memcmp(from + at, &word, size - at) == 0;
}

/* ---- frames out ---- */

static inline void put_frame(struct run *run, struct end *e, uint32_t sequence, uint64_t sent_ns)
{
    struct vhost_packet_port *p = e->port;
    struct stamp s = {tag_of(e->key_out, sequence), sequence, sent_ns};
    char *slot = port_send(p);

    memcpy(slot + p->prefix_len, &s, sizeof(s));
    if (unlikely(run->verify)) {
        size_t at = p->prefix_len + sizeof(s);
        pattern_write(slot + at, run->frame_len - at, pattern_seed(e->key_out, &s));
    }
}

/* The entry of the next frame. */
static inline uint64_t *next_entry(struct run *run)
{
    uint64_t *entry = &run->flight[run->sequence & run->flight_mask];

    while (unlikely(*entry)) {
        if (!run->config->depth) {
            /* So many were sent since that this one cannot be under way. */
            run->result->lost++;
            run->in_flight--;
            break;
        }
        entry = &run->flight[++run->sequence & run->flight_mask];
    }
    return entry;
}

uint32_t frames_credit(const struct run *run)
{
    uint64_t n = run->packets - run->result->sent;

    if (run->config->depth && n > run->config->depth - run->in_flight)
        n = run->config->depth - run->in_flight;
    if (n > run->end[0].port->tx_idle_count)
        n = run->end[0].port->tx_idle_count;
    return n > BATCH ? BATCH : (uint32_t)n;
}

void frames_send(struct run *run, uint32_t n)
{
    struct end *e = &run->end[0];

    for (uint32_t i = 0; i < n; i++) {
        const struct vhost_packet_port *p = e->port;
        if (p->tx_idle_count > AHEAD)
            __builtin_prefetch(
                port_slot(p, p->tx_idle[p->tx_idle_count - 1 - AHEAD]) + p->prefix_len, 1);
        *next_entry(run) = run->now;
        put_frame(run, e, run->sequence++, run->now);
    }
    driver_ring_publish(&e->port->tx);
    run->in_flight += n;
    run->result->sent += n;
    run->last_ns = run->now;
}

/* ---- frames in ---- */

static inline void count_received(struct run *run, const struct stamp *s, uint32_t len, bool intact)
{
    struct vhost_packet_result *r = run->result;

    run->flight[s->sequence & run->flight_mask] = 0;
    run->in_flight--;
    run->last_ns = run->now;
    r->received++;
    r->bytes += len - NET_HEADER_MAX;
    if (unlikely(!intact)) {
        r->corrupt++;
        return;
    }
    if (run->bucket_of != s->sent_ns) {
        run->bucket_of = s->sent_ns;
        run->bucket = histogram_bucket(run->now - s->sent_ns);
    }
    r->latency[run->bucket]++;
}

/* A frame of `len` bytes, of which at least the stamp (with VERIFY: all) lies at `frame`.  The
 * device may go on writing there: the stamp that is judged is a copy. */
static inline void arrive(struct run *run, struct end *e, const char *frame, uint32_t len)
{
    struct stamp s;

    if (unlikely(len < e->stamp_in + sizeof(s))) {
        run->result->foreign++;
        return;
    }
    memcpy(&s, frame + e->stamp_in, sizeof(s));
    if (unlikely(s.tag != tag_of(e->key_in, s.sequence))) {
        run->result->foreign++;
        return;
    }
    if (unlikely(!s.sent_ns || run->flight[s.sequence & run->flight_mask] != s.sent_ns)) {
        run->result->stale++;
        return;
    }
    bool intact = len == run->frame_len;
    if (unlikely(run->verify) && intact) {
        size_t at = e->stamp_in + sizeof(s);
        intact = pattern_matches(frame + at, len - at, pattern_seed(e->key_in, &s));
    }
    if (e->bounces && intact)
        put_frame(run, e, s.sequence, s.sent_ns);
    else
        count_received(run, &s, len, intact);
}

/* Takes `n` buffers as one frame; copies as much of it as will be looked at. */
static int gather(struct run *run, struct end *e, uint16_t n, uint32_t *len)
{
    uint32_t wanted = run->verify ? run->frame_len : e->stamp_in + sizeof(struct stamp);
    struct vring_used_elem elem;

    *len = 0;
    for (uint16_t i = 0; i < n; i++) {
        if (!port_take(e->port, &elem))
            return port_break(e->port);
        if (*len < wanted) {
            uint32_t part = elem.len < wanted - *len ? elem.len : wanted - *len;
            memcpy(run->flat + *len, port_buffer(e->port, elem.id), part);
        }
        *len += elem.len;
    }
    return 0;
}

/* How many buffers the next frame takes: its header says so, if it has one. */
static int frame_buffers(struct vhost_packet_port *p)
{
    if (!p->mergeable)
        return 1;
    struct vring_used_elem elem = driver_ring_elem(&p->rx, p->rx.used_idx);
    if (elem.len < NET_HEADER_MAX || elem.id >= p->rx.size)
        return 1;
    const struct virtio_net_hdr *header = (const struct virtio_net_hdr *)port_buffer(p, elem.id);
    uint16_t n = __atomic_load_n(&header->num_buffers, __ATOMIC_RELAXED);
    /* virtio 1.3, section 5.1.6.4: as many as were used, so at least one, and no more than there
     * are. */
    return n == 0 || n > p->rx.size ? port_break(p) : n;
}

/* Takes the next frame, of at most `pending` buffers.  How many it took, 0 if the rest is not
 * there yet, or -EPROTO. */
static inline int take_frame(struct run *run, struct end *e, uint16_t pending)
{
    struct vhost_packet_port *p = e->port;
    struct vring_used_elem elem;
    uint32_t len;

    int n = frame_buffers(p);
    if (unlikely(n != 1)) {
        if (n < 0 || n > pending)
            return n < 0 ? n : 0;
        int err = gather(run, e, (uint16_t)n, &len);
        if (err)
            return err;
        arrive(run, e, run->flat, len);
        return n;
    }
    if (!port_take(p, &elem))
        return port_break(p);
    if (likely(elem.len)) /* otherwise it was returned unused */
        arrive(run, e, port_buffer(p, elem.id), elem.len);
    return 1;
}

static inline void prefetch_frame(const struct end *e)
{
    const struct driver_ring *r = &e->port->rx;
    uint32_t id = driver_ring_elem(r, (uint16_t)(r->used_idx + AHEAD)).id & (r->size - 1);
    const char *buffer = port_buffer(e->port, id);

    __builtin_prefetch(buffer + e->stamp_in);
    if (e->port->mergeable)
        __builtin_prefetch(buffer);
}

int frames_receive(struct run *run, struct end *e)
{
    struct vhost_packet_port *p = e->port;
    uint16_t pending = driver_ring_pending(&p->rx), taken = 0;

    if (pending > driver_ring_in_flight(&p->rx))
        return port_break(p);
    e->rx_seen = p->rx.used_idx;
    for (int i = 0; i < BATCH && taken < pending && can_take(e); i++) {
        if (pending - taken > AHEAD)
            prefetch_frame(e);
        int n = take_frame(run, e, (uint16_t)(pending - taken));
        if (n < 0)
            return n;
        if (n == 0) {
            e->rx_seen = (uint16_t)(p->rx.used_idx + pending - taken);
            break;
        }
        taken = (uint16_t)(taken + n);
        e->rx_seen = p->rx.used_idx;
    }
    port_publish_rx(p);
    if (p->tx.published != p->tx.avail_idx)
        driver_ring_publish(&p->tx);
    return taken;
}

void frames_expire(struct run *run)
{
    uint64_t lost_ns = run->config->lost_ms * 1000000ull;

    for (uint32_t i = 0; i <= run->flight_mask; i++) {
        if (run->flight[i] && run->now - run->flight[i] > lost_ns) {
            run->flight[i] = 0;
            run->in_flight--;
            run->result->lost++;
        }
    }
}
