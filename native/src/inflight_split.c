/*
 * In-flight tracking of split rings.  Every store of these matters (see inflight.c):
 *
 *   pop      counter; inflight = 1
 *   show     next for each of the batch, last_batch_head
 *            used.idx
 *            inflight = 0 for each of the batch, used_idx
 *
 * Until used_idx is equal to the ring's, the list that begins with last_batch_head tells what the
 * flags do not yet.
 */
#include "inflight.h"
#include "split.h"
#include <errno.h>
#include <stdlib.h>

/* ---- what an earlier server left ---- */

/* What is read of a chain, once. */
struct found {
    uint64_t counter;
    uint16_t next;
    bool inflight, batched;
};

static int read_chains(const struct tracker *t, uint32_t ring_size, struct found *found)
{
    for (uint32_t i = 0; i < t->region->queue_size; i++) {
        const struct vhost_user_inflight_chain *c = &t->split.chain[i];
        uint8_t flag = __atomic_load_n(&c->inflight, __ATOMIC_RELAXED);
        if (flag > (i < ring_size))
            return -EBADMSG;
        if (i >= ring_size)
            continue;
        found[i] = (struct found){
            .counter = __atomic_load_n(&c->counter, __ATOMIC_RELAXED),
            .next = __atomic_load_n(&c->next, __ATOMIC_RELAXED),
            .inflight = flag,
        };
    }
    return 0;
}

/* The driver has these `n` chains, whatever their flags say; follows the list that tells which. */
static int finish_batch(struct found *found, uint32_t ring_size, uint16_t head, uint16_t n)
{
    for (; n; n--, head = found[head].next) {
        if (head >= ring_size || found[head].batched)
            return -EBADMSG;
        found[head].batched = true;
    }
    return 0;
}

/* Goes on from what is noted: checks all of it, then has the region say it in full. */
static int go_on(struct vhost_queue *q, struct found *found, struct noted *noted)
{
    struct tracker *t = q->tracker;
    struct vhost_user_inflight_split *shared = t->split.shared;
    uint32_t size = q->ring.size;
    uint16_t used_idx = q->ring.used_idx;
    uint16_t shown = used_idx - __atomic_load_n(&shared->used_idx, __ATOMIC_RELAXED);

    t->split.last_batch_head = __atomic_load_n(&shared->last_batch_head, __ATOMIC_RELAXED);
    if (__atomic_load_n(&shared->desc_num, __ATOMIC_RELAXED) != t->region->queue_size)
        return -EBADMSG;
    int err = read_chains(t, size, found);
    if (err == 0)
        err = finish_batch(found, size, t->split.last_batch_head, shown);
    if (err < 0)
        return err;
    for (uint16_t i = 0; i < size; i++) {
        if (found[i].batched)
            __atomic_store_n(&t->split.chain[i].inflight, 0, __ATOMIC_RELAXED);
        else if (found[i].inflight)
            noted[t->num_again++] = (struct noted){.counter = found[i].counter, .head = i};
    }
    inflight_order();
    __atomic_store_n(&shared->used_idx, used_idx, __ATOMIC_RELAXED);
    inflight_sort(t, noted);
    for (uint32_t i = 0; i < t->num_again; i++)
        t->split.again[(used_idx + i) & (size - 1)] = noted[i].head;
    q->ring.next_avail = used_idx;
    if (t->num_again)
        q->ring.heads = t->split.again;
    return 0;
}

static int resume(struct vhost_queue *q)
{
    struct found *found = calloc(q->ring.size, sizeof(*found));
    struct noted *noted = calloc(q->ring.size, sizeof(*noted));
    int err = found && noted ? go_on(q, found, noted) : -ENOMEM;

    free(found);
    free(noted);
    return err;
}

/* ---- life ---- */

static int alloc(struct vhost_queue *q, void *shared)
{
    struct tracker *t = q->tracker;

    t->split.shared = shared;
    t->split.chain = (void *)(t->split.shared + 1);
    t->split.heads = q->ring.heads;
    t->split.again = calloc(q->ring.size, sizeof(*t->split.again));
    t->split.batch = calloc(t->region->queue_size, sizeof(*t->split.batch));
    return t->split.again && t->split.batch ? 0 : -ENOMEM;
}

static void free_tracker(struct tracker *t)
{
    free(t->split.again);
    free(t->split.batch);
}

static uint16_t version(const struct tracker *t)
{
    return __atomic_load_n(&t->split.shared->version, __ATOMIC_RELAXED);
}

