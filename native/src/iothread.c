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
#include "internal.h"
#include <errno.h>
#include <liburing.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { URING_ENTRIES = 256, EPOLL_BATCH = 64, POLL_FLOOR_NS = 2000, LOOK_NS = 50000 };

/* What an epoll event's data points to is told by its low bits (all are 8-byte aligned). */
enum { TAG_WATCH = 0, TAG_KICK = 1, TAG_WAKE = 2, TAG_URING = 3, TAG_MASK = 3 };

struct vhost_iothread {
    struct vhost_iothread_config config;
    struct vhost_events *events;
    pthread_t thread;
    sem_t ready;
    int epoll_fd, wake_fd, error;
    pid_t tid;

    pthread_mutex_t lock; /* messages, completions */
    struct queue_message *message, **message_tail;
    struct io_op *completed;
    atomic_bool mail; /* either list has something */
    atomic_bool stop;
    atomic_uint num_queues;

    struct io_uring uring;
    bool has_uring;
    struct vhost_queue *queues;
    struct vhost_queue *dirty;
    struct vhost_queue **polling;
    uint32_t num_polling;
    uint64_t poll_ns, poll_max_ns;
    uint64_t now; /* read once for each batch of events, completions or messages */
    struct vhost_iothread_stats stats;
};

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

/* ---- mail from other threads ---- */

static void wake(struct vhost_iothread *t)
{
    if (!atomic_exchange(&t->mail, true))
        eventfd_write(t->wake_fd, 1);
}

int iothread_post(struct vhost_iothread *t, struct queue_message *m)
{
    /* Counted here, by the control thread, so that a free right after a start sees it. */
    if (m->op == QUEUE_START)
        atomic_fetch_add(&t->num_queues, 1);
    m->next = NULL;
    pthread_mutex_lock(&t->lock);
    *t->message_tail = m;
    t->message_tail = &m->next;
    pthread_mutex_unlock(&t->lock);
    wake(t);
    return 0;
}

void iothread_complete(struct vhost_iothread *t, struct io_op *op, int32_t result)
{
    op->result = result;
    pthread_mutex_lock(&t->lock);
    op->next = t->completed;
    t->completed = op;
    /* Under the lock: once the iothread has the op, nothing keeps it from being freed. */
    wake(t);
    pthread_mutex_unlock(&t->lock);
}

static void take_mail(struct vhost_iothread *t)
{
    atomic_store(&t->mail, false);
    pthread_mutex_lock(&t->lock);
    struct queue_message *m = t->message;
    struct io_op *op = t->completed;
    t->message = NULL;
    t->message_tail = &t->message;
    t->completed = NULL;
    pthread_mutex_unlock(&t->lock);

    t->now = now_ns();
    while (op) {
        struct io_op *next = op->next;
        op->done(op, op->result);
        op = next;
    }
    while (m) {
        struct queue_message *next = m->next;
        queue_handle(m);
        m = next;
    }
}

/* ---- queues ---- */

static int epoll_add(struct vhost_iothread *t, int fd, uint32_t events, void *ptr, unsigned tag)
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
        err = epoll_add(t, q->kick_fd, EPOLLIN | EPOLLET, q, TAG_KICK);
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
    return fd >= 0 ? epoll_add(t, fd, EPOLLIN | EPOLLET, q, TAG_KICK) : 0;
}

