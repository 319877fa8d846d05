/*
 * VIRTIO_F_IN_ORDER: what is completed in any order is used in the order in which it was made
 * available.  A program says by LAYOUT of which rings.
 */
#ifndef ORDER_CASES_H
#define ORDER_CASES_H

#include "rig.h"

enum { ORDERED = 8 };

/* A rig whose iothread has nothing to do: the test pops and pushes in its place. */
struct hand {
    struct rig rig;
    struct vhost_inflight *region; /* or NULL */
};

static void hand_queue(struct hand *h)
{
    struct vhost_queue_config config = driver_config(&h->rig.ring, 0);

    config.inflight = h->region;
    config.next_index = LAYOUT ? index_of(h->rig.ring.packed->fill) |
                                     (uint32_t)index_of(h->rig.ring.packed->take) << 16
                               : h->rig.ring.used[1];
    CHECK_EQ(vhost_queue_new(&config, &h->rig.probe->device, h->rig.guest.memory, &h->rig.queue),
             0);
    h->rig.queue->thread = h->rig.control.thread;
    h->rig.queue->dirty = true; /* nobody else publishes */
}

static void hand_open(struct hand *h, uint16_t next_index, bool tracked)
{
    struct rig *r = &h->rig;

    *h = (struct hand){0};
    r->guest = guest_new(GUEST_SIZE, 0);
    r->ring = driver_new(&r->guest, 0, ORDERED, VERSION_1 | IN_ORDER, next_index);
    r->control = control_new(0, 0);
    r->probe = probe_new(1);
    one_byte_each(&r->ring);
    if (tracked) {
        int fd = memfd_create("inflight", MFD_CLOEXEC);
        CHECK_EQ(ftruncate(fd, (off_t)vhost_inflight_size(1, ORDERED, LAYOUT)), 0);
        CHECK_EQ(vhost_inflight_map(fd, 0, 1, ORDERED, LAYOUT, &h->region), 0);
        close(fd);
    }
    hand_queue(h);
}

static void hand_end(struct hand *h)
{
    h->rig.queue->thread = NULL;
    CHECK_EQ(vhost_queue_free(h->rig.queue), 0);
}

static void hand_close(struct hand *h)
{
    hand_end(h);
    control_free(&h->rig.control);
    vhost_device_free(&h->rig.probe->device);
    driver_free(&h->rig.ring);
    guest_free(&h->rig.guest);
    vhost_inflight_unref(h->region);
}

/* Offers and pops the heads [first, first + n). */
static void hand_pop(struct hand *h, uint16_t first, uint16_t n)
{
    struct chain c;

    for (uint16_t i = 0; i < n; i++)
        driver_offer(&h->rig.ring, first + i);
    driver_publish(&h->rig.ring);
    for (uint16_t i = 0; i < n; i++) {
        CHECK(ring_pending(h->rig.queue) && ring_pop(h->rig.queue, &c));
        CHECK_EQ(c.head, first + i);
    }
}

static void expect_used(struct hand *h, uint16_t first, uint16_t n)
{
    ring_publish(h->rig.queue);
    for (uint16_t i = 0; i < n; i++) {
        struct vring_used_elem e = driver_take(&h->rig.ring);
        CHECK_EQ(e.id, first + i);
        CHECK_EQ(e.len, 1 + e.id);
    }
    CHECK_EQ(driver_used_idx(&h->rig.ring), h->rig.ring.seen);
}

static void give(struct hand *h, uint16_t head)
{
    ring_push(h->rig.queue, head, 1 + head);
}

static void what_is_early_is_held_back(void)
{
    struct hand h;

    hand_open(&h, BEFORE_WRAP(ORDERED, 3), false);
    for (int round = 0; round < 5; round++) {
        hand_pop(&h, 0, 6);
        give(&h, 1);
        give(&h, 5);
        expect_used(&h, 0, 0);
        CHECK_EQ(h.rig.queue->in_flight, 6);
        give(&h, 0);
        expect_used(&h, 0, 2);
        give(&h, 3);
        give(&h, 4);
        expect_used(&h, 0, 0);
        give(&h, 2);
        expect_used(&h, 2, 4);
        CHECK_EQ(h.rig.queue->in_flight, 0);
    }
    hand_close(&h);
}

static void what_was_looked_at_goes_back(void)
{
    struct hand h;
    struct chain c;

    hand_open(&h, 0, false);
    hand_pop(&h, 0, 4);
    ring_unpop(h.rig.queue, 3);
    ring_unpop(h.rig.queue, 2);
    give(&h, 1);
    give(&h, 0);
    expect_used(&h, 0, 2);
    CHECK(ring_pop(h.rig.queue, &c) && c.head == 2);
    CHECK(ring_pop(h.rig.queue, &c) && c.head == 3);
    give(&h, 3);
    give(&h, 2);
    expect_used(&h, 2, 2);
    hand_close(&h);
}

/* A drain waits for what is held back, as for what is not done. */
static void a_stop_waits_for_all(void)
{
    struct rig r;

    rig_open(&r, ORDERED, IN_ORDER);
    one_byte_each(&r.ring);
    atomic_store(&r.probe->hold, true);
    for (uint16_t i = 0; i < ORDERED; i++)
        driver_offer(&r.ring, i);
    driver_publish(&r.ring);
    driver_kick(&r.ring);
    while (probe_count(r.probe) < ORDERED)
        queue_sync(&r.control, r.queue);
    CHECK_EQ(vhost_queue_stop(r.queue, ++r.control.token), 0);
    CHECK_EQ(eventfd_write(r.probe->release, 1), 0);
    CHECK_EQ(await_done(&r.control).result, 0);
    for (uint16_t i = 0; i < ORDERED; i++)
        CHECK_EQ(driver_take(&r.ring).id, i);
    queue_run(&r.control, r.queue);
    rig_close(&r);
}

/* The used index tells what was in flight, without a region; what was held back is done again. */
static void a_server_that_was_killed(void)
{
    for (int tracked = 0; tracked < 2; tracked++) {
        struct hand h;
        struct chain c;
        hand_open(&h, 0, tracked);
        hand_pop(&h, 0, 5);
        give(&h, 0);
        give(&h, 2);
        give(&h, 4);
        expect_used(&h, 0, 1);
        hand_end(&h);
        hand_queue(&h);
        for (uint16_t i = 1; i < 5; i++)
            CHECK(ring_pending(h.rig.queue) && ring_pop(h.rig.queue, &c) && c.head == i);
        CHECK(!ring_pending(h.rig.queue));
        for (uint16_t i = 4; i > 0; i--)
            give(&h, i);
        expect_used(&h, 1, 4);
        hand_pop(&h, 2, 3);
        for (uint16_t i = 2; i < 5; i++)
            give(&h, i);
        expect_used(&h, 2, 3);
        hand_close(&h);
    }
}

#define ORDER_CASES                                                                                \
    TEST(what_is_early_is_held_back), TEST(what_was_looked_at_goes_back),                          \
        TEST(a_stop_waits_for_all), TEST(a_server_that_was_killed)

#endif
