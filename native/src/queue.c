/*
 * The life of a served queue.
 *
 *   new --start--> running --stop--> drained --free
 *                   |   ^
 *                memory |  (drains, then goes on in the new table)
 *
 * Control reaches a running queue only by messages, which the iothread carries out between two
 * passes.  STOP and MEMORY wait in q->draining until nothing is in flight.  A queue whose view of
 * memory lacks a translation pops no more until it gets another view.  A broken queue pops
 * no more but still completes what it had popped, and still answers every message.
 */
#include "internal.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* Room for buffers that straddle regions, beyond one iovec a descriptor; pages that an IOMMU puts
 * together lie anywhere. */
enum { IOV_SLACK = 64, IOV_SLACK_VIEW = 512 };

static int dup_fd(int fd)
{
    if (fd < 0)
        return -1;
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return copy < 0 ? -errno : copy;
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* The peer owns the counter and may have filled it: a write must not block the iothread. */
static void signal_fd(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLOUT};

    if (fd >= 0 && poll(&p, 1, 0) == 1 && (p.revents & POLLOUT))
        eventfd_write(fd, 1);
}

static void set_call(struct vhost_queue *q, int fd)
{
    close_fd(&q->call_fd);
    q->call_fd = fd;
    int flags = fd >= 0 ? fcntl(fd, F_GETFL) : 0;
    q->call_blocks = flags >= 0 && !(flags & O_NONBLOCK);
}

/* Has the used ring logged at this address; in a view, wherever it lies. */
static void log_used_at(struct vhost_queue *q, uint64_t addr)
{
    q->log_used = q->memory->behind && addr != UINT64_MAX ? q->used_addr : addr;
}

static int queue_init(struct vhost_queue *q, const struct vhost_queue_config *config)
{
    if (q->memory->behind)
        q->ring.layout.pop = q->ring.layout.pop_in_view;
    int err = ring_map(q);
    if (err < 0)
        return err;
    err = ring_resume(q, config->next_index);
    if (err < 0)
        return err;
    q->chain_max = q->ops->chain_max > q->ring.size ? q->ops->chain_max : q->ring.size;
    q->iov_max = q->chain_max + (q->memory->behind ? IOV_SLACK_VIEW : IOV_SLACK);
    q->iov = calloc(q->iov_max, sizeof(*q->iov));
    q->table = calloc(q->chain_max, sizeof(*q->table));
    if (q->ring.packed) {
        q->lengths = calloc(q->ring.size, sizeof(*q->lengths));
        q->ring.unshown = calloc(q->ring.size, sizeof(*q->ring.unshown));
    } else {
        q->busy = calloc((q->ring.size + 63u) / 64, sizeof(*q->busy));
    }
    if (!q->iov || !q->table || !(q->ring.packed ? q->lengths && q->ring.unshown : !!q->busy))
        return -ENOMEM;
    if (config->inflight && (err = inflight_open(q, config->inflight)) < 0)
        return err;

    if (has_bit(q->features, VIRTIO_F_IN_ORDER) && (err = order_open(q)) < 0)
        return err;

    int kick = dup_fd(config->kick_fd), call = dup_fd(config->call_fd),
        error = dup_fd(config->err_fd);
    q->kick_fd = kick;
    set_call(q, call);
    q->err_fd = error;
    if (kick < -1 || call < -1 || error < -1)
        return -EMFILE;
    return q->ops->queue_open(q);
}

static void queue_destroy(struct vhost_queue *q)
{
    if (q->state)
        q->ops->queue_close(q);
    close_fd(&q->kick_fd);
    close_fd(&q->call_fd);
    close_fd(&q->err_fd);
    for (uint32_t i = 0; i < AREAS; i++)
        vhost_region_unref(q->joined[i]);
    vhost_memory_unref(q->memory);
    vhost_log_unref(q->log);
    inflight_close(q);
    order_close(q);
    free(q->iov);
    free(q->table);
    free(q->busy);
    free(q->lengths);
    if (q->ring.packed)
        free(q->ring.unshown);
    free(q);
}

int vhost_queue_new(const struct vhost_queue_config *config, struct vhost_device *device,
                    struct vhost_memory *memory, struct vhost_queue **out)
{
    bool packed = has_bit(config->features, VIRTIO_F_RING_PACKED);
    uint32_t size = config->size;

