/*
 * A wire between two virtio-net devices, or from one back to itself: the device's side of their
 * rings, in a thread of the test's own, and packet ports at the driver's side.
 *
 * It forwards frames without loss (they wait where there are no buffers), and well, but for the
 * faults that it is told to have.  With IN_ORDER it tells of as much as it may by one element
 * (virtio 1.3, section 2.7.9): a batch of what was sent, and buffers that are full with the next
 * one.
 */
#ifndef WIRE_H
#define WIRE_H

#include "driver_ring.h"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

enum {
    WIRE_HEADER = sizeof(struct virtio_net_hdr),
    WIRE_FRAME_MAX = WIRE_HEADER + VHOST_PACKET_MAX,
    WIRE_BUFFERS = 0x100000, /* where the first port's buffers are, behind GUEST_BASE */
    WIRE_SHARE = 0x4000000,  /* of buffers, a port */
    WIRE_ROUND = 32,         /* frames in one direction before the other has its turn */
};

/* What a device must not do; it does it with the second frame. */
enum lie {
    HONEST,
    RX_ID_RANGE,
    RX_ID_TWICE,
    RX_LENGTH,
    RX_INDEX,
    RX_NO_BUFFERS,
    RX_MANY_BUFFERS,
    TX_ID_RANGE,
    TX_ID_TWICE,
    TX_INDEX,
    ORDERS, /* with IN_ORDER: */
    RX_AHEAD = ORDERS,
    TX_AHEAD,
    LIES,
};

/* Every nth frame, 0 = none: */
struct faults {
    uint32_t drop, corrupt, cut, duplicate;
    uint32_t hold;       /* comes after the next */
    uint32_t stranger;   /* is followed by others' frames, and comes back to its sender */
    uint32_t corrupt_at; /* this byte, virtio-net header included, or the last */
    uint32_t part;       /* all frames: buffers are filled to so many bytes; 0 = whole */
    bool dribble;        /* all frames: the first buffer is used before the others */
    uint32_t hoard;      /* all frames: their heads are returned so many at once, or with this... */
    uint32_t hoard_end;  /* ...frame; with EVENT_IDX, when the driver asks for it in its sleep */
    enum lie lie;
};

/* The device's side of a ring. */
struct device_ring {
    struct driver_ring *d;
    uint16_t next, used_idx, published;
    bool open;   /* the element written last may tell of more */
    uint16_t at; /* its place */
};

struct wire_port {
    struct driver_ring ring[2]; /* the driver's: receive, transmit */
    struct device_ring rx, tx;
    struct vhost_packet_port *packet;
    char header[VHOST_PACKET_HEADER_MAX]; /* its frames must start with this */
    uint32_t header_len;                  /* virtio-net header included */
    uint32_t sent, delivered;             /* frames, from it and to it */
    uint32_t buffer;                      /* bytes of a receive buffer */
};

struct wire {
    struct guest guest;
    struct wire_port port[2];
    uint32_t ports; /* 1: an echo */
    struct faults faults;
    bool polls;     /* otherwise it sleeps until it is kicked */
    uint32_t depth; /* which the driver must keep, or 0 */
    uint64_t calls, bad_headers;
    int stop;
    atomic_bool stopping;
    pthread_t thread;
    char frame[WIRE_FRAME_MAX], held[WIRE_FRAME_MAX];
    uint32_t held_len;
};

/* ---- the device's side of a ring ---- */

static inline uint16_t wire_waiting(const struct device_ring *r)
{
    return (uint16_t)(__atomic_load_n(&r->d->avail[1], __ATOMIC_ACQUIRE) - r->next);
}

static inline uint16_t wire_head(const struct device_ring *r)
{
    uint16_t head = r->d->avail[2 + (r->next & (r->d->size - 1))];

    CHECK(head < r->d->size);
    return head;
}

/* `all`: what is told is that all of the chain was used, so that the next may tell of it. */
static inline void wire_push(struct device_ring *r, uint32_t id, uint32_t len, bool all)
{
    struct vring_used_elem elem = {id, len}, garbage = {UINT32_MAX, UINT32_MAX};
    struct vring_used_elem *own = &r->d->used_ring[r->used_idx & (r->d->size - 1)];

    if (r->open) {
        *own = garbage;
        r->d->used_ring[r->at & (r->d->size - 1)] = elem;
    } else {
        *own = elem;
        r->at = r->used_idx;
    }
    r->used_idx++;
    r->open = all && r->d->features & IN_ORDER;
}

