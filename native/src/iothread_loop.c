/*
 * The iothread: one loop that owns its queues.
 *
 * A pass takes messages, serves the queues in the polling set, submits what they prepared,
 * reaps what completed, publishes each touched ring once (one call a queue), and settles drains.
 *
 * Polling.  A queue that had work stays in the polling set, its driver's kicks suppressed, until
 * it was idle for the polling window; then it is armed and leaves the set.  With the set empty
 * the thread sleeps in epoll.  The window adapts to what sleeping would have cost: it doubles
 * (up to the ceiling) when work came soon after falling asleep, and halves when it did not.
 *
 * Kick eventfds are watched edge-triggered and never read: each write is an edge, so a wake-up
 * costs one system call, and a kick proves nothing anyway; the ring is what counts.
 */
#include "iothread.h"
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { EPOLL_BATCH = 64, POLL_FLOOR_NS = 2000, LOOK_NS = 50000 };

struct vhost_events *iothread_events(struct vhost_iothread *t)
{
    return t->events;
}

uint64_t iothread_now(const struct vhost_iothread *t)
{
    return t->now;
}

struct io_uring *iothread_uring(struct vhost_iothread *t)
{
    return t->has_uring ? &t->uring : NULL;
}

/* ---- queues ---- */

int iothread_epoll_add(struct vhost_iothread *t, int fd, uint32_t events, void *ptr, unsigned tag)
{
    struct epoll_event e = {.events = events, .data.u64 = (uintptr_t)ptr | tag};

    return epoll_ctl(t->epoll_fd, EPOLL_CTL_ADD, fd, &e) < 0 ? -errno : 0;
}

int iothread_add_queue(struct vhost_iothread *t, struct vhost_queue *q)
{
    uint32_t n = 0;
    for (struct vhost_queue *other = t->queues; other; other = other->next)
        n++;
    struct vhost_queue **polling = realloc(t->polling, (n + 1) * sizeof(*polling));
    int err = polling ? 0 : -ENOMEM;
    if (polling)
        t->polling = polling;
    if (err == 0 && q->kick_fd >= 0)
        err = iothread_epoll_add(t, q->kick_fd, EPOLLIN | EPOLLET, q, TAG_KICK);
    if (err < 0) {
        atomic_fetch_sub(&t->num_queues, 1);
        return err;
    }
    q->next = t->queues;
    t->queues = q;
    return 0;
}

static void stop_polling(struct vhost_iothread *t, uint32_t i)
{
    t->polling[i]->polling = false;
    t->polling[i] = t->polling[--t->num_polling];
}

void iothread_remove_queue(struct vhost_iothread *t, struct vhost_queue *q)
{
    for (uint32_t i = 0; i < t->num_polling; i++) {
        if (t->polling[i] == q) {
            stop_polling(t, i);
            break;
        }
    }
    for (struct vhost_queue **p = &t->queues; *p; p = &(*p)->next) {
        if (*p == q) {
            *p = q->next;
            break;
        }
    }
    if (q->kick_fd >= 0)
        epoll_ctl(t->epoll_fd, EPOLL_CTL_DEL, q->kick_fd, NULL);
    atomic_fetch_sub(&t->num_queues, 1);
}

int iothread_set_kick(struct vhost_iothread *t, struct vhost_queue *q, int fd)
{
    if (q->kick_fd >= 0) {
        epoll_ctl(t->epoll_fd, EPOLL_CTL_DEL, q->kick_fd, NULL);
        close(q->kick_fd);
    }
    q->kick_fd = fd;
    return fd >= 0 ? iothread_epoll_add(t, fd, EPOLLIN | EPOLLET, q, TAG_KICK) : 0;
}

void iothread_schedule(struct vhost_queue *q)
{
    struct vhost_iothread *t = q->thread;

    q->active_ns = t->now;
    if (q->polling || q->blocked)
        return;
    q->polling = true;
    ring_disarm(q);
    t->polling[t->num_polling++] = q;
}

void iothread_mark_dirty(struct vhost_queue *q)
{
    q->dirty = true;
    q->next_dirty = q->thread->dirty;
    q->thread->dirty = q;
}

void iothread_publish(struct vhost_iothread *t)
{
    while (t->dirty) {
        struct vhost_queue *q = t->dirty;
        t->dirty = q->next_dirty;
        q->dirty = false;
        ring_publish(q);
    }
}

int iothread_watch(struct vhost_iothread *t, struct watch *w, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.u64 = (uintptr_t)w | TAG_WATCH};

    if (events == 0) {
        epoll_ctl(t->epoll_fd, EPOLL_CTL_DEL, w->fd, NULL);
        return 0;
    }
    if (epoll_ctl(t->epoll_fd, EPOLL_CTL_ADD, w->fd, &e) == 0)
        return 0;
    if (errno == EEXIST && epoll_ctl(t->epoll_fd, EPOLL_CTL_MOD, w->fd, &e) == 0)
        return 0;
    return -errno;
}

/* ---- the loop ---- */

