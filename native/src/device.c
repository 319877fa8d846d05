/* Devices in general: their counters and their end. */
#include "internal.h"
#include <errno.h>
#include <stdlib.h>

int device_init(struct vhost_device *device, const struct device_ops *ops, uint32_t num_queues)
{
    /* A cache line of its own for each queue's counters: their writers are different threads. */
    device->stats = aligned_alloc(64, (num_queues * sizeof(struct vhost_stats) + 63) & ~(size_t)63);
    if (!device->stats)
        return -ENOMEM;
    for (uint32_t i = 0; i < num_queues; i++)
        device->stats[i] = (struct vhost_stats){0};
    device->ops = ops;
    device->num_queues = num_queues;
    return 0;
}

void vhost_device_free(struct vhost_device *device)
{
    if (!device)
        return;
    free(device->stats);
    device->ops->free(device);
}

int vhost_device_read_stats(const struct vhost_device *device, uint32_t index,
                            struct vhost_stats *out)
{
    if (index >= device->num_queues)
        return -ERANGE;
    const struct vhost_stats *s = &device->stats[index];
    for (unsigned i = 0; i < ARRAY_SIZE(s->counter); i++)
        out->counter[i] = __atomic_load_n(&s->counter[i], __ATOMIC_RELAXED);
    for (unsigned i = 0; i < ARRAY_SIZE(s->latency); i++)
        out->latency[i] = __atomic_load_n(&s->latency[i], __ATOMIC_RELAXED);
    return 0;
}

/* Below 2^SUB each value has its own bucket; above, the top SUB+1 bits name it. */
uint32_t histogram_bucket(uint64_t ns)
{
    enum { SUB = VHOST_HISTOGRAM_SUB_BITS };
    if (ns < (1u << SUB))
        return (uint32_t)ns;
    unsigned top = 63 - (unsigned)__builtin_clzll(ns);
    uint32_t bucket = ((top - SUB + 1) << SUB) + ((ns >> (top - SUB)) & ((1u << SUB) - 1));
    return bucket < VHOST_HISTOGRAM_BUCKETS ? bucket : VHOST_HISTOGRAM_BUCKETS - 1;
}

uint64_t vhost_histogram_floor(uint32_t bucket)
{
    enum { SUB = VHOST_HISTOGRAM_SUB_BITS };
    if (bucket < (2u << SUB))
        return bucket;
    unsigned shift = (bucket >> SUB) - 1;
    return (uint64_t)((1u << SUB) | (bucket & ((1u << SUB) - 1))) << shift;
}