static inline void wire_publish(struct wire *w, struct device_ring *r)
{
    uint16_t old = r->published, now = r->used_idx;
    bool wanted;

    if (now == old)
        return;
    r->published = now;
    r->open = false;
    __atomic_store_n(&r->d->used[1], now, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (r->d->features & EVENT_IDX) {
        uint16_t event = __atomic_load_n(driver_used_event(r->d), __ATOMIC_RELAXED);
        wanted = (uint16_t)(now - event - 1) < (uint16_t)(now - old);
    } else {
        uint16_t flags = __atomic_load_n(&r->d->avail[0], __ATOMIC_RELAXED);
        wanted = !(flags & VRING_AVAIL_F_NO_INTERRUPT);
    }
    if (wanted) {
        w->calls++;
        CHECK_EQ(eventfd_write(r->d->call, 1), 0);
    }
}

/* Whether the device is to be kicked when more comes than waits already. */
static inline void wire_want_kick(struct device_ring *r, bool wanted)
{
    uint16_t event = (uint16_t)(r->next + (wanted ? wire_waiting(r) : 0x8000));

    if (r->d->features & EVENT_IDX)
        __atomic_store_n((uint16_t *)&r->d->used_ring[r->d->size], event, __ATOMIC_RELAXED);
    else
        __atomic_store_n(&r->d->used[0], wanted ? 0 : VRING_USED_F_NO_NOTIFY, __ATOMIC_RELAXED);
}

/* Waits until the driver sleeps: with EVENT_IDX it says then how far it has looked. */
static inline void wire_await_sleep(struct wire *w, struct device_ring *r)
{
    while (__atomic_load_n(driver_used_event(r->d), __ATOMIC_RELAXED) != r->published &&
           !w->stopping)
        sched_yield();
}

/* ---- frames ---- */

static inline bool is_turn(uint32_t every, const struct wire_port *from)
{
    return every && from->sent % every == 0;
}

static inline uint32_t wire_room(const struct wire *w, const struct wire_port *to)
{
    return w->faults.part && w->faults.part < to->buffer ? w->faults.part : to->buffer;
}

static inline bool is_of_tx(enum lie lie)
{
    return (lie >= TX_ID_RANGE && lie < ORDERS) || lie == TX_AHEAD;
}

static inline void push_or_lie(struct device_ring *r, enum lie lie, uint16_t head, uint32_t len)
{
    const struct vring_desc *d = &r->d->desc[head];
    uint32_t room = d->flags & VRING_DESC_F_WRITE ? d->len : 0;

    if (lie)
        r->open = false; /* a batch would take back the lie */
    if (lie == RX_ID_TWICE)
        wire_push(r, head, len, false);
    if (lie == TX_ID_TWICE)
        head = (uint16_t)r->d->used_ring[(r->used_idx - 1) & (r->d->size - 1)].id;
    if (lie == RX_INDEX || lie == TX_INDEX)
        r->used_idx = (uint16_t)(r->used_idx + r->d->size);
    if (lie == RX_AHEAD || lie == TX_AHEAD) /* so far that it is none of a batch */
        head = (uint16_t)((head + r->d->size / 2) & (r->d->size - 1));
    wire_push(r, lie == RX_ID_RANGE || lie == TX_ID_RANGE ? r->d->size : head,
              lie == RX_LENGTH ? room + 1 : len, !lie && len == room);
}

/* Into as many buffers as it takes, which must be there. */
static inline void deliver(struct wire *w, struct wire_port *to, const char *frame, uint32_t len)
{
    enum lie lie = ++to->delivered == 2 ? w->faults.lie : HONEST;
    uint32_t room = wire_room(w, to);
    uint16_t n = (uint16_t)((len + room - 1) / room);

    if (lie == RX_NO_BUFFERS || lie == RX_MANY_BUFFERS)
        n = lie == RX_NO_BUFFERS ? 0 : (uint16_t)(to->rx.d->size + 1);
    for (uint32_t at = 0; at < len; at += room) {
        uint16_t head = wire_head(&to->rx);
        uint32_t part = len - at < room ? len - at : room;
        char *buffer = guest_at(&w->guest, to->rx.d->desc[head].addr);
        CHECK_EQ(to->rx.d->desc[head].flags, VRING_DESC_F_WRITE);
        to->rx.next++;
        memcpy(buffer, frame + at, part);
        if (at == 0)
            memcpy(buffer + offsetof(struct virtio_net_hdr, num_buffers), &n, sizeof(n));
        push_or_lie(&to->rx, is_of_tx(lie) ? HONEST : lie, head, part);
        if (w->faults.dribble && at == 0 && n > 1) {
            wire_publish(w, &to->rx);
            wire_await_sleep(w, &to->rx);
        }
    }
}

static inline void deliver_strangers(struct wire *w, struct wire_port *from, struct wire_port *to,
                                     uint32_t len)
{
    char other[200];

    memset(other, 0x33, sizeof(other));
    deliver(w, to, other, sizeof(other));
    deliver(w, to, other, WIRE_HEADER);
    if (from != to)
        deliver(w, from, w->frame, len);
    push_or_lie(&to->rx, HONEST, wire_head(&to->rx), 0);
    to->rx.next++;
}

static inline void forward_frame(struct wire *w, struct wire_port *from, struct wire_port *to,
                                 uint32_t len)
{
    const struct faults *f = &w->faults;

    if (is_turn(f->drop, from))
        return;
    if (is_turn(f->hold, from)) {
        memcpy(w->held, w->frame, len);
        w->held_len = len;
        return;
    }
    if (is_turn(f->corrupt, from))
        w->frame[f->corrupt_at < len ? f->corrupt_at : len - 1] ^= 1;
    deliver(w, to, w->frame, is_turn(f->cut, from) ? len - 1 : len);
    if (is_turn(f->duplicate, from))
        deliver(w, to, w->frame, len);
    if (is_turn(f->stranger, from))
        deliver_strangers(w, from, to, len);
    if (w->held_len)
        deliver(w, to, w->held, w->held_len);
    w->held_len = 0;
}

/* Whether a frame waits and there are buffers for it, and for whatever may go with it. */
static inline bool can_forward(const struct wire *w, const struct wire_port *from,
                               const struct wire_port *to)
{
    const struct faults *f = &w->faults;

    if (!wire_waiting(&from->tx))
        return false;
    uint32_t len = from->tx.d->desc[wire_head(&from->tx)].len, room = wire_room(w, to);
    uint32_t n = (len + room - 1) / room;
    uint32_t more = f->duplicate || f->hold || f->stranger ? n + 3 : 0;
    return wire_waiting(&to->rx) >= n + more;
}

static inline void return_heads(struct wire *w, struct wire_port *from)
{
    uint16_t n = (uint16_t)(from->tx.used_idx - from->tx.published);

    if (n == 0 || (n < w->faults.hoard && from->sent != w->faults.hoard_end))
        return;
    if (w->faults.hoard && from->tx.d->features & EVENT_IDX)
        wire_await_sleep(w, &from->tx);
    if (!w->stopping) /* the driver must not have ended without them */
        wire_publish(w, &from->tx);
}

static inline bool forward(struct wire *w, struct wire_port *from, struct wire_port *to)
{
    bool any = false;

    if (w->depth)
        CHECK(from->sent + wire_waiting(&from->tx) - to->delivered <= w->depth);
    for (int i = 0; i < WIRE_ROUND && can_forward(w, from, to); i++, any = true) {
        uint16_t head = wire_head(&from->tx);
        uint32_t len = from->tx.d->desc[head].len;
        enum lie lie = ++from->sent == 2 ? w->faults.lie : HONEST;
        CHECK_EQ(from->tx.d->desc[head].flags, 0);
        CHECK(len <= WIRE_FRAME_MAX);
        memcpy(w->frame, guest_at(&w->guest, from->tx.d->desc[head].addr), len);
        from->tx.next++;
        push_or_lie(&from->tx, is_of_tx(lie) ? lie : HONEST, head, 0);
        w->bad_headers += memcmp(w->frame, from->header, from->header_len) != 0;
        forward_frame(w, from, to, len);
    }
    wire_publish(w, &to->rx);
    wire_publish(w, &from->rx);
    return_heads(w, from);
    return any;
}

/* ---- the thread ---- */

static inline struct wire_port *wire_peer(struct wire *w, uint32_t i)
{
    return &w->port[w->ports - 1 - i];
}

static inline void wire_sleep(struct wire *w)
{
    struct pollfd p[5] = {{.fd = w->stop, .events = POLLIN}};
    bool work = false;

    for (uint32_t i = 0; i < w->ports; i++) {
        wire_want_kick(&w->port[i].rx, true);
        wire_want_kick(&w->port[i].tx, true);
        p[1 + 2 * i] = (struct pollfd){.fd = w->port[i].ring[0].kick, .events = POLLIN};
        p[2 + 2 * i] = (struct pollfd){.fd = w->port[i].ring[1].kick, .events = POLLIN};
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < w->ports; i++)
        work |= can_forward(w, &w->port[i], wire_peer(w, i));
    if (!work)
        CHECK(poll(p, 1 + 2 * w->ports, -1) > 0);
    for (uint32_t i = 1; i <= 2 * w->ports; i++) {
        if (p[i].revents)
            take_signals(p[i].fd);
    }
}

static inline void *wire_main(void *arg)
{
    struct wire *w = arg;

    while (!w->stopping) {
        bool any = false;
        for (uint32_t i = 0; i < w->ports; i++) {
            wire_want_kick(&w->port[i].rx, false);
            wire_want_kick(&w->port[i].tx, false);
            any |= forward(w, &w->port[i], wire_peer(w, i));
        }
        if (!any && w->polls)
            sched_yield();
        else if (!any)
            wire_sleep(w);
    }
    return NULL;
}

static inline void wire_start(struct wire *w)
{
    for (uint32_t i = 0; i < w->ports && w->polls; i++) {
        wire_want_kick(&w->port[i].rx, false);
        wire_want_kick(&w->port[i].tx, false);
    }
    w->stopping = false;
    CHECK_EQ(pthread_create(&w->thread, NULL, wire_main, w), 0);
}

static inline void wire_halt(struct wire *w)
{
    w->stopping = true;
    CHECK_EQ(eventfd_write(w->stop, 1), 0);
    CHECK_EQ(pthread_join(w->thread, NULL), 0);
    CHECK_EQ(take_signals(w->stop), 1);
}

/* ---- all of it ---- */

struct wire_setup {
    uint64_t features; /* EVENT_IDX, IN_ORDER; PACKED where the device is not played here */
    bool mergeable;
    bool echo;
    bool alike;    /* the headers of both ports are equally long */
    uint16_t size; /* of each ring; 0 = 256 */
    uint16_t next_index;
    uint32_t buffer; /* bytes of a receive buffer; 0 = 1526, or where not mergeable any frame */
};

static inline struct vhost_packet_ring wire_ring(const struct driver_ring *d)
{
    return (struct vhost_packet_ring){.desc = d->base + AT_DESC,
                                      .avail = d->base + AT_AVAIL,
                                      .used = d->base + AT_USED,
                                      .size = d->size,
                                      .kick_fd = d->kick,
                                      .call_fd = d->call};
}

static inline struct vhost_packet_port_config wire_config(struct wire *w,
                                                          const struct wire_setup *s, uint32_t i)
{
    struct wire_port *p = &w->port[i];
    struct vhost_packet_port_config c = {
        .memory = w->guest.host,
        .memory_size = w->guest.size,
        .guest_addr = GUEST_BASE,
        .rx = wire_ring(&p->ring[0]),
        .tx = wire_ring(&p->ring[1]),
        .buffers = GUEST_BASE + WIRE_BUFFERS + i * (uint64_t)WIRE_SHARE,
        .buffers_size = WIRE_SHARE,
        .rx_buffer_size = s->buffer      ? s->buffer
                          : s->mergeable ? 1526
                                         : WIRE_FRAME_MAX,
        .flags = (s->features & EVENT_IDX ? VHOST_PACKET_EVENT_IDX : 0) |
                 (s->features & IN_ORDER ? VHOST_PACKET_IN_ORDER : 0) |
                 (s->features & PACKED ? VHOST_PACKET_PACKED : 0) |
                 (s->mergeable ? VHOST_PACKET_MERGEABLE : 0),
        .header = (const uint8_t *)p->header + WIRE_HEADER,
        .header_len = p->header_len - WIRE_HEADER,
    };

    memcpy(&c.vnet, p->header, WIRE_HEADER);
    c.vnet.num_buffers = 7; /* which is ignored */
    return c;
}

static inline struct device_ring device_ring(struct driver_ring *d, uint16_t index)
{
    return (struct device_ring){.d = d, .next = index, .used_idx = index, .published = index};
}

static inline void wire_open(struct wire *w, const struct wire_setup *s)
{
    uint16_t size = s->size ? s->size : 256;

    memset(w, 0, sizeof(*w));
    w->ports = s->echo ? 1 : 2;
    w->guest = guest_new(WIRE_BUFFERS + 2 * (uint64_t)WIRE_SHARE, 0);
    w->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(w->stop >= 0);
    for (uint32_t i = 0; i < w->ports; i++) {
        struct wire_port *p = &w->port[i];
        for (uint32_t r = 0; r < 2; r++)
            p->ring[r] = driver_new(&w->guest, 2 * i + r, size, s->features, s->next_index);
        p->rx = device_ring(&p->ring[0], s->next_index);
        p->tx = device_ring(&p->ring[1], s->next_index);
        p->header_len = WIRE_HEADER + (i && !s->alike ? 42 : 14);
        memset(p->header, (int)(0x11 * (i + 1)), p->header_len);
        memset(p->header + offsetof(struct virtio_net_hdr, num_buffers), 0, sizeof(uint16_t));
        struct vhost_packet_port_config config = wire_config(w, s, i);
        p->buffer = config.rx_buffer_size;
        CHECK_EQ(vhost_packet_port_new(&config, &p->packet), 0);
    }
}

static inline void wire_close(struct wire *w)
{
    for (uint32_t i = 0; i < w->ports; i++) {
        vhost_packet_port_free(w->port[i].packet);
        driver_free(&w->port[i].ring[0]);
        driver_free(&w->port[i].ring[1]);
    }
    close(w->stop);
    guest_free(&w->guest);
}

#endif
