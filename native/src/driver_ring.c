/* The driver's side of a ring: what is done once a ring or once a batch. */
#include "driver_ring.h"
#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>

char *driver_memory_at(const struct driver_memory *memory, uint64_t addr, uint64_t size)
{
    uint64_t offset = addr - memory->guest_addr;

    if (addr < memory->guest_addr || offset > memory->size || size > memory->size - offset)
        return NULL;
    return memory->host + offset;
}

/* An idle ring's places are where a round ends: whoever wrote there last, driver or device, the
 * AVAIL bit is the wrap counter of that round. */
static int open_packed(struct driver_ring *r, const struct driver_memory *memory, uint64_t desc,
                       uint64_t avail, uint64_t used)
{
    if (desc % 16 || avail % 4 || used % 4)
        return -EINVAL;
    r->slot = (struct vring_packed_desc *)driver_memory_at(memory, desc, 16ull * r->size);
    r->driver_event = (uint32_t *)driver_memory_at(memory, avail, sizeof(*r->driver_event));
    r->device_event = (const uint32_t *)driver_memory_at(memory, used, sizeof(*r->device_event));
    if (!r->slot || !r->driver_event || !r->device_event)
        return -EINVAL;
    r->desc = calloc(r->size, sizeof(*r->desc));
    if (!r->desc)
        return -ENOMEM;
    bool begun = r->slot[0].flags & DRIVER_AVAIL;
    uint32_t end = 1;
    while (end < r->size && !(r->slot[end].flags & DRIVER_AVAIL) == !begun)
        end++;
    r->fill = (struct driver_place){.at = (uint16_t)(end % r->size), .wrap = begun};
    if (end == r->size)
        r->fill.wrap = !begun;
    r->take = r->unknown = r->fill;
    r->wish = *r->driver_event;
    return 0;
}

void driver_ring_close(struct driver_ring *r)
{
    if (r->slot || r->placed)
        free(r->desc);
    free(r->offered);
}

int driver_ring_open(struct driver_ring *r, const struct driver_memory *memory, uint64_t desc,
                     uint64_t avail, uint64_t used, uint32_t size, uint16_t chain, unsigned kind)
{
    if (size == 0 || size > VIRTQUEUE_MAX_SIZE || (size & (size - 1)))
        return -EINVAL;
    r->size = size;
    r->chain = chain;
    if (kind & DRIVER_RING_IN_ORDER) {
        r->offered = calloc(size, sizeof(*r->offered));
        if (!r->offered)
            return -ENOMEM;
    }
    if (kind & DRIVER_RING_PACKED)
        return open_packed(r, memory, desc, avail, used);
    if (desc % 16 || avail % 2 || used % 4)
        return -EINVAL;
    r->desc = (struct vring_desc *)driver_memory_at(memory, desc, 16ull * size);
    r->avail = (uint16_t *)driver_memory_at(memory, avail, 6 + 2ull * size);
    r->used = (uint16_t *)driver_memory_at(memory, used, 6 + 8ull * size);
    if (!r->desc || !r->avail || !r->used)
        return -EINVAL;
    r->used_ring = (struct vring_used_elem *)&r->used[2];
    r->avail_idx = r->published = r->avail[1];
    r->used_idx = __atomic_load_n(&r->used[1], __ATOMIC_ACQUIRE);
    if (r->avail_idx != r->used_idx)
        return -EINVAL;
    if (r->offered) {
        struct vring_desc *own = calloc(size, sizeof(*own));
        if (!own)
            return -ENOMEM;
        r->placed = r->desc;
        r->desc = own;
    }
    return 0;
}

static inline uint16_t avail_event(const struct driver_ring *r)
{
    return __atomic_load_n((uint16_t *)&r->used_ring[r->size], __ATOMIC_RELAXED);
}

/* The same as in the split ring below. */
static bool publish_packed(struct driver_ring *r, uint16_t chains)
{
    if (r->first)
        __atomic_store_n(&r->first->flags, r->first_flags, __ATOMIC_RELEASE);
    r->first = NULL;
    atomic_thread_fence(memory_order_seq_cst);
    uint32_t event = __atomic_load_n(r->device_event, __ATOMIC_RELAXED), flags = event >> 16;
    if (flags != VRING_PACKED_EVENT_FLAG_DESC)
        return flags == VRING_PACKED_EVENT_FLAG_ENABLE;
    /* How far we are beyond the place named, where two rounds have places of their own. */
    uint32_t round = (bool)(event & 0x8000) == r->fill.wrap ? 0 : r->size;
    uint32_t beyond = r->fill.at + 2 * r->size - (event & 0x7fff) - round - 1;
    return beyond % (2 * r->size) < (uint32_t)chains * r->chain;
}

void driver_ring_publish(struct driver_ring *r)
{
    uint16_t before = r->published;
    bool kick;

    r->published = r->avail_idx;
    if (r->slot) {
        if (publish_packed(r, (uint16_t)(r->published - before)) && r->kick_fd >= 0) {
            eventfd_write(r->kick_fd, 1);
            r->kicks++;
        }
        return;
    }
    __atomic_store_n(&r->avail[1], r->avail_idx, __ATOMIC_RELEASE);
    /* The index must be visible before the device's wish is read (virtio 1.3, 2.7.13.4.1). */
    atomic_thread_fence(memory_order_seq_cst);
    if (r->event_idx)
        kick = (uint16_t)(r->avail_idx - avail_event(r) - 1) < (uint16_t)(r->avail_idx - before);
    else
        kick = !(__atomic_load_n(&r->used[0], __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY);
    if (kick && r->kick_fd >= 0) {
        eventfd_write(r->kick_fd, 1);
        r->kicks++;
    }
}
