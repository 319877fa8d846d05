/* The driver's side of a split ring: what is done once a ring or once a batch. */
#include "driver_ring.h"
#include <errno.h>
#include <sys/eventfd.h>

char *driver_memory_at(const struct driver_memory *memory, uint64_t addr, uint64_t size)
{
    uint64_t offset = addr - memory->guest_addr;

    if (addr < memory->guest_addr || offset > memory->size || size > memory->size - offset)
        return NULL;
    return memory->host + offset;
}

int driver_ring_open(struct driver_ring *r, const struct driver_memory *memory, uint64_t desc,
                     uint64_t avail, uint64_t used, uint32_t size)
{
    if (size == 0 || size > VIRTQUEUE_MAX_SIZE || (size & (size - 1)))
        return -EINVAL;
    if (desc % 16 || avail % 2 || used % 4)
        return -EINVAL;
    r->size = size;
    r->desc = (struct vring_desc *)driver_memory_at(memory, desc, 16ull * size);
    r->avail = (uint16_t *)driver_memory_at(memory, avail, 6 + 2ull * size);
    r->used = (uint16_t *)driver_memory_at(memory, used, 6 + 8ull * size);
    if (!r->desc || !r->avail || !r->used)
        return -EINVAL;
    r->used_ring = (struct vring_used_elem *)&r->used[2];
    r->avail_idx = r->published = r->avail[1];
    r->used_idx = __atomic_load_n(&r->used[1], __ATOMIC_ACQUIRE);
    return r->avail_idx == r->used_idx ? 0 : -EINVAL;
}

static inline uint16_t avail_event(const struct driver_ring *r)
{
    return __atomic_load_n((uint16_t *)&r->used_ring[r->size], __ATOMIC_RELAXED);
}

void driver_ring_publish(struct driver_ring *r)
{
    uint16_t before = r->published;
    bool kick;

    r->published = r->avail_idx;
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