void iothread_schedule(struct vhost_queue *q)
{
    struct vhost_iothread *t = q->thread;

    q->active_ns = t->now;
    if (q->polling || q->broken)
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
            if (memory_is_broken(q->memory))
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
        bool waits = !q->broken && (only_polled || now - q->active_ns < t->poll_ns);
        if (waits) {
            i++;
        } else if (!q->broken && !q->no_kicks && ring_arm(q)) {
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

static void loop(struct vhost_iothread *t)
{
    uint64_t looked_ns = 0;

    while (!atomic_load_explicit(&t->stop, memory_order_relaxed)) {
        if (atomic_load_explicit(&t->mail, memory_order_acquire))
            take_mail(t);
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

/* ---- life ---- */

static int uring_open(struct vhost_iothread *t)
{
    if (t->config.flags & VHOST_IOTHREAD_NO_IO_URING)
        return 0;
    /* One submitter, and completions taken when we enter the kernel anyway (Linux 6.0, 5.19). */
    unsigned flags =
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG;
    int err = io_uring_queue_init(URING_ENTRIES, &t->uring, flags);
    if (err == -EINVAL)
        err = io_uring_queue_init(URING_ENTRIES, &t->uring, 0);
    if (err < 0)
        return 0; /* refused: the devices use their worker pools */
    t->has_uring = true;
    return epoll_add(t, t->uring.ring_fd, EPOLLIN, NULL, TAG_URING);
}

static void *run(void *arg)
{
    struct vhost_iothread *t = arg;

    pthread_setname_np(pthread_self(), "vdev-io");
    t->tid = (pid_t)syscall(SYS_gettid);
    if (t->config.cpu >= 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(t->config.cpu, &set);
        if (sched_setaffinity(0, sizeof(set), &set) < 0)
            t->error = -errno;
    }
    if (!t->error)
        t->error = uring_open(t);
    bool run_loop = !t->error;
    sem_post(&t->ready);
    if (run_loop)
        loop(t);
    if (t->has_uring)
        io_uring_queue_exit(&t->uring);
    return NULL;
}

static void destroy(struct vhost_iothread *t)
{
    close(t->epoll_fd);
    close(t->wake_fd);
    sem_destroy(&t->ready);
    pthread_mutex_destroy(&t->lock);
    free(t->polling);
    free(t);
}

int vhost_iothread_new(const struct vhost_iothread_config *config, struct vhost_events *events,
                       struct vhost_iothread **out)
{
    struct vhost_iothread *t = calloc(1, sizeof(*t));
    sigset_t all, before;

    if (!t)
        return -ENOMEM;
    t->config = *config;
    t->events = events;
    t->message_tail = &t->message;
    t->poll_max_ns = (uint64_t)config->poll_max_us * 1000;
    t->poll_ns = t->poll_max_ns;
    pthread_mutex_init(&t->lock, NULL);
    sem_init(&t->ready, 0, 0);
    t->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    t->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (t->epoll_fd < 0 || t->wake_fd < 0) {
        int err = -errno;
        destroy(t);
        return err;
    }
    int err = epoll_add(t, t->wake_fd, EPOLLIN | EPOLLET, NULL, TAG_WAKE);
    /* Signals are the main thread's; SIGBUS is ours, it is raised by our own touch. */
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (err == 0)
        err = -pthread_create(&t->thread, NULL, run, t);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (err < 0) {
        destroy(t);
        return err;
    }
    while (sem_wait(&t->ready) < 0)
        ;
    if (t->error) {
        err = t->error;
        pthread_join(t->thread, NULL);
        destroy(t);
        return err;
    }
    *out = t;
    return 0;
}

int vhost_iothread_free(struct vhost_iothread *t)
{
    if (!t)
        return 0;
    if (atomic_load(&t->num_queues) > 0)
        return -EBUSY;
    atomic_store(&t->stop, true);
    eventfd_write(t->wake_fd, 1);
    pthread_join(t->thread, NULL);
    destroy(t);
    return 0;
}

bool vhost_iothread_has_io_uring(const struct vhost_iothread *t)
{
    return t->has_uring;
}

int vhost_iothread_tid(const struct vhost_iothread *t)
{
    return t->tid;
}

void vhost_iothread_read_stats(const struct vhost_iothread *t, struct vhost_iothread_stats *out)
{
    out->wakeups = __atomic_load_n(&t->stats.wakeups, __ATOMIC_RELAXED);
    out->poll_ns = __atomic_load_n(&t->stats.poll_ns, __ATOMIC_RELAXED);
}
