/* A batch device in place: guest memory, driver ring, iothread, and the desk where chains land. */
#ifndef DESK_H
#define DESK_H

#include "rig.h"

enum { CHAINS = 64 };

/* A batch device with one queue, in place of the rig's probe. */
struct desk {
    struct guest guest;
    struct driver_ring ring;
    struct control control;
    struct vhost_events *events;
    struct vhost_device *device;
    struct vhost_queue *queue;
    struct vhost_chain chain[CHAINS]; /* taken last */
};

static inline void desk_open(struct desk *d, uint16_t size, uint64_t features, uint64_t split)
{
    *d = (struct desk){0};
    d->guest = guest_new(GUEST_SIZE, split);
    d->ring = driver_new(&d->guest, 0, size, VERSION_1 | features, 0);
    d->control = control_new(0, 0);
    CHECK_EQ(vhost_events_new(&d->events), 0);
    CHECK_EQ(vhost_batch_new(1, d->events, &d->device), 0);
    struct vhost_queue_config config = driver_config(&d->ring, 0);
    CHECK_EQ(vhost_queue_new(&config, d->device, d->guest.memory, &d->queue), 0);
    one_byte_each(&d->ring);
    queue_run(&d->control, d->queue);
}

static inline void desk_close(struct desk *d)
{
    queue_halt(&d->control, d->queue);
    CHECK_EQ(vhost_queue_free(d->queue), 0);
    control_free(&d->control);
    vhost_device_free(d->device);
    vhost_events_free(d->events);
    driver_free(&d->ring);
    guest_free(&d->guest);
}

/* Waits for an event of the device; there must be one only. */
static inline void await_told(struct desk *d, int kind)
{
    struct vhost_event e[2];

    await_signal(vhost_events_fd(d->events));
    CHECK_EQ(vhost_events_read(d->events, e, 2), 1);
    CHECK_EQ(e[0].kind, kind);
    CHECK_EQ(e[0].token, 0);
}

static inline bool was_told(struct desk *d)
{
    struct vhost_event e;

    return vhost_events_read(d->events, &e, 1) > 0;
}

static inline int take(struct desk *d, uint32_t max)
{
    struct vhost_memory *memory;
    int n = vhost_batch_take(d->device, 0, d->chain, max, &memory);

    if (n)
        vhost_memory_unref(memory);
    return n;
}

static inline int complete(struct desk *d, uint32_t id, uint32_t written)
{
    struct vhost_chain_done done = {.id = id, .written = written};

    return vhost_batch_complete(d->device, 0, &done, 1);
}

/* Offers the heads [first, first + n) and kicks once. */
static inline void offer(struct desk *d, uint16_t first, uint16_t n)
{
    for (uint16_t i = 0; i < n; i++)
        driver_offer(&d->ring, first + i);
    driver_publish(&d->ring);
    driver_kick(&d->ring);
}

/* Offers heads and takes them: they were published as one, so one event tells of all. */
static inline void offer_and_take(struct desk *d, uint16_t first, uint16_t n)
{
    offer(d, first, n);
    await_told(d, VHOST_EVENT_CHAINS);
    CHECK_EQ(take(d, CHAINS), n);
}

/* The second answer ends a pass in which the queue was served after the first. */
static inline void settle(struct desk *d)
{
    queue_sync(&d->control, d->queue);
    queue_sync(&d->control, d->queue);
}

static inline uint64_t counter(struct desk *d, enum vhost_counter which)
{
    struct vhost_stats stats;

    CHECK_EQ(vhost_device_read_stats(d->device, 0, &stats), 0);
    return stats.counter[which];
}

#endif
