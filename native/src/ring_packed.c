/*
 * The packed virtqueue (virtio 1.3, section 2.8).
 *
 * One ring of descriptors, which the driver makes available and the device marks as used, in place.
 * Both go round it at their own pace, and how often is told by wrap counters of one bit:
 *
 *        used_idx            next_avail
 *           v                     v
 *   [ used ][ in flight  ...     ][ available ][ used in the last round ...
 *
 *   AVAIL bit = counter, USED bit != counter: available      both = counter: used
 *
 * So a counter is kept as the two flags that it stands for, and wraps by flipping both.  A chain is
 * as many descriptors in a row as have NEXT, and one; its last has the buffer id.  What is used is
 * one descriptor with that id, for which the ring moves on by the chain's length.  The driver may
 * write only to descriptors that the device gave back, but nothing stops it; so what must be right
 * (ids and lengths in flight) is kept out of its reach.
 *
 * The driver stops at the first descriptor that is not used.  Therefore that one is written last,
 * and all that was pushed becomes visible at once: the buffers of a received frame must not come
 * one by one.  Nothing is written before that, so that a server which is killed leaves the next one
 * what the driver wrote.
 */
#include "packed.h"
#include <errno.h>

/* ---- life ---- */

static int packed_map(struct vhost_queue *q)
{
    struct ring *r = &q->ring;

    /* Alignment: virtio 1.3, section 2.8.10.1. */
    if (q->desc_addr % 16 || q->avail_addr % 4 || q->used_addr % 4)
        return -EINVAL;
    void *slot = ring_part(q, AREA_DESC, q->desc_addr, r->size * sizeof(*r->slot),
                           VHOST_ACCESS_READ | VHOST_ACCESS_WRITE);
    void *driver =
        ring_part(q, AREA_AVAIL, q->avail_addr, sizeof(*r->driver_event), VHOST_ACCESS_READ);
    void *device =
        ring_part(q, AREA_USED, q->used_addr, sizeof(*r->device_event), VHOST_ACCESS_WRITE);
    if (!slot || !driver || !device)
        return -EFAULT;
    /* A region may start at any offset of its file; the host address must be aligned as well. */
    if ((uintptr_t)slot % 8 || (uintptr_t)driver % 4 || (uintptr_t)device % 4)
        return -EINVAL;
    r->slot = slot;
    r->offered = slot;
    r->driver_event = driver;
    r->device_event = device;
    return 0;
}

static int packed_resume(struct vhost_queue *q, uint32_t next_index)
{
    struct ring *r = &q->ring;
    uint16_t avail = (uint16_t)next_index, used = (uint16_t)(next_index >> 16);

    r->next_avail = avail & (WRAP - 1);
    r->used_idx = used & (WRAP - 1);
    if (r->next_avail >= r->size || r->used_idx >= r->size)
        return -EINVAL;
    r->avail_bits = avail & WRAP ? AVAIL : USED;
    r->used_bits = used & WRAP ? AVAIL | USED : 0;
    /* Some front-ends know only the lower half.  If chains were in flight, what is at the used
     * index has not been used; if not, the two places are one. */
    if (avail != used && !is_available(&r->slot[r->used_idx], avail_bits_of(r->used_bits))) {
        r->used_idx = r->next_avail;
        r->used_bits = avail & WRAP ? AVAIL | USED : 0;
    } else if (queue_is_in_order(q)) {
        r->next_avail = r->used_idx;
        r->avail_bits = avail_bits_of(r->used_bits);
    }
    return 0;
}

static uint32_t packed_next_index(const struct vhost_queue *q)
{
    return avail_place(&q->ring) | (uint32_t)used_place(&q->ring) << 16;
}

/* ---- available ---- */

static uint32_t packed_pending(struct vhost_queue *q)
{
    const struct ring *r = &q->ring;

    return is_available(&r->offered[r->next_avail], r->avail_bits) ? r->size : 0;
}

static void packed_unpop(struct vhost_queue *q, uint16_t id)
{
    struct ring *r = &q->ring;
    uint16_t len = packed_idle(q, id);

    r->taken -= len;
    if (r->next_avail < len) {
        r->next_avail = (uint16_t)(r->next_avail + r->size);
        r->avail_bits = flip(r->avail_bits);
    }
    r->next_avail = (uint16_t)(r->next_avail - len);
}

/* ---- used ---- */

/* `n` descriptors from `first` on.  Those are logged where they are: the log's address of the ring
 * is that of the third area, which holds no more than the device's wish. */
static cold_path void log_shown(struct vhost_queue *q, uint32_t first, uint32_t n)
{
    const struct ring *r = &q->ring;
    uint32_t end = r->size - first;

    ring_log(q, q->desc_addr, first * sizeof(*r->slot), (n < end ? n : end) * sizeof(*r->slot));
    if (n > end)
        ring_log(q, q->desc_addr, 0, (n - end) * sizeof(*r->slot));
}

