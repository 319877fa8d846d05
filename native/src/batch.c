/*
 * Batches: a device whose requests are worked on by the control thread, in whatever language that
 * is.  The iothread goes on to own the rings; only chains cross over.
 *
 *               pop                take                 complete
 *   avail ring ----> [ waiting ] <------> { taken } --------------> [ done ] ----> used ring
 *        ^               |       give back                                 push, publish, call
 *        +---------------+
 *           un-pop, when the queue drains
 *
 * The iothread pops ahead, up to a bound, and posts one event when chains come to wait where none
 * did.  The control thread takes what it has use for; what it completes is left in a list that
 * the iothread empties, woken once however long the list has become.
 *
 * A drain must not wait for the control thread's appetite.  So chains that wait are un-popped,
 * newest first; each has a number in the order of popping, and the one popped last can go back.
 * A chain that was given back after a later one had been completed cannot: the avail index would
 * have to pass over that one.  It is completed with length 0.
 *
 * While a chain is out its queue has not drained, so its memory table stays; the control thread
 * gets a reference of its own to it, for pointers that it may keep for longer than the chain.
 */
#include "internal.h"
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

enum batch_state { WAITING, TAKEN, DONE };

struct batch_chain {
    struct batch_chain *prev, *next; /* of those waiting; of those done only next */
    enum batch_state state;
    uint64_t number;
    uint64_t taken_ns;
    uint64_t readable_len, writable_len;
    uint32_t readable, writable, written;
    uint16_t head;
    struct vhost_buffer buffer[];
};

struct batch_queue {
    struct io_op op; /* wakes the iothread */
    struct vhost_queue *q;

    pthread_mutex_t lock;             /* of all that follows, up to the iothread's own */
    struct batch_chain *first, *last; /* waiting, in the order of popping */
    struct batch_chain *done;         /* newest first */
    struct batch_chain **by_head;     /* all that are popped */
    struct vhost_iothread *thread;
    uint32_t taken;
    bool posted;    /* op is under way */
    bool announced; /* the control thread was told, and has not yet taken all that wait */
    bool recalled;  /* what waits goes back into the ring; written by the iothread alone */

    uint64_t next_number; /* the iothread's own */
    uint32_t chains, buffers;
};

struct batch {
    struct vhost_device device;
    struct vhost_events *events;
    struct batch_queue *queue[]; /* those that are open; the control thread's own */
};

static struct batch *batch_of(struct vhost_device *device)
{
    return container_of(device, struct batch, device);
}

static void tell(struct vhost_queue *q, enum vhost_event_kind kind)
{
    struct vhost_event event = {.kind = kind, .token = q->index};

    events_post(batch_of(q->device)->events, &event);
}

/* ---- the list of those waiting; under the lock ---- */

static void waiting_remove(struct batch_queue *b, struct batch_chain *c)
{
    *(c->prev ? &c->prev->next : &b->first) = c->next;
    *(c->next ? &c->next->prev : &b->last) = c->prev;
    if (!b->first)
        b->announced = false;
}

/* In the order of popping: those that are given back are older than the rest. */
static void waiting_insert(struct batch_queue *b, struct batch_chain *c)
{
    struct batch_chain *next = b->first;

    while (next && next->number < c->number)
        next = next->next;
    c->state = WAITING;
    c->next = next;
    c->prev = next ? next->prev : b->last;
    *(c->prev ? &c->prev->next : &b->first) = c;
    *(next ? &next->prev : &b->last) = c;
}

static void waiting_append(struct batch_queue *b, struct batch_chain *c)
{
    c->prev = b->last;
    *(b->last ? &b->last->next : &b->first) = c;
    b->last = c;
}

/* ---- the iothread's end ---- */

static struct batch_chain *chain_copy(struct vhost_queue *q, const struct chain *c)
{
    uint32_t n = c->readable + c->writable, hint = 0;
    struct batch_chain *copy = malloc(sizeof(*copy) + n * sizeof(copy->buffer[0]));

    if (!copy)
        return NULL;
    *copy = (struct batch_chain){
        .state = WAITING,
        .readable_len = c->readable_len,
        .writable_len = c->writable_len,
        .readable = c->readable,
        .writable = c->writable,
        .head = c->head,
    };
    for (uint32_t i = 0; i < n; i++) {
        copy->buffer[i] = (struct vhost_buffer){
            .base = c->iov[i].iov_base,
            .size = c->iov[i].iov_len,
            .guest_addr = memory_guest_addr(q->memory, c->iov[i].iov_base, &hint),
        };
    }
    return copy;
}

/* The chain is in no list any more and leaves the device. */
static void chain_free(struct batch_queue *b, struct batch_chain *c)
{
    b->chains--;
    b->buffers -= c->readable + c->writable;
    free(c);
}