/* Nothing was noted there yet; the version tells that all else is in place. */
static void begin(struct vhost_queue *q)
{
    struct tracker *t = q->tracker;
    struct vhost_user_inflight_split *shared = t->split.shared;

    for (uint32_t i = 0; i < t->region->queue_size; i++)
        __atomic_store_n(&t->split.chain[i].inflight, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&shared->desc_num, (uint16_t)t->region->queue_size, __ATOMIC_RELAXED);
    __atomic_store_n(&shared->used_idx, q->ring.used_idx, __ATOMIC_RELAXED);
    inflight_order();
    __atomic_store_n(&shared->version, VHOST_USER_INFLIGHT_VERSION, __ATOMIC_RELAXED);
}

/* ---- while the queue runs ---- */

static int tracked_map(struct vhost_queue *q)
{
    struct tracker *t = q->tracker;
    int err = ring_split.map(q);

    t->split.heads = q->ring.heads;
    if (t->num_again)
        q->ring.heads = t->split.again;
    return err;
}

static uint32_t tracked_pending(struct vhost_queue *q)
{
    return unlikely(q->tracker->num_again) ? q->tracker->num_again : ring_split.pending(q);
}

static inline bool tracked_take(struct vhost_queue *q, struct chain *chain, enum walk walk)
{
    struct tracker *t = q->tracker;

    if (!split_take(q, chain, walk))
        return false;
    if (unlikely(t->num_again)) {
        if (--t->num_again == 0)
            q->ring.heads = t->split.heads;
        return true;
    }
    struct vhost_user_inflight_chain *c = &t->split.chain[chain->head];
    __atomic_store_n(&c->counter, t->counter++, __ATOMIC_RELAXED);
    inflight_order();
    __atomic_store_n(&c->inflight, 1, __ATOMIC_RELAXED);
    return true;
}

static bool tracked_pop(struct vhost_queue *q, struct chain *chain)
{
    return tracked_take(q, chain, WALK_MEMORY);
}

static bool tracked_pop_in_view(struct vhost_queue *q, struct chain *chain)
{
    return tracked_take(q, chain, WALK_VIEW);
}

static void tracked_push(struct vhost_queue *q, uint16_t head, uint32_t len)
{
    struct tracker *t = q->tracker;

    split_push(q, head, len);
    /* Not the driver's to make available again until it is shown. */
    q->busy[head / 64] |= UINT64_C(1) << (head % 64);
    t->split.batch[t->split.pushed++] = head;
}

static void tracked_show(struct vhost_queue *q)
{
    struct tracker *t = q->tracker;
    struct vhost_user_inflight_split *shared = t->split.shared;
    struct vhost_user_inflight_chain *chain = t->split.chain;
    uint64_t *busy = q->busy;
    const uint16_t *batch = t->split.batch;
    uint16_t last = t->split.last_batch_head;
    uint32_t n = t->split.pushed;

    if (!n)
        return;
    for (uint32_t i = 0; i < n; i++) {
        __atomic_store_n(&chain[batch[i]].next, last, __ATOMIC_RELAXED);
        last = batch[i];
    }
    inflight_order();
    __atomic_store_n(&shared->last_batch_head, last, __ATOMIC_RELAXED);
    inflight_order();
    ring_split.show(q);
    inflight_order();
    for (uint32_t i = 0; i < n; i++) {
        uint16_t head = batch[i];
        __atomic_store_n(&chain[head].inflight, 0, __ATOMIC_RELAXED);
        busy[head / 64] &= ~(UINT64_C(1) << (head % 64));
    }
    inflight_order();
    __atomic_store_n(&shared->used_idx, q->ring.used_idx, __ATOMIC_RELAXED);
    t->split.last_batch_head = last;
    t->split.pushed = 0;
}

static void tracked_publish(struct vhost_queue *q)
{
    tracked_show(q);
    ring_split.publish(q);
}

static uint32_t tracked_next_index(const struct vhost_queue *q)
{
    /* One that was never enabled leaves to the next server what the last one had popped. */
    return (uint16_t)(ring_split.next_index(q) + q->tracker->num_again);
}

static void attach(struct vhost_queue *q)
{
    struct ring_layout *layout = &q->ring.layout;

    layout->map = tracked_map;
    layout->pending = tracked_pending;
    layout->pop = q->memory->behind ? tracked_pop_in_view : tracked_pop;
    layout->push = tracked_push;
    layout->show = tracked_show;
    layout->publish = tracked_publish;
    layout->next_index = tracked_next_index;
}

const struct tracking track_split = {
    .header = sizeof(struct vhost_user_inflight_split),
    .entry = sizeof(struct vhost_user_inflight_chain),
    .alloc = alloc,
    .free = free_tracker,
    .version = version,
    .begin = begin,
    .resume = resume,
    .attach = attach,
};