static bool serve_polling(struct vhost_iothread *t)
{
    bool progress = false;

    for (uint32_t i = 0; i < t->num_polling; i++) {
        struct vhost_queue *q = t->polling[i];
        if (q->ops->service(q)) {
            progress = true;
            q->active_ns = 0; /* stamped below, with one clock read for all */
        }
        /* Looked at after the pass: a queue that faulted in it may sleep before another one. */
        uint32_t faults = atomic_load_explicit(&memory_faults, memory_order_relaxed);
        if (unlikely(q->faults_seen != faults)) {
            q->faults_seen = faults;
            if (memory_is_broken(q->memory) || ring_is_broken(q) || log_is_broken(q->log) ||
                inflight_is_broken(q->tracker))
                queue_break(q, VHOST_FAULT_MEMORY);
        }
    }
    return progress;
}

static bool reap_uring(struct vhost_iothread *t)
{
    struct io_uring_cqe *cqe;
    unsigned head, n = 0;

    if (io_uring_sq_ready(&t->uring))
        io_uring_submit(&t->uring);
    if (io_uring_peek_cqe(&t->uring, &cqe) != 0)
        return false;
    t->now = now_ns();
    io_uring_for_each_cqe(&t->uring, head, cqe)
    {
        struct io_op *op = io_uring_cqe_get_data(cqe);
        op->done(op, cqe->res);
        n++;
    }
    io_uring_cq_advance(&t->uring, n);
    return true;
}

static void settle(struct vhost_iothread *t)
{
    struct vhost_queue *next;

    for (struct vhost_queue *q = t->queues; q; q = next) {
        next = q->next;
        if (unlikely(q->draining != NULL))
            queue_settle(q);
    }
}

/* Sends queues that were idle for the window to sleep: true if none is left polling. */
static bool retire_idle(struct vhost_iothread *t, uint64_t now)
{
    if (t->config.flags & VHOST_IOTHREAD_POLL_ALWAYS)
        return false;
    for (uint32_t i = 0; i < t->num_polling;) {
        struct vhost_queue *q = t->polling[i];
        bool only_polled = q->kick_fd < 0 && !q->no_kicks;
        bool waits = !q->blocked && (only_polled || now - q->active_ns < t->poll_ns);
        if (waits) {
            i++;
        } else if (!q->blocked && !q->no_kicks && ring_arm(q)) {
            ring_disarm(q);
            q->active_ns = now;
            i++;
        } else {
            stop_polling(t, i);
        }
    }
    return t->num_polling == 0;
}

static void on_event(uint64_t data)
{
    void *ptr = (void *)(uintptr_t)(data & ~(uint64_t)TAG_MASK);

    switch (data & TAG_MASK) {
    case TAG_KICK: {
        struct vhost_queue *q = ptr;
        count(q, VHOST_COUNTER_KICKS, 1);
        iothread_schedule(q);
        break;
    }
    case TAG_WATCH: {
        struct watch *w = ptr;
        w->ready(w);
        break;
    }
    default: /* TAG_WAKE, TAG_URING: the pass looks at both anyway */
        break;
    }
}

static void adapt_window(struct vhost_iothread *t, uint64_t slept_ns)
{
    if (slept_ns <= t->poll_ns)
        return;
    if (slept_ns < t->poll_max_ns) {
        uint64_t wider = t->poll_ns ? 2 * t->poll_ns : POLL_FLOOR_NS;
        t->poll_ns = wider < t->poll_max_ns ? wider : t->poll_max_ns;
    } else {
        t->poll_ns /= 2;
        if (t->poll_ns < POLL_FLOOR_NS)
            t->poll_ns = 0;
    }
    __atomic_store_n(&t->stats.poll_ns, t->poll_ns, __ATOMIC_RELAXED);
}

static void sleep_until_event(struct vhost_iothread *t, uint64_t now, int timeout)
{
    struct epoll_event events[EPOLL_BATCH];
    int n = epoll_wait(t->epoll_fd, events, EPOLL_BATCH, timeout);

    t->now = now_ns();
    if (timeout != 0) {
        adapt_window(t, t->now - now);
        __atomic_store_n(&t->stats.wakeups, t->stats.wakeups + 1, __ATOMIC_RELAXED);
    }
    for (int i = 0; i < n; i++)
        on_event(events[i].data.u64);
}

void iothread_loop(struct vhost_iothread *t)
{
    uint64_t looked_ns = 0;

    while (!atomic_load_explicit(&t->stop, memory_order_relaxed)) {
        if (atomic_load_explicit(&t->mail, memory_order_acquire))
            iothread_take_mail(t);
        bool progress = serve_polling(t);
        if (t->has_uring)
            progress |= reap_uring(t);
        iothread_publish(t);
        settle(t);

        uint64_t now = now_ns();
        if (progress) {
            for (uint32_t i = 0; i < t->num_polling; i++) {
                if (t->polling[i]->active_ns == 0)
                    t->polling[i]->active_ns = now;
            }
        }
        /* A busy or polling queue must not keep kicks of the others waiting. */
        if (progress || !retire_idle(t, now)) {
            if (now - looked_ns > LOOK_NS) {
                looked_ns = now;
                sleep_until_event(t, now, 0);
            } else if (!progress) {
                cpu_relax();
            }
            continue;
        }
        if (t->has_uring && io_uring_sq_ready(&t->uring))
            continue;
        sleep_until_event(t, now, -1);
    }
}