static void push(struct vhost_queue *q, uint16_t head, uint32_t written)
{
    ring_push(q, head, written);
    count(q, VHOST_COUNTER_COMPLETIONS, 1);
    count(q, VHOST_COUNTER_BYTES_READ, written);
}

/* What the control thread says that it wrote. */
static cold_path void log_chain(struct vhost_queue *q, const struct batch_chain *c)
{
    const struct vhost_buffer *buffer = &c->buffer[c->readable];

    for (uint32_t left = c->written; left; buffer++) {
        uint32_t part = buffer->size < left ? (uint32_t)buffer->size : left;
        log_mark(q, buffer->guest_addr, part);
        left -= part;
    }
}

static bool is_full(const struct batch_queue *b)
{
    return b->chains >= VHOST_BATCH_CHAINS || b->buffers >= VHOST_BATCH_BUFFERS;
}

static bool service(struct vhost_queue *q)
{
    struct batch_queue *b = q->state;
    struct chain c;
    uint32_t popped = 0;
    bool announce = false;

    q->no_kicks = true;
    if (!queue_may_pop(q) || !q->enabled)
        return false;
    uint32_t pending = ring_pending(q);
    if (pending || b->recalled) {
        pthread_mutex_lock(&b->lock);
        b->recalled = false;
        b->thread = q->thread;
        for (; pending && !is_full(b) && ring_pop(q, &c); pending--, popped++) {
            struct batch_chain *copy = chain_copy(q, &c);
            if (!copy) {
                push(q, c.head, 0);
                continue;
            }
            copy->number = b->next_number++;
            b->chains++;
            b->buffers += c.readable + c.writable;
            b->by_head[c.head] = copy;
            waiting_append(b, copy);
        }
        announce = b->first && !b->announced && popped;
        b->announced |= announce;
        pthread_mutex_unlock(&b->lock);
    }
    q->no_kicks = is_full(b); /* until chains come back */
    if (popped) {
        count(q, VHOST_COUNTER_REQUESTS, popped);
        count(q, VHOST_COUNTER_BATCHES, 1);
    }
    if (announce)
        tell(q, VHOST_EVENT_CHAINS);
    return popped != 0;
}

/* Puts what waits back into the ring.  Returns how many the control thread still has.
 *
 * While mail is under way nothing goes back, as it does when that arrives: with its last chain the
 * queue would leave the thread before its mail. */
static uint32_t reclaim(struct vhost_queue *q, struct batch_queue *b)
{
    struct batch_chain *c;

    pthread_mutex_lock(&b->lock);
    while (!b->posted && (c = b->last) && c->number == b->next_number - 1) {
        waiting_remove(b, c);
        b->by_head[c->head] = NULL;
        b->next_number--;
        ring_unpop(q, c->head);
        chain_free(b, c);
    }
    /* A later one may still be given back, and then both can go. */
    while (!b->posted && b->taken == 0 && (c = b->first)) {
        waiting_remove(b, c);
        b->by_head[c->head] = NULL;
        push(q, c->head, 0);
        chain_free(b, c);
    }
    uint32_t taken = b->taken;
    pthread_mutex_unlock(&b->lock);
    return taken;
}

static void quiesce(struct vhost_queue *q)
{
    struct batch_queue *b = q->state;

    pthread_mutex_lock(&b->lock);
    b->recalled = true;
    pthread_mutex_unlock(&b->lock);
    if (reclaim(q, b))
        tell(q, VHOST_EVENT_RECALL);
}

static void on_mail(struct io_op *op, int32_t ignored)
{
    struct batch_queue *b = container_of(op, struct batch_queue, op);
    struct vhost_queue *q = b->q;
    uint64_t now = iothread_now(q->thread);
    struct batch_chain *newest_first, *c = NULL;

    (void)ignored;
    pthread_mutex_lock(&b->lock);
    b->posted = false;
    newest_first = b->done;
    b->done = NULL;
    while (newest_first) {
        struct batch_chain *next = newest_first->next;
        b->by_head[newest_first->head] = NULL;
        newest_first->next = c;
        c = newest_first;
        newest_first = next;
    }
    pthread_mutex_unlock(&b->lock);
    while (c) {
        struct batch_chain *next = c->next;
        if (unlikely(q->log))
            log_chain(q, c);
        push(q, c->head, c->written);
        count(q, VHOST_COUNTER_BYTES_WRITTEN, c->readable_len);
        count_latency(q, now - c->taken_ns);
        chain_free(b, c);
        c = next;
    }
    if (b->recalled)
        reclaim(q, b);
    iothread_schedule(q);
}

/* ---- the control thread's end ---- */

