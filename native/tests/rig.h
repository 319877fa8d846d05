/*
 * A served queue in place: guest memory, driver rings, events, an iothread, and a probe device.
 *
 * The probe is the plainest device there is.  It notes each chain, copies what it may read,
 * fills what it may write with PATTERN, and returns the chain at once or, while `hold` is set,
 * when the test says so.
 */
#ifndef RIG_H
#define RIG_H

#include "driver_ring.h"
#include "internal.h"
#include <pthread.h>
#include <sys/epoll.h>

enum { PATTERN = 0x5a, NOTES = 4096, NOTE_BYTES = 64, HELD_MAX = 1024 };

/* What the probe saw of a chain. */
struct note {
    uint32_t index;
    uint32_t readable, writable, splits;
    uint64_t readable_len, writable_len;
    uint16_t head;
    unsigned char bytes[NOTE_BYTES]; /* the first it could read */
};

struct probe_queue {
    struct watch watch; /* first: the watch is the queue's state */
    struct vhost_queue *q;
    uint16_t head[HELD_MAX];
    uint64_t len[HELD_MAX];
    uint32_t held;
    bool watching;
};

struct probe {
    struct vhost_device device;
    pthread_mutex_t lock; /* notes */
    struct note note[NOTES];
    uint32_t notes;
    atomic_bool hold;
    int release; /* eventfd */
};

static inline struct probe *probe_of(const struct vhost_queue *q)
{
    return container_of(q->device, struct probe, device);
}

static inline void probe_note(struct vhost_queue *q, const struct chain *c)
{
    struct probe *p = probe_of(q);
    struct note n = {
        .index = q->index,
        .head = c->head,
        .splits = c->splits,
        .readable = c->readable,
        .writable = c->writable,
        .readable_len = c->readable_len,
        .writable_len = c->writable_len,
    };
    size_t got = 0;

    for (uint32_t i = 0; i < c->readable; i++) {
        size_t room = sizeof(n.bytes) - got;
        size_t part = c->iov[i].iov_len < room ? c->iov[i].iov_len : room;
        memcpy(n.bytes + got, c->iov[i].iov_base, part);
        got += part;
    }
    for (uint32_t i = 0; i < c->writable; i++)
        memset(c->iov[c->readable + i].iov_base, PATTERN, c->iov[c->readable + i].iov_len);
    pthread_mutex_lock(&p->lock);
    p->note[p->notes++ % NOTES] = n;
    pthread_mutex_unlock(&p->lock);
}

static inline bool probe_service(struct vhost_queue *q)
{
    struct probe_queue *pq = q->state;
    struct chain c;
    bool any = false;

    if (!pq->watching)
        CHECK_EQ(iothread_watch(q->thread, &pq->watch, EPOLLIN | EPOLLET), 0);
    pq->watching = true;
    q->no_kicks = !q->enabled || !queue_may_pop(q);
    if (q->no_kicks)
        return false;
    while (queue_may_pop(q) && ring_pending(q) && ring_pop(q, &c)) {
        any = true;
        probe_note(q, &c);
        if (probe_of(q)->hold) {
            pq->head[pq->held] = c.head;
            pq->len[pq->held++] = c.writable_len;
        } else {
            ring_push(q, c.head, (uint32_t)c.writable_len);
        }
    }
    return any;
}

static inline void probe_release(struct watch *w)
{
    struct probe_queue *pq = (struct probe_queue *)w;

    for (uint32_t i = 0; i < pq->held; i++)
        ring_push(pq->q, pq->head[i], (uint32_t)pq->len[i]);
    pq->held = 0;
    iothread_schedule(pq->q);
}

static inline int probe_open(struct vhost_queue *q)
{
    struct probe_queue *pq = calloc(1, sizeof(*pq));

    CHECK(pq != NULL);
    pq->q = q;
    pq->watch.ready = probe_release;
    pq->watch.fd = dup(probe_of(q)->release);
    q->state = pq;
    return 0;
}

static inline void probe_close(struct vhost_queue *q)
{
    struct probe_queue *pq = q->state;

    CHECK_EQ(pq->held, 0);
    close(pq->watch.fd);
    free(pq);
}

static inline void probe_detach(struct vhost_queue *q)
{
    struct probe_queue *pq = q->state;

    iothread_watch(q->thread, &pq->watch, 0);
    pq->watching = false;
}