/* All but the address, in one store: whoever sees one of them sees all. */
static inline void mark_used(struct vring_packed_desc *d, struct used used, uint16_t bits,
                             int order)
{
    /* WRITE: the length counts (section 2.8.4). */
    uint64_t flags = bits | (used.len ? VRING_DESC_F_WRITE : 0);

    __atomic_store_n((word *)&d->len, used.len | (uint64_t)used.id << 32 | flags << 48, order);
}

static void packed_show(struct vhost_queue *q)
{
    struct ring *r = &q->ring;
    const struct used *used = r->unshown, *end = used + r->num_unshown;
    uint16_t first = r->used_idx, first_bits = r->used_bits;

    if (used == end)
        return;
    if (unlikely(q->num_marks))
        log_flush(q);
    while (!used->taken)
        used++;
    uint32_t taken = used->taken;
    move(r, &r->used_idx, &r->used_bits, taken);
    for (const struct used *u = used + 1; u != end; u++) {
        if (!u->taken)
            continue;
        mark_used(&r->slot[r->used_idx], *u, r->used_bits, __ATOMIC_RELAXED);
        move(r, &r->used_idx, &r->used_bits, u->taken);
        taken += u->taken;
    }
    /* Release: the buffers, and the descriptors behind this one, come before it. */
    mark_used(&r->slot[first], *used, first_bits, __ATOMIC_RELEASE);
    if (unlikely(q->log))
        log_shown(q, first, taken);
    r->num_unshown = 0;
    r->taken -= taken;
    r->uncalled += taken;
}

/* Whether the driver wants to hear of the last `n` used descriptors (section 2.8.14). */
static bool wants_call(struct vhost_queue *q, uint32_t n)
{
    const struct ring *r = &q->ring;
    /* One load of both fields: the driver may be changing its wish. */
    uint32_t event = __atomic_load_n(r->driver_event, __ATOMIC_RELAXED), flags = event >> 16;

    if (flags == VRING_PACKED_EVENT_FLAG_ENABLE)
        return true;
    if (flags == VRING_PACKED_EVENT_FLAG_DISABLE)
        return false;
    uint32_t place = event & (WRAP - 1);
    if (unlikely(flags != VRING_PACKED_EVENT_FLAG_DESC || !r->event_idx || place >= r->size)) {
        queue_break(q, VHOST_FAULT_EVENT);
        return false;
    }
    /* How far used_idx is beyond that place, where two rounds have places of their own. */
    uint32_t round = !(event & WRAP) == !r->used_bits ? 0 : r->size;
    uint32_t beyond = (uint32_t)r->used_idx + 2u * r->size - place - round - 1;
    return beyond % (2u * r->size) < n;
}

static void packed_publish(struct vhost_queue *q)
{
    struct ring *r = &q->ring;

    packed_show(q);
    uint32_t n = r->uncalled;
    r->uncalled = 0;
    if (q->call_fd < 0) {
        if (unlikely(q->num_marks))
            log_flush(q);
        return;
    }
    /* The driver writes its wish, then looks at the ring; we write to the ring, then read its wish:
     * both sides need the full barrier, or both may miss the other. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (unlikely(q->num_marks))
        log_set(q);
    ring_call(q, wants_call(q, n));
}

/* ---- the device's wish ---- */

static inline void set_wish(struct vhost_queue *q, uint16_t place, uint16_t flags)
{
    __atomic_store_n(q->ring.device_event, place | (uint32_t)flags << 16, __ATOMIC_RELAXED);
    if (unlikely(q->log))
        ring_log(q, q->log_used, 0, sizeof(*q->ring.device_event));
}

static void packed_disarm(struct vhost_queue *q)
{
    set_wish(q, 0, VRING_PACKED_EVENT_FLAG_DISABLE);
}

static bool packed_arm(struct vhost_queue *q)
{
    const struct ring *r = &q->ring;

    if (r->event_idx)
        set_wish(q, avail_place(r), VRING_PACKED_EVENT_FLAG_DESC);
    else
        set_wish(q, 0, VRING_PACKED_EVENT_FLAG_ENABLE);
    /* As in packed_publish, the other way round: wish first, then look. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (unlikely(q->num_marks))
        log_set(q);
    return is_available(&r->offered[r->next_avail], r->avail_bits);
}

static bool packed_pop(struct vhost_queue *q, struct chain *chain)
{
    return packed_take(q, chain, WALK_MEMORY, NULL);
}

static bool packed_pop_in_view(struct vhost_queue *q, struct chain *chain)
{
    return packed_take(q, chain, WALK_VIEW, NULL);
}

const struct ring_layout ring_packed = {
    .map = packed_map,
    .resume = packed_resume,
    .next_index = packed_next_index,
    .pending = packed_pending,
    .pop = packed_pop,
    .pop_in_view = packed_pop_in_view,
    .unpop = packed_unpop,
    .push = packed_push,
    .join = packed_join,
    .show = packed_show,
    .publish = packed_publish,
    .disarm = packed_disarm,
    .arm = packed_arm,
};
