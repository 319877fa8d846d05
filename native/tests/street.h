/* A street of two: a rig to break things in, and a neighbour that must not notice. */
#ifndef STREET_H
#define STREET_H

#include "rig.h"

/* A rig with a second queue on the same iothread: the neighbour that must not notice. */
struct street {
    struct rig rig;
    struct driver_ring neighbour;
    struct probe *probe;
    struct vhost_queue *queue;
};

static inline void street_open(struct street *s, uint16_t size, uint64_t features)
{
    rig_open(&s->rig, size, features);
    s->neighbour = driver_new(&s->rig.guest, 1, 4, VERSION_1, 0);
    s->probe = probe_new(1);
    struct vhost_queue_config config = driver_config(&s->neighbour, 0);
    config.token = 2000;
    CHECK_EQ(vhost_queue_new(&config, &s->probe->device, s->rig.guest.memory, &s->queue), 0);
    queue_run(&s->rig.control, s->queue);
    set_desc(s->neighbour.desc, 0, buffer_addr(&s->neighbour, 0), 1, VRING_DESC_F_WRITE, 0);
}

static inline void street_close(struct street *s)
{
    driver_send(&s->neighbour, 0);
    CHECK_EQ(driver_take(&s->neighbour).len, 1);
    queue_halt(&s->rig.control, s->queue);
    CHECK_EQ(vhost_queue_free(s->queue), 0);
    vhost_device_free(&s->probe->device);
    driver_free(&s->neighbour);
    rig_close(&s->rig);
}

/* What has been made available now must break the ring with `fault`; nothing may be used. */
static inline void expect_fault(struct street *s, enum vhost_fault fault)
{
    struct rig *r = &s->rig;
    uint16_t used = driver_used_idx(&r->ring);
    struct vhost_stats stats;

    driver_publish(&r->ring);
    driver_kick(&r->ring);
    CHECK_EQ(rig_await_fault(r), fault);
    CHECK_EQ(driver_used_idx(&r->ring), used);
    CHECK_EQ(vhost_device_read_stats(&r->probe->device, 0, &stats), 0);
    CHECK_EQ(stats.counter[VHOST_COUNTER_BREAKS], 1);
    /* A broken ring stays so, says so once, and still answers its messages. */
    driver_kick(&r->ring);
    queue_sync(&r->control, r->queue);
    CHECK_EQ(take_signals(r->ring.err), 0);
    CHECK_EQ(r->control.num_waiting, 0);
    street_close(s);
}

#endif