static inline void probe_free(struct vhost_device *device)
{
    struct probe *p = container_of(device, struct probe, device);

    close(p->release);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

enum { PROBE_CHAIN_MAX = 32 };

static inline struct probe *probe_new(uint32_t num_queues)
{
    static const struct device_ops ops = {
        .queue_open = probe_open,
        .queue_close = probe_close,
        .detach = probe_detach,
        .service = probe_service,
        .free = probe_free,
        .tracked = true,
        .chain_max = PROBE_CHAIN_MAX,
    };
    struct probe *p = calloc(1, sizeof(*p));

    CHECK(p != NULL);
    pthread_mutex_init(&p->lock, NULL);
    p->release = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(p->release >= 0);
    CHECK_EQ(device_init(&p->device, &ops, num_queues), 0);
    return p;
}

/* The note of the `n`th chain that the probe saw. */
static inline struct note probe_get(struct probe *p, uint32_t n)
{
    pthread_mutex_lock(&p->lock);
    CHECK(n < p->notes);
    struct note note = p->note[n];
    pthread_mutex_unlock(&p->lock);
    return note;
}

static inline uint32_t probe_count(struct probe *p)
{
    pthread_mutex_lock(&p->lock);
    uint32_t n = p->notes;
    pthread_mutex_unlock(&p->lock);
    return n;
}

/* ---- control ---- */

struct control {
    struct vhost_events *events;
    struct vhost_iothread *thread;
    uint64_t token;
    struct vhost_event waiting[64]; /* read, and not yet asked for */
    uint32_t num_waiting;
};

static inline struct control control_new(uint32_t flags, uint32_t poll_max_us)
{
    struct control c = {0};
    struct vhost_iothread_config config = {.flags = flags, .poll_max_us = poll_max_us, .cpu = -1};

    CHECK_EQ(vhost_events_new(&c.events), 0);
    CHECK_EQ(vhost_iothread_new(&config, c.events, &c.thread), 0);
    return c;
}

static inline void control_free(struct control *c)
{
    CHECK_EQ(vhost_iothread_free(c->thread), 0);
    vhost_events_free(c->events);
}

static inline struct vhost_event await_event(struct control *c, int kind, uint64_t token)
{
    for (;;) {
        for (uint32_t i = 0; i < c->num_waiting; i++) {
            struct vhost_event e = c->waiting[i];
            if (e.kind != kind || e.token != token)
                continue;
            c->waiting[i] = c->waiting[--c->num_waiting];
            return e;
        }
        await_signal(vhost_events_fd(c->events));
        CHECK(c->num_waiting < 64);
        c->num_waiting += (uint32_t)vhost_events_read(c->events, &c->waiting[c->num_waiting],
                                                      (int)(64 - c->num_waiting));
    }
}

/* The answer to the message posted last. */
static inline struct vhost_event await_done(struct control *c)
{
    return await_event(c, VHOST_EVENT_DONE, c->token);
}

static inline void queue_run(struct control *c, struct vhost_queue *q)
{
    CHECK_EQ(vhost_queue_start(q, c->thread, ++c->token), 0);
    CHECK_EQ(await_done(c).result, 0);
}

/* Stops the queue; returns its next index. */
static inline uint32_t queue_halt(struct control *c, struct vhost_queue *q)
{
    CHECK_EQ(vhost_queue_stop(q, ++c->token), 0);
    struct vhost_event e = await_done(c);
    CHECK_EQ(e.result, 0);
    return (uint32_t)e.value;
}

/* When this returns, the iothread has ended every pass that began before. */
static inline void queue_sync(struct control *c, struct vhost_queue *q)
{
    CHECK_EQ(vhost_queue_set_enabled(q, true, ++c->token), 0);
    CHECK_EQ(await_done(c).result, 0);
}

/* ---- the rig: all of it, with one queue ---- */

struct rig {
    struct guest guest;
    struct driver_ring ring;
    struct control control;
    struct probe *probe;
    struct vhost_queue *queue;
};

static inline void rig_open_at(struct rig *r, uint16_t size, uint64_t features, uint64_t split,
                               uint32_t flags, uint32_t poll_us, uint16_t next_index)
{
    *r = (struct rig){0};
    r->guest = guest_new(GUEST_SIZE, split);
    r->ring = driver_new(&r->guest, 0, size, VERSION_1 | features, next_index);
    r->control = control_new(flags, poll_us);
    r->probe = probe_new(1);
    struct vhost_queue_config config = driver_config(&r->ring, 0);
    CHECK_EQ(vhost_queue_new(&config, &r->probe->device, r->guest.memory, &r->queue), 0);
    queue_run(&r->control, r->queue);
}

static inline void rig_open(struct rig *r, uint16_t size, uint64_t features)
{
    rig_open_at(r, size, features, 0, 0, 0, 0);
}

static inline void rig_close(struct rig *r)
{
    queue_halt(&r->control, r->queue);
    CHECK_EQ(vhost_queue_free(r->queue), 0);
    control_free(&r->control);
    vhost_device_free(&r->probe->device);
    driver_free(&r->ring);
    guest_free(&r->guest);
}

/* Waits until the queue broke; returns the fault.  Its err fd must have been signalled once. */
static inline uint64_t rig_await_fault(struct rig *r)
{
    struct vhost_event e = await_event(&r->control, VHOST_EVENT_BROKEN, 1000);

    CHECK_EQ(take_signals(r->ring.err), 1);
    return e.value;
}

#endif