    if (config->index >= device->num_queues)
        return -ERANGE;
    /* Only split rings have a power of 2 (virtio 1.3, sections 2.7 and 2.8.10.1). */
    if (size == 0 || size > VIRTQUEUE_MAX_SIZE || (!packed && (size & (size - 1))))
        return -EINVAL;
    struct vhost_queue *q = calloc(1, sizeof(*q));
    if (!q)
        return -ENOMEM;
    memory_ref(memory);
    q->memory = memory;
    log_ref(config->log);
    q->log = config->log;
    q->faults_seen = atomic_load(&memory_faults);
    q->device = device;
    q->ops = device->ops;
    q->index = config->index;
    q->stats = &device->stats[config->index];
    q->features = config->features;
    q->token = config->token;
    q->enabled = config->enabled;
    q->kick_fd = q->call_fd = q->err_fd = -1;
    q->desc_addr = config->desc;
    q->avail_addr = config->avail;
    q->used_addr = config->used;
    log_used_at(q, config->log_used);
    q->ring = (struct ring){
        .layout = packed ? ring_packed : ring_split,
        .packed = packed,
        .size = (uint16_t)size,
        .event_idx = has_bit(config->features, VIRTIO_F_EVENT_IDX),
        .indirect = has_bit(config->features, VIRTIO_F_INDIRECT_DESC),
    };
    int err = queue_init(q, config);
    if (err < 0) {
        queue_destroy(q);
        return err;
    }
    *out = q;
    return 0;
}

int vhost_queue_free(struct vhost_queue *q)
{
    if (!q)
        return 0;
    if (atomic_load(&q->home) || atomic_load(&q->unanswered))
        return -EBUSY;
    queue_destroy(q);
    return 0;
}

void queue_break(struct vhost_queue *q, enum vhost_fault fault)
{
    if (q->broken)
        return;
    q->broken = q->blocked = true;
    /* What was read out of memory that went away looks like many faults, but it is one. */
    if (memory_is_broken(q->memory) || ring_is_broken(q))
        fault = VHOST_FAULT_MEMORY;
    else if (log_is_broken(q->log))
        fault = VHOST_FAULT_LOG;
    else if (inflight_is_broken(q->tracker))
        fault = VHOST_FAULT_INFLIGHT;
    count(q, VHOST_COUNTER_BREAKS, 1);
    signal_fd(q->err_fd);
    struct vhost_event event = {.kind = VHOST_EVENT_BROKEN, .token = q->token, .value = fault};
    events_post(iothread_events(q->thread), &event);
}

void queue_wait_for_view(struct vhost_queue *q)
{
    if (q->blocked)
        return;
    q->blocked = true;
    struct vhost_event event = {
        .kind = VHOST_EVENT_MISS, .token = q->token, .result = q->lacks, .value = q->lacks_addr};
    events_post(iothread_events(q->thread), &event);
}

/* Goes over to `memory`, whose reference becomes the queue's. */
static void go_over(struct vhost_queue *q, struct vhost_memory *memory)
{
    vhost_memory_unref(q->memory);
    q->memory = memory;
    q->memory_hint = 0;
    q->lacks = 0;
    q->blocked = q->broken;
}

/* ---- messages: the control thread's end ---- */

/* Gives back what a message holds and was not carried out. */
static void release(struct queue_message *m)
{
    close_fd(&m->fd);
    vhost_memory_unref(m->memory);
    vhost_log_unref(m->log);
}

/* What the message holds is the library's from here on. */
static int post(struct vhost_queue *q, struct queue_message message)
{
    struct vhost_iothread *thread = atomic_load(&q->home);
    struct queue_message *m = thread ? malloc(sizeof(*m)) : NULL;

    if (!m) {
        release(&message);
        return thread ? -ENOMEM : -EINVAL;
    }
    *m = message;
    m->queue = q;
    m->thread = thread;
    atomic_fetch_add(&q->unanswered, 1);
    return iothread_post(thread, m);
}

static int post_fd(struct vhost_queue *q, enum queue_op op, int fd, uint64_t token)
{
    int copy = dup_fd(fd);
    if (copy < -1)
        return copy;
    return post(q, (struct queue_message){.op = op, .fd = copy, .token = token});
}

int vhost_queue_start(struct vhost_queue *q, struct vhost_iothread *thread, uint64_t token)
{
    if (atomic_load(&q->home))
        return -EBUSY;
    atomic_store(&q->home, thread);
    int err = post(q, (struct queue_message){.op = QUEUE_START, .fd = -1, .token = token});
    if (err < 0)
        atomic_store(&q->home, NULL);
    return err;
}

int vhost_queue_stop(struct vhost_queue *q, uint64_t token)
{
    return post(q, (struct queue_message){.op = QUEUE_STOP, .fd = -1, .token = token});
}

int vhost_queue_suspend(struct vhost_queue *q, uint64_t token)
{
    return post(
        q, (struct queue_message){.op = QUEUE_STOP, .fd = -1, .suspend = true, .token = token});
}

int vhost_queue_set_call(struct vhost_queue *q, int fd, uint64_t token)
{
    return post_fd(q, QUEUE_CALL, fd, token);
}

int vhost_queue_set_err(struct vhost_queue *q, int fd, uint64_t token)
{
    return post_fd(q, QUEUE_ERR, fd, token);
}

int vhost_queue_set_kick(struct vhost_queue *q, int fd, uint64_t token)
{
    return post_fd(q, QUEUE_KICK, fd, token);
}