static void wake(struct batch_queue *b)
{
    if (b->posted)
        return;
    b->posted = true;
    iothread_complete(b->thread, &b->op, 0);
}

static struct batch_queue *find(struct vhost_device *device, uint32_t index)
{
    return index < device->num_queues ? batch_of(device)->queue[index] : NULL;
}

static struct batch_chain *find_taken(struct batch_queue *b, uint32_t id)
{
    struct batch_chain *c = id < b->q->ring.size ? b->by_head[id] : NULL;

    return c && c->state == TAKEN ? c : NULL;
}

int vhost_batch_take(struct vhost_device *device, uint32_t index, struct vhost_chain *out,
                     uint32_t max, struct vhost_memory **memory)
{
    struct batch_queue *b = find(device, index);
    struct batch_chain *c;
    uint32_t n = 0;

    if (!b)
        return 0;
    uint64_t now = now_ns();
    pthread_mutex_lock(&b->lock);
    for (; n < max && !b->recalled && (c = b->first); n++) {
        waiting_remove(b, c);
        c->state = TAKEN;
        c->taken_ns = now;
        out[n] = (struct vhost_chain){
            .buffers = c->buffer,
            .readable_len = c->readable_len,
            .writable_len = c->writable_len,
            .readable = c->readable,
            .writable = c->writable,
            .id = c->head,
        };
    }
    b->taken += n;
    if (n) {
        *memory = b->q->memory;
        memory_ref(*memory);
    }
    pthread_mutex_unlock(&b->lock);
    return (int)n;
}

int vhost_batch_complete(struct vhost_device *device, uint32_t index,
                         const struct vhost_chain_done *done, uint32_t count)
{
    struct batch_queue *b = find(device, index);
    uint32_t n = 0;
    int err = 0;

    if (!b)
        return count ? -EINVAL : 0;
    pthread_mutex_lock(&b->lock);
    for (; n < count && !err; n++) {
        struct batch_chain *c = find_taken(b, done[n].id);
        if (!c) {
            err = -EINVAL;
            break;
        }
        if (done[n].written > c->writable_len) {
            err = -ERANGE;
            break;
        }
        c->written = done[n].written;
        c->state = DONE;
    }
    for (uint32_t i = 0; i < n; i++) {
        struct batch_chain *c = b->by_head[done[i].id];
        if (err) {
            c->state = TAKEN;
            continue;
        }
        c->next = b->done;
        b->done = c;
    }
    if (!err && n) {
        b->taken -= n;
        wake(b);
    }
    pthread_mutex_unlock(&b->lock);
    return err;
}

int vhost_batch_give_back(struct vhost_device *device, uint32_t index, uint32_t id)
{
    struct batch_queue *b = find(device, index);

    if (!b)
        return -EINVAL;
    pthread_mutex_lock(&b->lock);
    struct batch_chain *c = find_taken(b, id);
    if (c) {
        b->taken--;
        waiting_insert(b, c);
        if (b->recalled)
            wake(b);
    }
    pthread_mutex_unlock(&b->lock);
    return c ? 0 : -EINVAL;
}

/* ---- life ---- */

static int queue_open(struct vhost_queue *q)
{
    struct batch *device = batch_of(q->device);

    if (device->queue[q->index])
        return -EBUSY;
    struct batch_queue *b = calloc(1, sizeof(*b));
    struct batch_chain **by_head = calloc(q->ring.size, sizeof(struct batch_chain *));
    if (!b || !by_head) {
        free(b);
        free(by_head);
        return -ENOMEM;
    }
    pthread_mutex_init(&b->lock, NULL);
    b->q = q;
    b->op.done = on_mail;
    b->by_head = by_head;
    q->state = b;
    device->queue[q->index] = b;
    return 0;
}

static void queue_close(struct vhost_queue *q)
{
    struct batch_queue *b = q->state;

    batch_of(q->device)->queue[q->index] = NULL;
    pthread_mutex_destroy(&b->lock);
    free(b->by_head);
    free(b);
}

static void batch_free(struct vhost_device *device)
{
    free(batch_of(device));
}

int vhost_batch_new(uint32_t num_queues, struct vhost_events *events, struct vhost_device **out)
{
    static const struct device_ops ops = {
        .queue_open = queue_open,
        .queue_close = queue_close,
        .service = service,
        .quiesce = quiesce,
        .free = batch_free,
    };
    if (num_queues == 0)
        return -EINVAL;
    struct batch *b = calloc(1, sizeof(*b) + num_queues * sizeof(struct batch_queue *));
    if (!b)
        return -ENOMEM;
    int err = device_init(&b->device, &ops, num_queues);
    if (err < 0) {
        free(b);
        return err;
    }
    b->events = events;
    *out = &b->device;
    return 0;
}
