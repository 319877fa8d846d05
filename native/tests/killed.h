/*
 * A server that was killed, forged: what it left in its in-flight region and in the ring, from
 * which a real queue goes on.
 */
#ifndef KILLED_H
#define KILLED_H

#include "rig.h"

enum { SIZE = 8, QUEUES = 2 };

struct killed {
    struct rig rig; /* its queue is made by `revive` */
    int fd;
    char *host;
    struct vhost_inflight *region;
    struct vhost_user_inflight_split *shared;
    struct vhost_user_inflight_chain *chain;
};

static inline void killed_open_sized(struct killed *k, uint16_t ring_size, uint32_t queue_size)
{
    uint64_t size = vhost_inflight_size(QUEUES, queue_size, false);

    *k = (struct killed){.fd = memfd_create("inflight", MFD_CLOEXEC)};
    CHECK_EQ(ftruncate(k->fd, (off_t)size), 0);
    k->host = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, k->fd, 0);
    CHECK(k->host != MAP_FAILED);
    CHECK_EQ(vhost_inflight_map(k->fd, 0, QUEUES, queue_size, false, &k->region), 0);
    k->shared = (void *)k->host;
    k->chain = (void *)(k->shared + 1);
    k->rig.guest = guest_new(GUEST_SIZE, 0);
    k->rig.ring = driver_new(&k->rig.guest, 0, ring_size, VERSION_1, 0);
    k->rig.control = control_new(0, 0);
    k->rig.probe = probe_new(1);
    one_byte_each(&k->rig.ring);
}

static inline void killed_open(struct killed *k)
{
    killed_open_sized(k, SIZE, SIZE);
    k->shared->version = VHOST_USER_INFLIGHT_VERSION;
    k->shared->desc_num = SIZE;
}

static inline int revive_at(struct killed *k, uint32_t next_index, bool enabled)
{
    struct rig *r = &k->rig;
    struct vhost_queue_config config = driver_config(&r->ring, 0);

    config.next_index = next_index;
    config.enabled = enabled;
    config.inflight = k->region;
    return vhost_queue_new(&config, &r->probe->device, r->guest.memory, &r->queue);
}

static inline int revive(struct killed *k, bool enabled)
{
    return revive_at(k, 0x5555, enabled); /* the region knows better */
}

static inline void run(struct killed *k)
{
    CHECK_EQ(revive(k, true), 0);
    queue_run(&k->rig.control, k->rig.queue);
}

static inline void end(struct killed *k)
{
    struct rig *r = &k->rig;

    CHECK_EQ(vhost_queue_free(r->queue), 0);
    control_free(&r->control);
    vhost_device_free(&r->probe->device);
    driver_free(&r->ring);
    guest_free(&r->guest);
    vhost_inflight_unref(k->region);
    munmap(k->host, vhost_inflight_size(QUEUES, SIZE, false));
    close(k->fd);
}

static inline uint8_t flag(const struct killed *k, uint16_t head)
{
    return __atomic_load_n(&k->chain[head].inflight, __ATOMIC_ACQUIRE);
}

/* Nothing is out: the region says so, and what the used index is. */
static inline void expect_idle(const struct killed *k)
{
    for (uint16_t i = 0; i < SIZE; i++)
        CHECK_EQ(flag(k, i), 0);
    CHECK_EQ(k->shared->used_idx, k->rig.ring.used[1]);
}

#endif