int vhost_queue_set_enabled(struct vhost_queue *q, bool enabled, uint64_t token)
{
    return post(q, (struct queue_message){
                       .op = QUEUE_ENABLE, .fd = -1, .enabled = enabled, .token = token});
}

int vhost_queue_set_memory(struct vhost_queue *q, struct vhost_memory *memory, uint64_t token)
{
    memory_ref(memory);
    return post(
        q, (struct queue_message){.op = QUEUE_MEMORY, .fd = -1, .memory = memory, .token = token});
}

int vhost_queue_extend_memory(struct vhost_queue *q, struct vhost_memory *memory, uint64_t token)
{
    memory_ref(memory);
    return post(
        q, (struct queue_message){.op = QUEUE_EXTEND, .fd = -1, .memory = memory, .token = token});
}

int vhost_queue_set_log(struct vhost_queue *q, struct vhost_log *log, uint64_t used, uint64_t token)
{
    log_ref(log);
    return post(q, (struct queue_message){
                       .op = QUEUE_LOG, .fd = -1, .log = log, .log_used = used, .token = token});
}

/* ---- messages: the iothread's end ---- */

/* Answers and frees the message.  Once a stop is answered the queue is the control thread's. */
static void answer(struct queue_message *m, int result, uint64_t value)
{
    struct vhost_queue *q = m->queue;
    struct vhost_events *events = iothread_events(m->thread);
    struct vhost_event event = {
        .kind = VHOST_EVENT_DONE, .token = m->token, .result = result, .value = value};

    log_flush(q);
    if (!q->thread)
        atomic_store(&q->home, NULL);
    free(m);
    atomic_fetch_sub(&q->unanswered, 1);
    events_post(events, &event);
}

static void start(struct queue_message *m)
{
    struct vhost_queue *q = m->queue;
    int err = iothread_add_queue(m->thread, q);

    if (err == 0) {
        q->thread = m->thread;
        iothread_schedule(q);
        /* A server that was killed may have shown chains and not called; with EVENT_IDX the driver
         * would never be called again. */
        if (q->tracker || q->ring.used_idx)
            signal_fd(q->call_fd);
    }
    answer(m, err, 0);
}

static void begin_drain(struct queue_message *m)
{
    struct vhost_queue *q = m->queue;

    if (q->draining) {
        release(m);
        answer(m, -EBUSY, 0);
        return;
    }
    q->draining = m;
    /* In order, what is done waits for what is not: nothing can be left. */
    q->leaving = m->suspend && q->tracker && !q->order;
    if (q->ops->quiesce)
        q->ops->quiesce(q);
    if (q->leaving && q->ops->recall)
        q->ops->recall(q);
    queue_settle(q);
}

void queue_settle(struct vhost_queue *q)
{
    struct queue_message *m = q->draining;

    if (!m || q->in_flight || (queue_resumes(q) && q->enabled && !q->blocked && !q->leaving))
        return;
    q->draining = NULL;
    if (q->dirty)
        iothread_publish(q->thread);
    if (m->op == QUEUE_STOP) {
        if (q->ops->detach)
            q->ops->detach(q);
        iothread_remove_queue(q->thread, q);
        q->thread = NULL;
        q->leaving = false;
        answer(m, 0, ring_next_index(q));
        return;
    }
    go_over(q, m->memory);
    if (ring_map(q) < 0)
        queue_break(q, VHOST_FAULT_RING_UNMAPPED);
    /* Settled at the end of a pass: what the device waited for there may be over. */
    q->no_kicks = false;
    iothread_schedule(q);
    answer(m, 0, 0);
}

void queue_handle(struct queue_message *m)
{
    struct vhost_queue *q = m->queue;
    int err = 0;

    if (!q->thread && m->op != QUEUE_START) {
        /* It was posted behind a stop. */
        release(m);
        answer(m, -EINVAL, 0);
        return;
    }
    switch (m->op) {
    case QUEUE_START:
        start(m);
        return;
    case QUEUE_STOP:
    case QUEUE_MEMORY:
        begin_drain(m);
        return;
    case QUEUE_CALL:
        set_call(q, m->fd);
        /* Whoever waits on the new one may have missed calls to the old one. */
        signal_fd(q->call_fd);
        break;
    case QUEUE_ERR:
        close_fd(&q->err_fd);
        q->err_fd = m->fd;
        break;
    case QUEUE_KICK:
        err = iothread_set_kick(q->thread, q, m->fd);
        iothread_schedule(q);
        break;
    case QUEUE_ENABLE:
        q->enabled = m->enabled;
        if (!q->enabled && q->ops->quiesce)
            q->ops->quiesce(q);
        iothread_schedule(q);
        break;
    case QUEUE_EXTEND:
        go_over(q, m->memory);
        iothread_schedule(q);
        break;
    case QUEUE_LOG:
        /* Without a drain: each request is logged when it completes, wherever it began. */
        log_flush(q);
        vhost_log_unref(q->log);
        q->log = m->log;
        log_used_at(q, m->log_used);
        break;
    }
    answer(m, err, 0);
}
