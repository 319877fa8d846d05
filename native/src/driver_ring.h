/*
 * The driver's side of a split ring, as the load generators use it.
 *
 * What is made available becomes visible by driver_ring_publish, once a batch: one release store,
 * one full barrier, one look at whether the device wants to be kicked.  What the device has used
 * is counted by driver_ring_pending, whose acquire covers every element that it counts.
 *
 * Calls are the exception here.  A ring is kept quiet by driver_ring_disarm, called once a batch,
 * and asks for a call by driver_ring_arm, after which the used index must be looked at once more
 * before the thread sleeps.
 */
#ifndef VHOST_DRIVER_RING_H
#define VHOST_DRIVER_RING_H

#include "internal.h"

/* Guest memory of one region, as the driver maps it. */
struct driver_memory {
    char *host; /* host address of guest_addr */
    uint64_t size;
    uint64_t guest_addr;
};

struct driver_ring {
    struct vring_desc *desc;
    uint16_t *avail; /* flags, idx, ring[size], used_event */
    uint16_t *used;  /* flags, idx, then elements, then avail_event */
    struct vring_used_elem *used_ring;
    uint32_t size;
    uint16_t avail_idx; /* the device sees it as far as it is published */
    uint16_t published;
    uint16_t used_idx; /* taken so far */
    bool event_idx;
    int kick_fd, call_fd; /* or -1 */
    uint64_t kicks;
};

/* The host address of [addr, addr + size), or NULL. */
char *driver_memory_at(const struct driver_memory *memory, uint64_t addr, uint64_t size);

/* Finds the ring's areas, and sets its indexes to where the ring was left; the rest of `r` is
 * the caller's to set.  -EINVAL: size, alignment (virtio 1.3, section 2.7), an area outside
 * memory, or a ring with chains in flight. */
int driver_ring_open(struct driver_ring *r, const struct driver_memory *memory, uint64_t desc,
                     uint64_t avail, uint64_t used, uint32_t size);

/* Makes what was offered since the last time visible, and kicks unless the device asked not to. */
void driver_ring_publish(struct driver_ring *r);

/* Makes a chain available; its entry is written only where the ring does not hold it already, so
 * that a ring that goes round in order stays in both CPUs' caches. */
static inline void driver_ring_offer(struct driver_ring *r, uint16_t head)
{
    uint16_t *entry = &r->avail[2 + (r->avail_idx++ & (r->size - 1))];

    if (*entry != head)
        *entry = head;
}

/* How many elements wait on the used ring. */
static inline uint16_t driver_ring_pending(const struct driver_ring *r)
{
    return (uint16_t)(__atomic_load_n(&r->used[1], __ATOMIC_ACQUIRE) - r->used_idx);
}

/* Published and not yet taken back: the device cannot have used more. */
static inline uint16_t driver_ring_in_flight(const struct driver_ring *r)
{
    return (uint16_t)(r->published - r->used_idx);
}

/* A copy, read once: the device may go on writing there. */
static inline struct vring_used_elem driver_ring_elem(const struct driver_ring *r, uint16_t idx)
{
    const struct vring_used_elem *elem = &r->used_ring[idx & (r->size - 1)];

    return (struct vring_used_elem){.id = __atomic_load_n(&elem->id, __ATOMIC_RELAXED),
                                    .len = __atomic_load_n(&elem->len, __ATOMIC_RELAXED)};
}

static inline uint16_t *driver_ring_used_event(struct driver_ring *r)
{
    return &r->avail[2 + r->size];
}

/* Asks for a call when the device's used index moves past `seen`. */
static inline void driver_ring_arm(struct driver_ring *r, uint16_t seen)
{
    if (r->event_idx)
        __atomic_store_n(driver_ring_used_event(r), seen, __ATOMIC_RELAXED);
    else
        __atomic_store_n(&r->avail[0], 0, __ATOMIC_RELAXED);
}

/* Asks for no calls.  With EVENT_IDX that means an event index that is far off, and it has to be
 * kept far. */
static inline void driver_ring_disarm(struct driver_ring *r)
{
    if (!r->event_idx) {
        if (!__atomic_load_n(&r->avail[0], __ATOMIC_RELAXED))
            __atomic_store_n(&r->avail[0], VRING_AVAIL_F_NO_INTERRUPT, __ATOMIC_RELAXED);
    } else if ((uint16_t)(*driver_ring_used_event(r) - r->used_idx) < 0x4000) {
        __atomic_store_n(driver_ring_used_event(r), (uint16_t)(r->used_idx + 0x8000),
                         __ATOMIC_RELAXED);
    }
}

#endif
