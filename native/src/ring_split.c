/* The split virtqueue (virtio 1.3, section 2.7). */
#include "split.h"
#include <errno.h>

/* Offsets in the avail and used rings, in units of 16 bits. */
enum { RING_FLAGS = 0, RING_IDX = 1, AVAIL_RING = 2 };

/* The driver can see what was written to the used ring; see log.c for the order. */
static cold_path void log_used(struct vhost_queue *q, const void *from, size_t len)
{
    ring_log(q, q->log_used, (uint64_t)((const char *)from - (const char *)q->ring.used), len);
}

static inline uint16_t *used_event(const struct ring *r)
{
    return &r->avail[AVAIL_RING + r->size];
}

static inline uint16_t *avail_event(const struct ring *r)
{
    return (uint16_t *)&r->used_ring[r->size];
}

static int split_map(struct vhost_queue *q)
{
    struct ring *r = &q->ring;
    uint64_t n = r->size;

    /* Alignment: virtio 1.3, section 2.7, table "virtqueue part". */
    if (q->desc_addr % 16 || q->avail_addr % 2 || q->used_addr % 4)
        return -EINVAL;
    void *desc = ring_part(q, AREA_DESC, q->desc_addr, 16 * n, VHOST_ACCESS_READ);
    void *avail = ring_part(q, AREA_AVAIL, q->avail_addr, 6 + 2 * n, VHOST_ACCESS_READ);
    void *used = ring_part(q, AREA_USED, q->used_addr, 6 + 8 * n, VHOST_ACCESS_WRITE);
    if (!desc || !avail || !used)
        return -EFAULT;
    /* A region may start at any offset of its file; the host address must be aligned as well. */
    if ((uintptr_t)desc % 8 || (uintptr_t)avail % 2 || (uintptr_t)used % 4)
        return -EINVAL;
    r->desc = desc;
    r->avail = avail;
    r->used = used;
    r->used_ring = (struct vring_used_elem *)(r->used + 2);
    r->heads = &r->avail[AVAIL_RING];
    return 0;
}

static int split_resume(struct vhost_queue *q, uint32_t next_index)
{
    struct ring *r = &q->ring;

    if (next_index > UINT16_MAX)
        return -EINVAL;
    r->next_avail = (uint16_t)next_index;
    r->used_idx = r->called_idx = load16(&r->used[RING_IDX], __ATOMIC_RELAXED);
    if (queue_is_in_order(q))
        r->next_avail = r->used_idx;
    return 0;
}

static uint32_t split_pending(struct vhost_queue *q)
{
    struct ring *r = &q->ring;
    /* Acquire: the entries and descriptors below idx were written before it. */
    uint16_t pending = load16(&r->avail[RING_IDX], __ATOMIC_ACQUIRE) - r->next_avail;

    if (unlikely(pending > r->size)) {
        queue_break(q, VHOST_FAULT_AVAIL_INDEX);
        return 0;
    }
    return pending;
}

static void split_unpop(struct vhost_queue *q, uint16_t head)
{
    split_idle(q, head);
    q->in_flight--;
    q->ring.next_avail--;
}

/* The elements since the last call, and the index. */
static cold_path void log_shown(struct vhost_queue *q)
{
    const struct ring *r = &q->ring;
    uint32_t first = r->called_idx & (r->size - 1), n = (uint16_t)(r->used_idx - r->called_idx);

    log_used(q, r->used, 2 * sizeof(uint16_t));
    if (n > r->size - first) {
        log_used(q, r->used_ring, r->size * sizeof(*r->used_ring));
    } else if (n) {
        log_used(q, &r->used_ring[first], n * sizeof(*r->used_ring));
    }
}

static void split_show(struct vhost_queue *q)
{
    if (unlikely(q->num_marks))
        log_flush(q);
    /* Release: the elements and the buffers they tell of come before idx. */
    __atomic_store_n(&q->ring.used[RING_IDX], q->ring.used_idx, __ATOMIC_RELEASE);
    if (unlikely(q->log))
        log_shown(q);
}

static void split_publish(struct vhost_queue *q)
{
    struct ring *r = &q->ring;
    bool wanted;

    split_show(q);
    uint16_t old = r->called_idx, now = r->used_idx;
    r->called_idx = now;
    if (q->call_fd < 0) {
        if (unlikely(q->num_marks))
            log_flush(q);
        return;
    }
    /* The driver writes its wish, then reads idx; we write idx, then read its wish: both sides
     * need the full barrier, or both may miss the other (sections 2.7.7.1 and 2.7.10). */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (unlikely(q->num_marks))
        log_set(q);
    if (r->event_idx) {
        uint16_t event = load16(used_event(r), __ATOMIC_RELAXED);
        wanted = (uint16_t)(now - event - 1) < (uint16_t)(now - old);
    } else {
        wanted = !(load16(&r->avail[RING_FLAGS], __ATOMIC_RELAXED) & VRING_AVAIL_F_NO_INTERRUPT);
    }
    ring_call(q, wanted);
}

static void split_disarm(struct vhost_queue *q)
{
    /* With EVENT_IDX a stale avail_event silences the driver by itself. */
    if (q->ring.event_idx)
        return;
    __atomic_store_n(&q->ring.used[RING_FLAGS], VRING_USED_F_NO_NOTIFY, __ATOMIC_RELAXED);
    if (unlikely(q->log))
        log_used(q, &q->ring.used[RING_FLAGS], sizeof(uint16_t));
}

static bool split_arm(struct vhost_queue *q)
{
    struct ring *r = &q->ring;
    uint16_t *wish = r->event_idx ? avail_event(r) : &r->used[RING_FLAGS];

    __atomic_store_n(wish, r->event_idx ? r->next_avail : 0, __ATOMIC_RELAXED);
    if (unlikely(q->log))
        log_used(q, wish, sizeof(*wish));
    /* As in ring_publish, the other way round: wish first, then look. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (unlikely(q->num_marks))
        log_set(q);
    return load16(&r->avail[RING_IDX], __ATOMIC_RELAXED) != r->next_avail;
}

static uint32_t split_next_index(const struct vhost_queue *q)
{
    return q->ring.next_avail;
}

static bool split_pop(struct vhost_queue *q, struct chain *chain)
{
    return split_take(q, chain, WALK_MEMORY);
}

static bool split_pop_in_view(struct vhost_queue *q, struct chain *chain)
{
    return split_take(q, chain, WALK_VIEW);
}

const struct ring_layout ring_split = {
    .map = split_map,
    .resume = split_resume,
    .next_index = split_next_index,
    .pending = split_pending,
    .pop = split_pop,
    .pop_in_view = split_pop_in_view,
    .unpop = split_unpop,
    .push = split_push,
    .show = split_show,
    .publish = split_publish,
    .disarm = split_disarm,
    .arm = split_arm,
};
